"""What every cluster file has to keep to, as one function over a file, so that tests can show that it finds faults."""

import re
from typing import Any

OPEN_TO_ALL = ("0.0.0.0/0", "::/0")
SECRET = re.compile(
    r"(?i)(hf_[a-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{40,}\b"
    r"|RAY_AUTH_TOKEN=|(token|password|secret|api_key)\s*[:=]\s*['\"]?[a-z0-9_-]{12,})"
)
EXPORTED = ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "LAUNCHER_RUN_ROOT=/shared/runs")
# Minutes that a node of 8 GPUs needs to come; see the comment in the files.
BOOT_MINUTES = {"aws": 10, "gcp": 10, "azure": 15}


def problems(config: dict[str, Any], text: str) -> list[str]:
    """Return what a `ray up` file does against the rules, in words.

    Args:
        config: the file with Ray's defaults.
        text: as it stands.
    """
    code = "\n".join(line.split("  #")[0] for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = [f"open to {each}" for each in OPEN_TO_ALL if each in code]
    found += [f"a secret: {match[0][:12]}" for match in SECRET.finditer(code)]
    found += _starts(config)
    options = " ".join(config["docker"]["run_options"])
    found += [
        f"{mount} is not mounted" for mount in ("/shared", "/local_nvme") if f"{mount}:{mount}" not in options
    ]
    scripts = " ".join(config["initialization_commands"])
    found += [f"{name} is not run" for name in ("local_nvme.sh", "shared_nfs.sh") if name not in scripts]
    if "/home/ray/.launcher-token" not in config["file_mounts"]:
        found.append("no token on the nodes")
    if config["provider"]["type"] == "local":
        return found
    # While no GPU node is there, nothing else tells a run that it is to wait for one.
    starts = [" ".join(config[f"{of}_start_ray_commands"]) for of in ("head", "worker")]
    found += ["runs do not wait for GPUs"] * any("LAUNCHER_DEVICE=gpu" not in each for each in starts)
    return found + _types(config)


def _starts(config: dict[str, Any]) -> list[str]:
    found = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        if len(starts) != 1:
            found.append(f"{key}: {len(starts)} starts")
            continue
        before, _, after = starts[0].partition("ray start")
        found += [f"{key}: {each} is not exported" for each in EXPORTED if each not in before]
        found += [f"{key}: no export"] * ("export " not in before)
        # Ray's own: see _with_interactive in its command runner.
        found += [f"{key}: one thread for all"] * ("unset OMP_NUM_THREADS" not in before)
        if key.startswith("head"):
            found += [f"{key}: no {each}" for each in HEAD_OPTIONS if each not in after]
        elif '--address="$RAY_HEAD_IP:6379"' not in after:
            found.append(f"{key}: no address")
        port = re.search(r"--dashboard-port=(\d+)", after)
        if port and 10002 <= int(port[1]) <= 19999:
            found.append(f"{key}: the dashboard's port is one of Ray's workers'")
    return found


HEAD_OPTIONS = ("--head", "--port=6379", "--dashboard-host=127.0.0.1", "--autoscaling-config=")


def _types(config: dict[str, Any]) -> list[str]:
    provider, found = config["provider"]["type"], []
    head = config["available_node_types"][config["head_node_type"]]
    if head["resources"].get("CPU") != 0 or head["resources"].get("GPU", 0):
        found.append("the head has CPUs or GPUs for work")
    if is_spot(head["node_config"]):
        found.append("the head is a spot machine")
    if head.get("max_workers", 0):
        found.append("workers of the head's type")
    if config["idle_timeout_minutes"] <= BOOT_MINUTES[provider]:
        found.append("a node is idle before the others have come")
    for name, kind in config["available_node_types"].items():
        if name == config["head_node_type"]:
            continue
        if kind.get("min_workers", 0):
            found.append(f"{name}: stays")
        if "CPU" not in kind["resources"] or "GPU" not in kind["resources"]:
            found.append(f"{name}: its resources are not said")
        if name != "cpu" and is_spot(kind["node_config"]) != name.endswith("-spot"):
            found.append(f"{name}: its name and its market differ")
    if not config["provider"].get("use_internal_ips"):
        found.append("public addresses")
    return found


def is_spot(node: dict[str, Any]) -> bool:
    """Return whether a node of this config is one that the cloud may take back."""
    azure = node.get("azure_arm_parameters", {})
    scheduling = node.get("scheduling", {})
    return (
        node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or azure.get("priority") == "Spot"
        or scheduling.get("provisioningModel") == "SPOT"
        or bool(scheduling.get("preemptible"))
    )
