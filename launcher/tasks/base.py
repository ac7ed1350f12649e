"""What the launcher asks of a task, and what the tasks share. Imports nothing heavy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

from launcher.errors import DataError, nearest
from launcher.recipe import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from launcher.data.source import Rows
    from launcher.tasks.shown import Shown

IGNORED = -100
LONGEST = 512

Reject: TypeAlias = Callable[[str, str], None]
"""Takes the place and the fault of a row that cannot be used: raises DataError, or returns, and then
the row is left out."""
Ragged: TypeAlias = tuple[np.ndarray, np.ndarray]
"""The values of all samples one after another, and the length of each (int64)."""
Outputs: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""What a model says of a batch: its logits, or a tuple that begins with them. Whatever the loss needs of
the parameters is in here: outside the forward, ZeRO-3 has taken them apart again."""


@dataclass(frozen=True, slots=True)
class Features:
    """Samples, as arrays.

    Attributes:
        ragged: one sequence a sample: `input_ids` (uint16 if the vocabulary allows, else int32), perhaps
            `target_mask` (uint8, as long as the ids: 1 where a token bears loss), `token_type_ids` (uint8),
            `labels` (of any length of its own; padded with -100). Names that begin with `_` are for the
            task itself (padded with 0), e.g. the bytes of a text that the metric compares with.
        scalars: one number a sample, int32: `num_targets` (labels that bear loss), perhaps `labels`. Of a
            task whose rows give several samples that are judged together, `_row`: which row of the call.
        num_skipped: rows that gave no sample, with nothing to learn within the length.
        num_cut: samples that lost tokens to the length.
        num_cut_tokens: the tokens they lost.
    """

    ragged: dict[str, Ragged]
    scalars: dict[str, np.ndarray]
    num_skipped: int = 0
    num_cut: int = 0
    num_cut_tokens: int = 0


class Task(Protocol):
    """How rows become features, a loss, a prediction and a metric."""

    auto_model: str
    """Name of the transformers Auto class."""
    metric: str
    """The metric that judges."""
    is_better_high: bool
    """Whether a higher `metric` is better."""
    loss_unit: Literal["token", "sample"]
    """What `num_targets` counts."""
    label_column: str | None
    """The files' column that holds the label words, or lists of them; None if the task has none."""
    has_eval_features: bool
    """Whether evaluation needs more of a row than training does."""
    for_eval: bool
    """Set before `features`: whether its samples are for evaluation."""
    is_grouped: bool
    """Whether several samples of one row are judged together; then `_row` tells them."""
    generates: bool
    """Whether evaluation needs generated answers."""
    generates_shown: bool
    """Whether `shown` wants generated answers, even where evaluation does without."""
    score: str
    """What `Shown.score` tells; empty if there is none."""
    traced_for: str
    """The device that a model on the meta device stands for, where that matters to the task."""

    @property
    def one_sample_per_row(self) -> bool:
        """Whether every usable row gives at most one sample, in the order of the rows."""
        ...

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

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: Reject) -> Features:
        """Turn rows into samples.

        Args:
            rows: with the columns that `columns` names.
            labels: what `labels` gave for the train split.
            reject: is told of each row that cannot be used; such a row counts as no skipped one.
        """
        ...

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Return the keyword arguments for from_pretrained; empty if the model has no head of the task's."""
        ...

    def extra(self, labels: tuple[str, ...]) -> "Module | None":
        """Return parameters of the task beside the model's, e.g. a CRF; None if there are none."""
        ...

    def save_extra(self, extra: "Module", directory: "Path") -> None:
        """Write what `extra` gave into an export."""
        ...

    def load_extra(self, directory: "Path") -> "Module | None":
        """Return what `save_extra` wrote into an export; None if there is none."""
        ...

    def start_extra(self, extra: "Module", directory: "Path", labels: tuple[str, ...]) -> None:
        """Put into a new `extra` what an export's knows of the same labels."""
        ...

    def notes(self) -> dict[str, str]:
        """Return by metric how it is defined, where that is not clear from its name."""
        ...

    def check_config(self, config: Any) -> None:
        """Refuse a model that cannot do the task.

        Args:
            config: its transformers config.

        Raises:
            ModelError: it cannot.
        """
        ...

    def outputs(self, model: Any, extra: "Module | None", batch: "dict[str, Tensor]") -> Outputs:
        """Run the model on a batch; called inside the forward of what DeepSpeed wraps."""
        ...

    def loss(self, outputs: Outputs, batch: "dict[str, Tensor]") -> "Tensor":
        """Return the fp32 sum of the loss over all labels; exactly 0 with a gradient if none."""
        ...

    def example(self, rows: int, length: int, num_labels: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the int64 features of a micro-batch: what the model and the loss see."""
        ...

    def generate(
        self, model: Any, batch: "dict[str, Tensor]", *, synced: bool, limits: dict[str, Any] | None = None
    ) -> "Tensor":
        """Return generated ids, one row a sample; called in evaluation where `generates`.

        Args:
            model: the transformers model.
            batch: as in `outputs`.
            synced: whether ranks must go on until the last one ends, as under ZeRO-3.
            limits: settings of transformers' `generate` in place of the recipe's.
        """
        ...

    def measure(
        self, outputs: Outputs, batch: "dict[str, Tensor]", loss: "Tensor", generated: "Tensor | None" = None
    ) -> "Tensor":
        """Return a float64 vector of sums that add up over samples and ranks; labels of -100 add nothing.

        What is no whole number is rounded to a multiple of 2^-20 by the caller, so that sums do not depend
        on their order.
        """
        ...

    def answers(
        self, outputs: Outputs, batch: "dict[str, Tensor]", generated: "Tensor | None" = None
    ) -> list[dict[str, Any]]:
        """Return for each row of an evaluation batch its `prediction`, its `reference`, perhaps its `id`."""
        ...

    def shown(
        self, outputs: Outputs, batch: "dict[str, Tensor]", generated: "Tensor | None" = None
    ) -> "list[Shown]":
        """Return what a person sees of each row of an evaluation batch, all of which are real."""
        ...

    def metrics(self, sums: "Tensor") -> dict[str, float]:
        """Turn the added-up sums into metrics."""
        ...

    def tables(self, sums: "Tensor") -> dict[str, Any]:
        """Return what else the added-up sums tell, as examples.json has it: `matrix` or `entities`; or nothing."""
        ...

    def predict(self, model: Any, extra: "Module | None", tokenizer: Any, lines: list[str]) -> list[str]:
        """Answer each line with label words or a text."""
        ...


class Plain:
    """What most tasks have in common; a task inherits it and overrides what is different."""

    is_better_high = True
    label_column: str | None = None
    has_eval_features = False
    for_eval = False
    is_grouped = False
    generates = False
    generates_shown = False
    score = ""

    def labels(self, rows: "Iterable[Rows]") -> tuple[str, ...]:
        """See `Task.labels`: none."""
        return ()

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`: the head is the model's own."""
        return {}

    def extra(self, labels: tuple[str, ...]) -> "Module | None":
        """See `Task.extra`: none."""
        return None

    def save_extra(self, extra: "Module", directory: "Path") -> None:
        """See `Task.save_extra`."""

    def load_extra(self, directory: "Path") -> "Module | None":
        """See `Task.load_extra`: none."""
        return None

    def start_extra(self, extra: "Module", directory: "Path", labels: tuple[str, ...]) -> None:
        """See `Task.start_extra`."""

    def notes(self) -> dict[str, str]:
        """See `Task.notes`: none."""
        return {}

    def check_config(self, config: Any) -> None:
        """See `Task.check_config`: any will do."""

    def outputs(self, model: Any, extra: "Module | None", batch: "dict[str, Tensor]") -> Outputs:
        """See `Task.outputs`: the logits."""
        logits: Tensor = model(**model_inputs(batch)).logits
        return logits

    def example(self, rows: int, length: int, num_labels: int) -> dict[str, tuple[int, ...]]:
        """See `Task.example`: one label a token."""
        return dict.fromkeys(("input_ids", "attention_mask", "labels"), (rows, length))

    def tables(self, sums: "Tensor") -> dict[str, Any]:
        """See `Task.tables`: none."""
        return {}

    def generate(
        self, model: Any, batch: "dict[str, Tensor]", *, synced: bool, limits: dict[str, Any] | None = None
    ) -> "Tensor":
        """See `Task.generate`."""
        raise NotImplementedError("only of tasks that generate")


def model_inputs(batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return of a batch what is the model's; the labels and names that begin with `_` are the task's."""
    return {k: v for k, v in batch.items() if k != "labels" and not k.startswith("_")}


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a config that name a head's labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {word: i for i, word in enumerate(labels)},
    }


def to_bytes(texts: Sequence[str]) -> Ragged:
    """Return texts as a feature: UTF-8, uint8."""
    encoded = [text.encode() for text in texts]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), lengths


def to_texts(feature: "Tensor") -> list[str]:
    """Return the texts of a feature made by `to_bytes`, padded with 0, of shape (rows, longest)."""
    rows = feature.cpu().numpy().astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


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


def texts(rows: "Rows", name: str, reject: Reject, bad: set[int]) -> list[Any]:
    """Return a column that must hold text in every row.

    Args:
        rows: the rows.
        name: the files' column.
        reject: is told of each row whose value is no text.
        bad: rows rejected already; gains those that are rejected here.
    """
    values = rows.columns[name]
    if not are_texts(values):
        for i, value in enumerate(values):
            if i not in bad and (fault := text_fault(value)):
                bad.add(i)
                reject(rows.where(i), f'column "{name}" is {fault}: fill it in or remove the row')
    return values


def are_texts(values: Sequence[Any]) -> bool:
    """Return whether all values are text that a tokenizer can take."""
    if not set(map(type, values)) <= {str}:
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_fault(value: object) -> str:
    """Return what is wrong with a value that should be text; empty if nothing is."""
    if value is None:
        return "empty (null)"
    if not isinstance(value, str):
        return f"a {type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"not Unicode text (half a surrogate pair at character {error.start + 1})"
    return ""


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
