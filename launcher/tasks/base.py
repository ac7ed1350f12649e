"""What the launcher asks of a task, and what the tasks share. Imports nothing heavy."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from launcher.errors import DataError, nearest
from launcher.recipe import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.data.source import Rows

IGNORED = -100
LONGEST = 512


class Task(Protocol):
    """How rows become features, a loss, a prediction and a metric."""

    auto_model: str
    """Name of the transformers Auto class."""
    metric: str
    """The metric that judges."""

    def columns(self, present: Sequence[str]) -> list[str]:
        """Return the files' columns that this task reads, out of those present.

        Raises:
            DataError: one is missing.
        """
        ...

    def labels(self, rows: "Iterable[Rows]") -> tuple[str, ...]:
        """Return the label words of the train split in order; empty if the task has none."""
        ...

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """Take the fast tokenizer and the most tokens of a sample; comes before `features`."""
        ...

    def features(self, rows: "Rows", labels: tuple[str, ...]) -> tuple[dict[str, Any], int]:
        """Turn rows into samples.

        Returns:
            The features and the number of rows skipped. Features are lists with one item a sample:
            `input_ids` (int lists), `labels` (ints, or int lists as long as the ids), `num_targets`
            (ints: labels that bear loss), and `token_type_ids` (int lists) if the
            tokenizer gives them and the model needs them.
        """
        ...

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Return the keyword arguments for from_pretrained."""
        ...

    def loss(self, logits: "Tensor", batch: "dict[str, Tensor]") -> "Tensor":
        """Return the fp32 sum of the loss over all labels; exactly 0 with a gradient if none."""
        ...

    def measure(self, logits: "Tensor", batch: "dict[str, Tensor]", loss: "Tensor") -> "Tensor":
        """Return a float64 vector of sums that add up over samples and ranks."""
        ...

    def metrics(self, sums: "Tensor") -> dict[str, float]:
        """Turn the added-up sums into metrics."""
        ...

    def predict(self, model: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Answer each line with a label word or a text."""
        ...


def check_mapping(stage: Stage, known: Sequence[str]) -> None:
    """Refuse a `columns` key that is no column of the task."""
    for name in stage.data.columns:
        if name not in known:
            raise DataError(
                f'stages.{stage.name}.data.columns: {stage.task} has no column "{name}"'
                f"{nearest(name, known)}; it has: {', '.join(known)}"
            )


def column(stage: Stage, name: str, present: Sequence[str]) -> str:
    """Return the files' column for the task's column `name`.

    Raises:
        DataError: the files do not have it.
    """
    wanted = stage.data.columns.get(name, name)
    if wanted not in present:
        raise DataError(
            f'stages.{stage.name}.data: the files have no column "{wanted}"'
            f"{nearest(wanted, present)},"
            f" they have: {', '.join(present)}; map one with stages.{stage.name}.data.columns,"
            f" e.g. {name}: {present[0] if present else 'COLUMN'}"
        )
    return wanted


def optional_column(stage: Stage, name: str, present: Sequence[str]) -> str | None:
    """Return the files' column for `name`, or None if it is neither mapped nor there."""
    if name in stage.data.columns or name in present:
        return column(stage, name, present)
    return None


def texts(rows: "Rows", name: str) -> list[str]:
    """Return a column that must hold text in every row.

    Raises:
        DataError: a value is null or no text; names the file and row.
    """
    values = rows.columns[name]
    for i, value in enumerate(values):
        if not isinstance(value, str):
            found = "empty (null)" if value is None else f"a {type(value).__name__}, not text"
            raise DataError(f'{rows.where(i)}: column "{name}" is {found}: fill it in or remove the row')
    return values


def longest_input(stage: Stage, tokenizer: Any, model: Any) -> int:
    """Return how many tokens of a line to use in prediction: as in training."""
    if stage.max_length != "auto":
        return stage.max_length
    limit = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return int(min(LONGEST, tokenizer.model_max_length, limit))


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with; its positions are masked, so models without one can use any."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
