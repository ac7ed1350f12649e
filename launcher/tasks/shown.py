"""What a person sees of a model's answers: short texts, whether they are right, and how telling each is."""

import math
from dataclasses import dataclass
from typing import Any

LONGEST = 400
MOST_WORDS = 40
DOTS = "…"


@dataclass(frozen=True, slots=True)
class Shown:
    """One row, and what the model answered.

    Attributes:
        input: what it was asked.
        expected: a word, a text, a number, or a list of them; None where nothing is known.
        answer: of the same kind; None where there is none.
        is_right: None where an answer is not simply right or wrong.
        score: the higher, the better; the task says of what.
        badness: the higher, the more this row tells about what goes wrong; of no scale.
    """

    input: str
    expected: Any
    answer: Any
    is_right: bool | None = None
    score: float | None = None
    badness: float = 0.0

    def tree(self) -> dict[str, Any]:
        """Return it as JSON, cut to a few hundred characters a text."""
        return {
            "input": cut(self.input),
            "expected": _short(self.expected),
            "answer": _short(self.answer),
            "is_right": self.is_right,
            "score": _short(self.score),
        }


def cut(text: str, longest: int = LONGEST) -> str:
    """Return the begin of a text; dots stand for what is left out."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + DOTS


def end_of(text: str, longest: int = LONGEST) -> str:
    """Return the end of a text; dots stand for what is left out."""
    return text if len(text) <= longest else DOTS + text[1 - longest :].lstrip()


def piece(text: str, wanted: list[str], longest: int) -> str:
    """Return a piece of a text with the first of the wanted ones that it has in the middle; else its begin."""
    found = next((each for each in wanted if each and each in text), "")
    middle = text.find(found) + len(found) // 2
    first = max(0, min(middle - longest // 2, len(text) - longest))
    cut_out = text[first : first + longest].strip()
    return (DOTS if first else "") + cut_out + (DOTS if first + longest < len(text) else "")


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return cut(value.strip())
    if isinstance(value, list):
        return [_short(each) for each in value[:MOST_WORDS]] + ([DOTS] if len(value) > MOST_WORDS else [])
    if isinstance(value, float):
        # JSON has no NaN; more digits than a float32 has mean nothing.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
