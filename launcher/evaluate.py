"""Evaluate a finished stage again, or on other data: `python -m launcher.evaluate RUN_DIR`.

In one process, with the same batches as in the run, so that the same data give the same metrics.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher import exact, finished, storage, tasks
from launcher import recipe as recipes
from launcher.errors import BadInput, LauncherError, tell
from launcher.finished import Finished
from launcher.plan import plan as planning
from launcher.plan import sizes
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts, StagePlan, World
from launcher.recipe import DataSet, Recipe

MICRO_BATCH = "train_micro_batch_size_per_gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each metric; return the exit code."""
    options = _parser().parse_args(argv)
    try:
        _check_writable(options.predictions)
        stage = finished.find(options.run_dir, options.stage)
        done = storage.read_json(stage.directory / "done.json") if options.data is None else None
        known = (done or {}).get("metrics", {})
        metrics = _evaluate(stage, options.run_dir, options.data, options.predictions)
    except LauncherError as error:
        return tell(error)
    for name, value in metrics.items():
        print(f"{name} {value!r}" + (f"  in the run: {known[name]!r}" if name in known else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.evaluate", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's directory, with recipe.yaml")
    parser.add_argument("--stage", help="whose model to evaluate (default: the last stage's)")
    parser.add_argument("--data", metavar="FILE", help="evaluate on these rows, written like the stage's own")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write prediction and reference of each row, as JSON lines; for question-answering, to a FILE"
        " that ends in .json, the answers by id, as SQuAD's own script wants them",
    )
    return parser


def _evaluate(stage: Finished, run_dir: Path, data: str | None, predictions: Path | None) -> dict[str, float]:
    asked = _asked(stage, data)
    model_facts = sizes.model_facts(asked.model)
    plan = _plan(asked, model_facts, storage.read_json(run_dir / "ds.json") or {})
    with tempfile.TemporaryDirectory(prefix="launcher-evaluate-") as folder:
        stores = _stores(asked, model_facts, _words(stage), folder)
        metrics, answers = _run(stage, plan, stores, keep_answers=predictions is not None)
    if predictions is not None:
        _write(predictions, answers, stage.stage.task)
    return metrics


def _asked(stage: Finished, data: str | None) -> Recipe:
    """Return a recipe of this stage alone, from its export; nothing of its train data is in it."""
    given, export = stage.stage.data, str(stage.export)
    data_sets = given.data_sets("eval")
    if data is not None:
        path = data if "://" in data or data.startswith("hub:") else str(Path(data).absolute())
        columns = (data_sets or given.train)[0].columns
        data_sets = (DataSet(path=path, columns=columns),)
    if not data_sets:
        raise BadInput(f"stages.{stage.stage.name} has no data to evaluate on: give --data FILE")
    reduced = stage.stage.model_copy(
        update={
            "data": given.model_copy(update={"train": data_sets, "eval": data_sets, "eval_fraction": None}),
            "head": stage.stage.head.model_copy(update={"start": "auto"}),
            # Of training nothing is planned.
            "steps": 1,
            "warmup": 0.0,
        }
    )
    trust = export if stage.recipe.model.trust_remote_code is not None else None
    return Recipe(model=recipes.Model(path=export, trust_remote_code=trust), stages=[reduced])


def _plan(asked: Recipe, model_facts: ModelFacts, ds_config: dict[str, Any]) -> StagePlan:
    """Return the plan, for the length of samples and the size of micro-batches."""
    # The rest of the ds config is about training, and may want more workers than this one.
    ds = {MICRO_BATCH: ds_config[MICRO_BATCH]} if MICRO_BATCH in ds_config else {}
    facts = StageFacts(train=SplitFacts(about_rows=1, num_samples=1), eval=None)
    world = World(num_workers=1, device="cpu")
    return planning.make_plan(asked, ds, "ds.json", model_facts, (facts,), world).stages[0]


def _words(stage: Finished) -> list[str]:
    """Return the label words by the export's config."""
    from launcher.train import heads

    # A config leaves out what is the default.
    return heads.labels_of(str(stage.export)) or ["LABEL_0", "LABEL_1"]


def _stores(asked: Recipe, model_facts: ModelFacts, words: list[str], folder: str) -> list[Path]:
    """Make the token stores of the data to evaluate on."""
    from launcher import prepare
    from launcher.describe import describe
    from launcher.preparation import make_all

    described = describe(recipes.dump(asked), model_facts, folder)
    if isinstance(described, LauncherError):
        raise described
    jobs = [job for job in described.jobs if job.split == "eval"]
    if jobs[0].labels_from:
        # Settled by the run: the rows here may lack a label, and names in the recipe's data.labels would
        # give another meaning to labels that are numbers.
        storage.write_json(Path(jobs[0].labels_from) / prepare.LABELS, words)
    make_all(jobs)
    return [Path(job.directory) for job in jobs]


def _run(
    stage: Finished, plan: StagePlan, directories: list[Path], *, keep_answers: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics, and each row's answer in the order of the files."""
    import torch

    from launcher.data.store import Store

    stores = [Store(directory) for directory in directories]
    task = tasks.create(stage.stage)
    model, extra, tokenizer = finished.load(stage, task)
    model.config.use_cache = False
    task.for_eval = True
    task.columns(stores[0].manifest.columns)
    task.set_tokenizer(tokenizer, plan.max_length)
    task.model_options(tuple(_words(stage)) if task.label_column else ())
    total: torch.Tensor | None = None
    answers: list[tuple[int, dict[str, Any]]] = []
    with torch.no_grad():
        for batch in _batches(stores, plan, task, tokenizer):
            tensors = {k: torch.as_tensor(v).to(model.device) for k, v in batch.features.items()}
            outputs = task.outputs(model, extra, tensors)
            generated = task.generate(model, tensors, synced=False) if task.generates else None
            # Rounded as in the run.
            sums = exact.rounded(task.measure(outputs, tensors, task.loss(outputs, tensors), generated))
            total = sums if total is None else total + sums
            if keep_answers:
                own = task.answers(outputs, tensors, generated)
                answers += zip(batch.rows.tolist(), own, strict=True)
    assert total is not None, "a store has at least one sample"
    return task.metrics(total.cpu()), [answer for _, answer in sorted(answers, key=lambda each: each[0])]


def _batches(stores: list[Any], plan: StagePlan, task: Any, tokenizer: Any) -> Iterator[Any]:
    from launcher.data import feed
    from launcher.tasks import base

    return feed.eval_batches(
        stores,
        micro_batch=plan.micro_batch,
        budget_tokens=plan.budget_tokens,
        num_workers=1,
        rank=0,
        pad_token_id=base.padding_id(tokenizer),
        grouped=task.is_grouped,
    )


def _check_writable(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise BadInput(f"--predictions {path}: there is no directory {path.absolute().parent}: make it first")


def _write(path: Path, answers: list[dict[str, Any]], task: str) -> None:
    if task == "question-answering" and path.suffix == ".json":
        text = json.dumps({each["id"]: each["prediction"] for each in answers}, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    try:
        storage.write_text(path, text)
    except OSError as error:
        raise BadInput(f"--predictions {path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
