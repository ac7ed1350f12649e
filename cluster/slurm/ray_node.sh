#!/usr/bin/env bash
# One Ray node of a Slurm job; srun starts it once a host. Arguments: the head's address, the job's first port, its id.
set -euo pipefail

head_address=$1
first_port=$2
job_id=$3
folder=/tmp/ray-$job_id # not Ray's default: other jobs and users have theirs there

# When Slurm itself ends the step, Ray tells the run of it, which may save then; Slurm kills after 30 s (KillWait).
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-20}

options=(
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" # what the job has, not what the machine has
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
  --dashboard-agent-listen-port="$((first_port + 3 + SLURM_NODEID % 7))"
  --min-worker-port=0 --max-worker-port=0 # Linux chooses: fixed ones meet those of another job on this host
  --disable-usage-stats
  --block
)
node='' is_ended=''
# shellcheck disable=SC2329  # called by the trap
end() {
  is_ended=1
  if [ -n "$node" ]; then
    kill -TERM "$node" 2> /dev/null || true
  fi
}
trap end TERM INT

if [ "$SLURM_NODEID" -eq 0 ]; then
  ray start --head --node-ip-address="$head_address" --port="$first_port" --dashboard-host=127.0.0.1 \
    --dashboard-port="$((first_port + 1))" --ray-client-server-port="$((first_port + 2))" \
    --temp-dir="$folder" "${options[@]}" &
else
  # The head needs some seconds before it takes anyone in. In the background, since bash hears no signal while it waits
  # for a command.
  for _ in $(seq 120); do
    ray health-check --address "$head_address:$first_port" > /dev/null 2>&1 &
    node=$!
    wait "$node" && break
    [ -z "$is_ended" ] || exit 1
    sleep 2
  done
  ray start --address="$head_address:$first_port" "${options[@]}" &
fi
node=$!
if [ -n "$is_ended" ]; then
  kill -TERM "$node" # the signal came between the lines above
fi
code=0
wait "$node" || code=$?
# A signal ends `wait`, not Ray.
wait "$node" 2> /dev/null || true
rm -rf "$folder" # the run keeps its own logs; what stays here would fill the node's disk
exit "$code"
