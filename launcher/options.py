"""The options of the main command."""

import argparse
import os
from pathlib import Path

from launcher import processes

ROOT = Path(__file__).resolve().parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    found = argparse.ArgumentParser(
        prog="launcher", description="Fine-tune a model on any Ray cluster with DeepSpeed ZeRO."
    )
    add = found.add_argument
    default_ds = ROOT.parent / "ds_configs" / "zero3.json"
    add("recipe", nargs="?", type=Path, default=QUICKSTART, help="the recipe (YAML); default: the quickstart")
    add("--ds", type=Path, default=default_ds, metavar="FILE", help="a DeepSpeed config (JSON); or auto")
    add(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key of the recipe; repeatable"
    )
    add(
        "--workers",
        type=_workers,
        metavar="N",
        help="worker processes; 2:8: as many of them as there are nodes for, at any time; default: all GPUs, or 2 CPUs",
    )
    add(
        "--device",
        choices=["auto", "gpu", "cpu"],
        default=os.environ.get("LAUNCHER_DEVICE", "auto"),
        help="what a worker takes one of; default: LAUNCHER_DEVICE, or auto: GPUs where the cluster has or names some",
    )
    add(
        "--wait",
        type=_positive,
        default=30,
        metavar="MINUTES",
        help="how long to wait for nodes: an autoscaler's, or in the place of lost ones; default: 30",
    )
    add("--seeds", type=_positive, metavar="N", help="make the run N times with other seeds: mean and spread")
    add("--name", help="the run's name; default: made from recipe and ds config")
    add("--run-root", metavar="DIR", help="where runs are kept; default: ./runs, in a job ~/launcher-runs")
    add("--baseline", action="store_true", help="also train the last stage without those before it")
    add("--plan", action="store_true", help="print what would be done, what it needs and takes, and stop")
    add("--cluster", metavar="TEXT", help="with --plan: the machines to plan for, e.g. 16x8xH100-80GB")
    add(
        "--price",
        type=_price,
        metavar="DOLLARS",
        help="what one node costs an hour: the forecast, the report and `launcher runs` then tell what the run costs",
    )
    add("--preflight", action="store_true", help="check the cluster for this run, and stop")
    add("--no-preflight", action="store_true", help="begin a long run without checking the cluster")
    add("--no-fit-check", action="store_true", help="begin although the forecast says that it does not fit")
    add(
        "--resume-from",
        metavar="RUN[@STEP]",
        help="begin a new run at the last checkpoint of another one, or at that of a step",
    )
    add(
        "--verify-resume",
        type=_positive,
        nargs="?",
        const=8,
        metavar="STEPS",
        help="try it: some steps, a worker killed, the same and another number of workers; compare the losses",
    )
    add("--fresh", action="store_true", help="begin anew; the old run directory is moved aside")
    add("--address", help="the Ray cluster to join; default: RAY_ADDRESS, or one started for this run")
    add("--show-recipe", action="store_true", help="print the resolved recipe, and stop")
    add("--schema", action="store_true", help="print the recipe's JSON schema, and stop")
    return found


def _workers(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    fewest = _positive(first)
    most = _positive(last) if last else fewest
    if most < fewest:
        raise argparse.ArgumentTypeError(f"{text}: the second number has to be at least the first")
    return fewest, most


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _price(text: str) -> float:
    try:
        found = float(text.removeprefix("$"))
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a price such as 98.32 (dollars an hour of one node)")
    return found


def joins_a_cluster(options: argparse.Namespace) -> bool:
    """Return whether a cluster that is there is meant."""
    return bool(options.address or os.environ.get("RAY_ADDRESS") or processes.is_of_a_job())


def is_trained(options: argparse.Namespace) -> bool:
    """Return whether the command trains, if all is well."""
    return not (options.plan or options.preflight)
