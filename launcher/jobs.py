"""Submitted runs, seen from any shell that reaches the cluster: submit, list, status, follow, stop."""

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
if str(ROOT.parent) not in sys.path:
    # Run as a script, Python puts this folder on the path, not the one above it.
    sys.path[0] = str(ROOT.parent)

from launcher.errors import BadInput, ClusterError, LauncherError, refused_token, tell  # noqa: E402

STOP_WAIT_S = 120
"""How long a stopped job has for its checkpoint, before Ray kills it; Ray's own is 3 s."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_LOOK_S = 1.0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the process's exit code."""
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        print("\nthe job goes on; see it again: launcher/jobs.py follow", file=sys.stderr)
        return 130
    except LauncherError as error:
        return tell(error)
    except Exception as error:  # Ray's client raises what its parts do.
        return tell(_unreachable(options, error))


def submit(options: argparse.Namespace) -> int:
    """Submit a run of this checkout; follow it, unless asked not to."""
    arguments = [each for each in options.arguments if each != "--"]
    _check_uploaded(arguments)
    name = _client(options).submit_job(
        entrypoint=shlex.join(["python", "launcher/run.py", *arguments]),
        runtime_env={"working_dir": str(ROOT.parent), "env_vars": {STOP_WAIT: str(STOP_WAIT_S)}},
    )
    print(f"job {name}", flush=True)
    if options.no_wait:
        return 0
    options.job = name
    return follow(options)


def show_all(options: argparse.Namespace) -> int:
    """List the jobs, the newest last."""
    client = _client(options)
    for job in _jobs(client):
        progress = _progress(client.get_job_logs(job.submission_id)) if job.status == "RUNNING" else ""
        print(f"{job.submission_id}  {str(job.status).lower():9}  {_age(job)}  {_arguments(job)}")
        if progress:
            print(f"    {progress}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Tell one job's state, where it is, and how it ended."""
    client = _client(options)
    job = _one(client, options.job)
    log = client.get_job_logs(job.submission_id)
    code = f", exit code {job.driver_exit_code}" if job.driver_exit_code is not None else ""
    print(f"job {job.submission_id}: {str(job.status).lower()}{code}, {_age(job)}")
    print(f"command: {job.entrypoint}")
    for start in ("run: ", "verdict: "):
        if found := [line for line in log.splitlines() if line.startswith(start)]:
            print(found[-1])
    if progress := _progress(log):
        print(progress)
    return 0


def follow(options: argparse.Namespace) -> int:
    """Show a job's output as it comes; return its driver's exit code."""
    client = _client(options)
    name = _one(client, options.job).submission_id

    async def show() -> None:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)

    try:
        asyncio.run(show())
    except RuntimeError as error:
        # The connection ends hard where a job is stopped or the cluster goes.
        print(f"\nno more output: {_first_line(error)}", file=sys.stderr)
    job = _ended(client, name, 30)
    print(f"job {name}: {str(job.status).lower()}")
    if job.status == "SUCCEEDED":
        return 0
    return job.driver_exit_code if job.driver_exit_code and job.driver_exit_code > 0 else 1


def stop(options: argparse.Namespace) -> int:
    """Let a job save and end; wait until it has."""
    client = _client(options)
    job = _one(client, options.job)
    if job.status in ENDED:
        print(f"job {job.submission_id}: {str(job.status).lower()} already")
        return 0
    wait_s = int(((job.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, 3))
    if wait_s < 30:
        print(
            f"it was submitted without {STOP_WAIT}: Ray leaves it {wait_s} s, which may cost it its last steps"
        )
    client.stop_job(job.submission_id)
    ended = _ended(client, job.submission_id, wait_s + 30)
    print(*client.get_job_logs(job.submission_id).splitlines()[-8:], sep="\n")
    print(f"job {job.submission_id}: {str(ended.status).lower()}")
    return 0 if ended.status in ENDED else 1


def _client(options: argparse.Namespace) -> Any:
    from ray.job_submission import JobSubmissionClient

    if options.address:
        # Ray would take this before what it is told.
        os.environ["RAY_API_SERVER_ADDRESS"] = options.address
    return JobSubmissionClient(_address(options))


def _address(options: argparse.Namespace) -> str | None:
    return options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")


def _unreachable(options: argparse.Namespace, error: Exception) -> ClusterError:
    """Say of what Ray's client raised what to do about it."""
    where, said = _address(options) or "this machine", str(error).lower()
    if any(word in said for word in ("401", "403", "authentication", "unauthorized")):
        return refused_token(where)
    return ClusterError(
        f"no jobs at {where}: {_first_line(error)}; name the dashboard's address, as in --address"
        " http://127.0.0.1:8265"
    )


def _check_uploaded(arguments: Sequence[str]) -> None:
    """Refuse a recipe or ds config that lies outside of what the job takes along."""
    for each in arguments:
        path = Path(each)
        if path.suffix in (".yaml", ".yml", ".json") and path.exists():
            if not path.resolve().is_relative_to(ROOT.parent):
                raise BadInput(
                    f"{each}: is not below {ROOT.parent}, which is all that the job takes along: copy it"
                )
            if path.is_absolute():
                relative = path.resolve().relative_to(ROOT.parent)
                raise BadInput(f"{each}: the job runs in a copy of {ROOT.parent}: say {relative}")


def _jobs(client: Any) -> list[Any]:
    found = [job for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: job.start_time or 0)


def _one(client: Any, name: str | None) -> Any:
    """The job of that name, or of whose name it is the beginning; without one: the newest, a running one first."""
    jobs = _jobs(client)
    if name is None:
        running = [job for job in jobs if job.status not in ENDED]
        if not jobs:
            raise BadInput("no job was submitted to this cluster")
        return (running or jobs)[-1]
    found = [job for job in jobs if job.submission_id.startswith(name)]
    if len(found) != 1:
        known = ", ".join(job.submission_id for job in jobs[-5:]) or "none"
        raise BadInput(f"{name}: {'several jobs begin so' if found else 'no such job'}; the newest: {known}")
    return found[0]


def _ended(client: Any, name: str, limit_s: float) -> Any:
    """Wait for a job's end, so long; return it as it is then."""
    until_s = time.monotonic() + limit_s
    while (job := client.get_job_info(name)).status not in ENDED and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
    return job


def _progress(log: str) -> str:
    """The last line that tells of a step or of waiting."""
    lines = [line for line in log.splitlines() if "  step " in line or "have a place" in line]
    return lines[-1].strip() if lines else ""


def _arguments(job: Any) -> str:
    words = shlex.split(job.entrypoint)
    places = [i for i, word in enumerate(words) if word.endswith("run.py")]
    return shlex.join(words[places[0] + 1 :] if places else words)


def _age(job: Any) -> str:
    if not job.start_time:
        return "not begun"
    end_s = (job.end_time or 1000 * time.time()) / 1000
    minutes = max(0, end_s - job.start_time / 1000) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launcher-jobs", description=(__doc__ or "").strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        (
            "submit",
            submit,
            "submit a run of this checkout: submit [--no-wait] -- [what launcher/run.py takes]",
        ),
        ("list", show_all, "list the jobs"),
        ("status", status, "one job: its state, where it is, how it ended"),
        ("follow", follow, "show a job's output as it comes; Ctrl-C leaves the job alone"),
        ("stop", stop, "let a job save and end"),
    ):
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=command)
        one.add_argument("--address", help="of the dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS")
        if command is submit:
            one.add_argument("--no-wait", action="store_true", help="do not follow it")
            one.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ...")
        elif command is not show_all:
            one.add_argument("job", nargs="?", help="its id, or the beginning; default: the newest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
