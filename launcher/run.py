"""The command line: parse, plan, launch, tell the end. Light imports only, so that --help answers at once."""

import argparse
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
if str(ROOT.parent) not in sys.path:
    # Run as a script, Python puts this folder on the path, not the one above it.
    sys.path[0] = str(ROOT.parent)

from launcher import directories, lean, processes, storage  # noqa: E402
from launcher.directories import AUTO  # noqa: E402
from launcher.errors import LauncherError  # noqa: E402
from launcher.files import HALVINGS  # noqa: E402
from launcher.options import is_trained, joins_a_cluster, parser  # noqa: E402

NOT_THE_SAME = 10
CHOSEN = "auto.json"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the process's exit code."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _main(options)
    except (Exception, KeyboardInterrupt) as error:
        return _tell_error(error)


def _tell_error(error: BaseException) -> int:
    """Say what ended the run, its verdict last; return the exit code."""
    from launcher import ending

    verdict = getattr(error, "__notes__", [])
    if isinstance(error, LauncherError):
        print(f"error: {error}", *verdict, sep="\n", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        told = "stopped: the same command continues from the last checkpoint"
        print(told, *verdict, sep="\n", file=sys.stderr, flush=True)
    else:
        # Its notes are the end of what this prints.
        traceback.print_exception(error)
    if not verdict:
        print(ending.before_a_run(error), flush=True)
    if isinstance(error, KeyboardInterrupt):
        sys.stdout.flush()
        os._exit(
            ending.exit_code(error)
        )  # Ray's own way out would wait, or crash, for threads that are inside it.
    return ending.exit_code(error)


def _main(options: argparse.Namespace) -> int:
    with lean.imports():
        from launcher import recipe as recipes
        from launcher import recipe_file
    if options.schema:
        print(recipes.schema())
        return 0
    settings = [*options.set, *(["baseline=true"] if options.baseline else [])]
    recipe = recipe_file.load(options.recipe, settings)
    if options.show_recipe:
        print(recipes.to_yaml(recipe), end="")
        return 0
    return _launch(options, recipe)


def _launch(options: argparse.Namespace, recipe: Any) -> int:
    from launcher import trackers
    from launcher.plan import sizes, zero

    ds_name, ds_config = str(options.ds), None
    if ds_name != AUTO:
        ds_config = zero.load(ds_name)
        zero.check(ds_config, ds_name)
    if not options.plan:
        trackers.check(recipe.trackers)
    model_facts = sizes.model_facts(recipe.model)
    run_dir = directories.of(options, recipe, ds_config)
    if not options.plan:
        recipe, ds_name, ds_config = _as_chosen(options, run_dir, (recipe, ds_name, ds_config))
        if options.seeds is None and ds_config is not None:
            directories.check(run_dir, recipe, ds_config, fresh=options.fresh)

    finished = None if options.plan or options.seeds is not None else _finished(options, run_dir)
    if is_trained(options) and recipe.spares and joins_a_cluster(options) and not finished:
        from launcher import joining

        joining.begin(options.address, options.workers, options.device)
    with lean.imports():
        from launcher import ahead, survey

    facts = survey.stage_facts(recipe)
    if finished:
        print(f"this run is finished already; --fresh trains anew\n{_end(finished, run_dir)}")
        return 0
    asked = ahead.Asked(
        recipe=recipe,
        ds_name=ds_name,
        ds_config=ds_config,
        model_facts=model_facts,
        facts=facts,
        num_workers=options.workers[0] if options.workers else None,
        price=options.price if options.price is not None or options.plan else ahead.price_of(run_dir),
    )
    if options.plan and (options.cluster or not joins_a_cluster(options)):
        return ahead.plan(asked, options.cluster, run_dir)
    return _on_cluster(options, asked, run_dir)


def _on_cluster(options: argparse.Namespace, asked: Any, run_dir: Path) -> int:
    """Join or start a cluster; look ahead on it; train."""
    with lean.imports():
        from launcher import ahead, joining
        from launcher.report import startup
        from launcher.report import summary as report
        from launcher.report.view import View

    view, marks = View(), startup.Marks(processes.begun_s())
    marks.note("reading recipe, data and model")
    storage.make_directory(run_dir.parent / ".store")
    wait_s = 0.0 if options.plan else 60 * options.wait
    joined = joining.cluster(options.address, options.workers, options.device, wait_s, view.say)
    with view, joined as world:
        marks.note("joining the cluster")
        if is_trained(options) and asked.recipe.spares and not joins_a_cluster(options):
            joining.warm_up(world)
        looking = ahead.look_on_cluster(asked, world)
        with lean.imports():
            from launcher import driver  # Ray Train: while the other processes are at work
        found = looking()
        marks.note("looking ahead")
        if options.plan:
            return ahead.told(asked, found, world, run_dir)
        if not options.no_fit_check:
            found.check()
        if options.preflight or (ahead.is_long(found) and not options.no_preflight):
            view.say("\n".join(ahead.fly(asked, found, world, run_dir)))
            marks.note("pre-flight")
        if options.preflight:
            return 0
        job = driver.Job(
            recipe=ahead.resolved(found),
            ds_config=found.ds_config,
            ds_name=found.ds_name,
            model_facts=asked.model_facts,
            run_dir=run_dir,
            outlook=found,
            workers=options.workers,
            wait_s=wait_s,
        )
        if options.verify_resume is not None:
            return _try_resuming(job, world, view, options)
        if options.seeds is None:
            origin = _origin(options, recipe=job.recipe, run_dir=run_dir)
            store = run_dir.parent / ".store"
            ended, verdict = _train(job, world, view, store, fresh=options.fresh, origin=origin, marks=marks)
            view.say(f"{_end(ended, run_dir)}\n{verdict}")
        else:
            view.say("\n".join(report.seeds_lines(_train_seeds(job, world, view, options), str(run_dir))))
    return 0


def _as_chosen(
    options: argparse.Namespace, run_dir: Path, asked: tuple[Any, str, dict[str, Any] | None]
) -> tuple[Any, str, dict[str, Any] | None]:
    """Return recipe and ds config as `auto` chose them when the run began: a run goes on as it is."""
    from launcher import recipe as recipes

    begun = run_dir if options.seeds is None else run_dir / "seed-0"
    chosen = None if options.fresh or asked[2] is not None else storage.read_json(begun / CHOSEN)
    if chosen is None:
        return asked
    return recipes.parse(chosen["recipe"]), chosen["ds_name"], chosen["ds_config"]


def _train_seeds(job: Any, world: Any, view: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Make the run once for each seed; what is finished is not made again. Return mean and spread."""
    from dataclasses import replace

    from launcher import afterwards
    from launcher import recipe as recipes
    from launcher.report import spread

    summaries = []
    for number in range(options.seeds):
        recipe, run_dir = recipes.reseeded(job.recipe, number), job.run_dir / f"seed-{number}"
        directories.check(run_dir, recipe, job.ds_config, fresh=options.fresh)
        ended = _finished(options, run_dir)
        if ended is None:
            view.say(f"seed {number} ({number + 1} of {options.seeds})")
            one = replace(job, recipe=recipe, run_dir=run_dir)
            store = job.run_dir.parent / ".store"
            ended, verdict = _train(one, world, view, store, fresh=options.fresh)
            view.say(verdict)
        summaries.append(ended)
    together = spread.of_seeds(summaries)
    storage.write_json(job.run_dir / "summary.json", together)
    afterwards.tell_seeds(job.run_dir)
    return together


def _origin(options: argparse.Namespace, recipe: Any, run_dir: Path) -> Any:
    """Where a new run begins; None: at the recipe's model, or it has begun already."""
    from launcher import origin

    if options.resume_from is None or ((run_dir / "recipe.yaml").exists() and not options.fresh):
        return None
    return origin.find(options.resume_from, run_dir.parent, recipe)


def _train(
    job: Any,
    world: Any,
    view: Any,
    store: Path,
    *,
    fresh: bool,
    origin: Any = None,
    meddle: Any = None,
    marks: Any = None,
) -> tuple[dict[str, Any], str]:
    """Prepare the data, plan, and train; return the summary, and the verdict in one line."""
    from launcher import ahead, ending, stores
    from launcher import origin as origins
    from launcher import recipe as recipes
    from launcher.plan import plan as planning
    from launcher.plan import zero
    from launcher.report import summary as report

    recipe, ds_config, run_dir = job.recipe, job.ds_config, job.run_dir
    view.say(f"run: {run_dir}")
    with stores.prepared(recipe, ds_config, job.model_facts, store, world, view) as prepared:
        if marks is not None:
            marks.note("preparing the data")
        halvings = None if fresh else storage.read_json(run_dir / HALVINGS)
        plan = planning.make_plan(
            recipe, ds_config, job.ds_name, job.model_facts, prepared.facts, world, halvings
        )
        stage = zero.zero_stage(ds_config)
        view.say("\n".join(report.plan_lines(plan, prepared.facts, stage, job.ds_name)))
        view.say("\n".join(job.outlook.short()))
        if not fresh:
            stores.check_data(run_dir, prepared.data_files)
        directories.begin(run_dir, recipe, ds_config, fresh=fresh)
        if origin is not None:
            view.say(origins.take_over(origin, run_dir))
        facts = {each.name: of for each, of in zip(recipe.stages, prepared.facts, strict=True)}
        storage.write_json(run_dir / ahead.PLAN, job.outlook.tree() | {"data": report.data_tree(facts)})
        if job.outlook.chosen:
            chosen = {"recipe": recipes.dump(recipe), "ds_name": job.ds_name, "ds_config": ds_config}
            storage.write_json(run_dir / CHOSEN, chosen)
        storage.write_json(run_dir / stores.DATA, prepared.data_files)
        storage.write_json(run_dir / stores.STORES, prepared.stores)
        end = ending.Ending(run_dir, job.outlook.predicted(), view.say, marks)
        return _driven(job, world, view, prepared, end, meddle)


def _driven(
    job: Any, world: Any, view: Any, prepared: Any, end: Any, meddle: Any
) -> tuple[dict[str, Any], str]:
    """Train a run that has begun: whatever comes, it ends with a verdict, which is told before the trackers end."""
    from launcher import driver, gauges, tracking
    from launcher.report import opened

    with ExitStack() as beside:
        try:
            view.show(opened.event(job.run_dir))
            beside.enter_context(gauges.shown(job.run_dir))
            beside.enter_context(tracking.followed(job.run_dir, job.recipe.trackers, view.say))
            summary = driver.run(job, world, view, prepared, end.lives, meddle)
        except BaseException as error:
            raise end.failed(error) from error.__cause__
        return summary, end.done(summary)


def _try_resuming(job: Any, world: Any, view: Any, options: argparse.Namespace) -> int:
    """Make short runs beside this one that are killed and moved; return 0 if their losses are the same."""
    from dataclasses import replace

    from launcher import trial

    steps = max(trial.FEWEST_STEPS, options.verify_resume)
    folder = job.run_dir.with_name(f"{job.run_dir.name}-verify-resume")
    one = replace(job, recipe=trial.shortened(job.recipe, steps), run_dir=folder)
    storage.delete(folder)

    def train(job: Any, world: Any, origin: Any, kill: Any) -> None:
        view.say(f"{job.run_dir.name}: {steps} steps by {world.num_workers} workers")
        store = folder.parent / ".store"
        _train(job, world, view, store, fresh=False, origin=origin, meddle=kill)

    other = world.num_workers - 1 if world.num_workers > 1 else None
    lines, is_right = trial.run(one, world, other, steps, train)
    view.say("\n".join(lines))
    return 0 if is_right else NOT_THE_SAME


def _finished(options: argparse.Namespace, run_dir: Path) -> dict[str, Any] | None:
    """Return the summary of a run that is finished, unless it shall begin anew."""
    return None if options.fresh else storage.read_json(run_dir / "summary.json")


def _end(summary: dict[str, Any], run_dir: Path) -> str:
    from launcher.report import summary as report

    return "\n".join(report.end_lines(summary, str(run_dir)))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
