"""What there is, from headers alone: before a cluster is asked for, most mistakes can be told."""

from typing import Literal

from launcher import tasks
from launcher.data import source
from launcher.errors import DataError
from launcher.plan.plan import SplitFacts, StageFacts
from launcher.recipe import DataSet, Recipe, Stage

# Of English text in a vocabulary of 30,000 to 100,000; only for estimates before anything is tokenised.
BYTES_PER_TOKEN = 4


def stage_facts(recipe: Recipe) -> tuple[StageFacts, ...]:
    """Look at the files of every stage: that they are there, are readable, have the columns and rows.

    Raises:
        DataError: they are not.
    """
    return tuple(_of_stage(stage) for stage in recipe.stages)


def files_of(data_set: DataSet) -> list[str]:
    """Return the files of a data set."""
    return source.list_files(data_set.path, split=data_set.split, config=data_set.config)


def rows_of(files: list[str], data_set: DataSet) -> tuple[int, bool]:
    """Return about how many rows of its files a data set takes, and whether it is just so many."""
    num_rows, is_exact = source.count_rows(files)
    low, high = data_set.part or (0.0, 1.0)
    share = high - low
    return num_rows and max(1, round(num_rows * share)), is_exact and share == 1 and not data_set.filters


def _of_stage(stage: Stage) -> StageFacts:
    evaluated = _of_split(stage, "eval") if stage.data.data_sets("eval") else None
    return StageFacts(train=_of_split(stage, "train"), eval=evaluated)


def _of_split(stage: Stage, split: Literal["train", "eval"]) -> SplitFacts:
    num_rows, num_bytes, is_exact = 0, 0, True
    for data_set in stage.data.data_sets(split):
        files = files_of(data_set)
        rows_here, is_exact_here = rows_of(files, data_set)
        if rows_here == 0:
            raise DataError(f"{files[0]}: has no rows")
        task = tasks.create(stage.seen_by(data_set))
        source.column_names(files, task.columns(source.column_names(files[:1])))
        source.check_filters(files, data_set.filters)
        low, high = data_set.part or (0.0, 1.0)
        num_rows += rows_here
        num_bytes += round((high - low) * sum(chunk.num_bytes for chunk in source.chunks(files)))
        is_exact &= is_exact_here
    return SplitFacts(
        about_rows=num_rows,
        num_samples=num_rows,
        is_settled=is_exact,
        num_tokens=num_bytes // BYTES_PER_TOKEN,
    )
