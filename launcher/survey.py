"""What there is, from headers alone: before a cluster is asked for, most mistakes can be told."""

from launcher import tasks
from launcher.data import source
from launcher.errors import DataError
from launcher.plan.plan import SplitFacts, StageFacts
from launcher.recipe import Recipe, Stage


def stage_facts(recipe: Recipe) -> tuple[StageFacts, ...]:
    """Look at the files of every stage: that they are there, are readable, have the columns and rows.

    Raises:
        DataError: they are not.
    """
    return tuple(_of_stage(stage) for stage in recipe.stages)


def _of_stage(stage: Stage) -> StageFacts:
    evaluated = _of_split(stage, stage.data.eval) if stage.data.eval is not None else None
    return StageFacts(train=_of_split(stage, stage.data.train), eval=evaluated)


def _of_split(stage: Stage, paths: str | list[str]) -> SplitFacts:
    files = source.list_files(paths)
    num_rows = source.count_rows(files)
    if num_rows == 0:
        raise DataError(f"{files[0]}: has no rows")
    tasks.create(stage).columns(source.column_names(files))
    return SplitFacts(num_rows=num_rows, num_samples=num_rows)
