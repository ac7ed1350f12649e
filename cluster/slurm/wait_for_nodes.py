"""Return when a Ray cluster has so many nodes; exit code 1 when it has not within so many seconds."""

import sys
import time

import ray


def main() -> int:
    """Wait for the nodes of the cluster of RAY_ADDRESS. Arguments: how many, and for how many seconds."""
    wanted, limit_s = int(sys.argv[1]), float(sys.argv[2])
    deadline = time.monotonic() + limit_s
    there = 0
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level="ERROR")
            there = sum(node["Alive"] for node in ray.nodes())
        except (ConnectionError, RuntimeError, OSError):
            there = 0  # the head is on its way
        if there >= wanted:
            return 0
        time.sleep(1)
    print(f"{there} of {wanted} nodes after {limit_s:.0f} s", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
