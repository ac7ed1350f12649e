"""What a model's parameters and one micro-batch take, as found on the meta device: plain data for the plan."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a stage.

    Attributes:
        numel: its elements.
        group: of the optimizer's groups, which one; None if it is frozen.
    """

    name: str
    numel: int
    group: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One micro-batch, forward and backward, without parameters and their gradients.

    Attributes:
        rows, length: of the micro-batch.
        held: bytes of activations at the turn from forward to backward, without the outputs.
        outputs: bytes of the logits, and of what the loss holds of them.
        curve: (bytes, gradient elements): bytes in use when so many elements of the parameters'
            gradients are there; only points that no other exceeds in both.
        flops: floating-point operations, forward and backward.
        attention_flops: of them, those of attention's own two products, which grow with the square of the length.
    """

    rows: int
    length: int
    held: int
    outputs: int
    curve: tuple[tuple[int, int], ...]
    flops: int
    attention_flops: int = 0

    def peak(self, gradient_bytes: float, with_first: int = 0) -> int:
        """Return the most bytes in use.

        Args:
            gradient_bytes: that every gradient element so far takes.
            with_first: bytes that are taken when the first gradient comes.
        """
        return max(
            round(used + gradient_bytes * elements + (with_first if elements else 0))
            for used, elements in self.curve
        )

    def scaled(self, rows: int) -> "Trace":
        """Return the trace of another number of rows: activations are in proportion to them."""
        part = rows / self.rows
        return Trace(
            rows=rows,
            length=self.length,
            held=round(self.held * part),
            outputs=round(self.outputs * part),
            curve=tuple((round(used * part), elements) for used, elements in self.curve),
            flops=round(self.flops * part),
            attention_flops=round(self.attention_flops * part),
        )


def deeper(shallow: Trace, deep: Trace, times: float) -> Trace:
    """Return the trace of a model with still more layers, all alike.

    While the last layers go backward the others' activations are all there; while the first ones do, the
    others' gradients are. In between, memory is on the line from one to the other.

    Args:
        shallow, deep: traces of the same model with few layers, and with more.
        times: how many more layers, in units of what `deep` has more than `shallow`.
    """
    held = deep.held - shallow.held
    elements = max(e for _, e in deep.curve) - max(e for _, e in shallow.curve)
    points = {(round(used + times * held), e) for used, e in deep.curve}
    points |= {(used, round(e + times * elements)) for used, e in deep.curve}
    return Trace(
        rows=deep.rows,
        length=deep.length,
        held=round(deep.held + times * held),
        outputs=deep.outputs,
        curve=frontier(points),
        flops=round(deep.flops + times * (deep.flops - shallow.flops)),
        attention_flops=round(
            deep.attention_flops + times * (deep.attention_flops - shallow.attention_flops)
        ),
    )


def frontier(points: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the points that no other exceeds in both coordinates."""
    found: list[tuple[int, int]] = []
    for used, elements in sorted(points, key=lambda point: (-point[1], -point[0])):
        if not found or used > found[-1][0]:
            found.append((used, elements))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A stage's model and its micro-batch.

    Attributes:
        parameters: all, each once.
        visits: for each module that is run in a forward, in order, which parameters it has of its own, if any.
        buffers: bytes of the model's buffers.
        is_converted: whether the weights' files hold another dtype than the model is trained in.
        plain: the micro-batch as it is.
        checkpointed: the same where each layer's activations are computed again in the backward; None if
            the model cannot.
    """

    parameters: tuple[Parameter, ...]
    visits: tuple[tuple[int, ...], ...]
    buffers: int
    plain: Trace
    checkpointed: Trace | None
    is_converted: bool = False

    @property
    def num_trained(self) -> int:
        """Elements of the parameters that are trained."""
        return sum(each.numel for each in self.parameters if each.group is not None)

    @property
    def num_frozen(self) -> int:
        """Elements of the parameters that are not."""
        return sum(each.numel for each in self.parameters if each.group is None)
