#!/usr/bin/env bash
# Mount shared storage at /shared, and make the run root. Arguments: server:/export, NFS version (3 or 4.1).
# EFS, Filestore, Azure Files and a machine of one's own all speak NFS.
set -euo pipefail

source=${1:?server:/export}
version=${2:?NFS version}
mount_point=/shared

if ! mountpoint -q "$mount_point"; then
  command -v mount.nfs > /dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-common; }
  sudo mkdir -p "$mount_point"
  # hard: a server that is away for a minute makes writers wait; soft would lose what they wrote.
  options="nfsvers=$version,hard,timeo=600,retrans=2,rsize=1048576,wsize=1048576,noresvport"
  for attempt in 1 2 3 4 5; do
    # A mount target in a new zone takes a while to be known by name.
    sudo mount -t nfs -o "$options" "$source" "$mount_point" && break
    [ "$attempt" -lt 5 ] || exit 1
    sleep 10
  done
fi
sudo mkdir -p "$mount_point/runs" "$mount_point/huggingface"
sudo chown "$(id -u):$(id -g)" "$mount_point/runs" "$mount_point/huggingface"
