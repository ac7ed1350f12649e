#!/usr/bin/env bash
# Mount this machine's local NVMe disks, as one RAID 0, at /local_nvme. Arguments: devices; default: the cloud's own.
# All of it is lost with the machine, so only what can be made again goes there: offloaded states, caches.
set -euo pipefail

mount_point=/local_nvme
# How the clouds name their local disks. Network disks look like NVMe too, and must never be among them.
local_models='^(Amazon EC2 NVMe Instance Storage|nvme_card[0-9]*|Microsoft NVMe Direct Disk.*)$'

if mountpoint -q "$mount_point"; then
  exit 0 # `ray up` runs this again on a machine that has been set up
fi
sudo mkdir -p "$mount_point"

disks=("$@")
if [ "${#disks[@]}" -eq 0 ]; then
  while read -r name model; do
    if [[ $model =~ $local_models ]]; then
      disks+=("/dev/$name")
    fi
  done < <(lsblk --nodeps --noheadings --output NAME,MODEL)
fi

if [ "${#disks[@]}" -eq 0 ]; then
  # The folder stays root's: offloading to it then fails at once, where it would fill the root disk in silence.
  echo "no local NVMe disk here: $mount_point stays empty and cannot be written"
  exit 0
fi

device=${disks[0]}
if [ "${#disks[@]}" -gt 1 ]; then
  command -v mdadm > /dev/null || { sudo apt-get update -q && sudo apt-get install -qy mdadm; }
  device=/dev/md/local_nvme
  sudo mdadm --create "$device" --run --level=0 --raid-devices="${#disks[@]}" "${disks[@]}"
fi
sudo mkfs.xfs -f -q "$device"
sudo mount -o noatime,discard "$device" "$mount_point"
sudo chown "$(id -u):$(id -g)" "$mount_point" # the container's user has the same number as this one
