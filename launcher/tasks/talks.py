"""Rows of chat or instruction data as conversations, checked column by column."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from launcher.errors import DataError
from launcher.tasks import base, chat

if TYPE_CHECKING:
    from launcher.data.source import Rows


@dataclass(frozen=True, slots=True)
class Talks:
    """Conversations.

    Attributes:
        rows: the index of each in the rows that it is from.
        roles: the role of every message of each.
        contents: the text of every message of each.
        richer: the messages of those that hold more than roles and contents, by position.
    """

    rows: Sequence[int]
    roles: list[tuple[str, ...]]
    contents: list[tuple[str, ...]]
    richer: dict[int, list[chat.Message]] = field(default_factory=dict)

    def messages(self, i: int) -> list[chat.Message]:
        """Return the messages of one conversation."""
        return self.richer[i] if i in self.richer else messages(self.roles[i], self.contents[i])


def messages(roles: Sequence[str], contents: Sequence[str]) -> list[chat.Message]:
    """Return messages of these roles and contents."""
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def from_messages(rows: "Rows", name: str, reject: base.Reject) -> Talks:
    """Read a column of message lists; rows of another shape are rejected."""
    values, kept = rows.columns[name], list(range(len(rows.columns[name])))
    if not _are_simple(values):
        values, kept = _checked(rows, values, reject)
    flat = list(chain.from_iterable(values))
    sizes = list(map(len, values))
    roles = iter(list(map(itemgetter("role"), flat)))
    contents = iter(list(map(itemgetter("content"), flat)))
    richer = {}
    if set(map(len, flat)) - {2}:
        richer = {i: value for i, value in enumerate(values) if any(len(message) > 2 for message in value)}
    return Talks(
        rows=kept,
        roles=[tuple(islice(roles, size)) for size in sizes],
        contents=[tuple(islice(contents, size)) for size in sizes],
        richer=richer,
    )


def from_instructions(
    rows: "Rows", instruction: str, output: str, context: str | None, reject: base.Reject
) -> Talks:
    """Read columns of instructions, answers and perhaps contexts; rows without text are rejected."""
    bad: set[int] = set()
    questions = base.texts(rows, instruction, reject, bad)
    answers = base.texts(rows, output, reject, bad)
    if context:
        contexts = _contexts(rows, context, reject, bad)
        pairs = zip(questions, contexts, strict=True)
        questions = [f"{question}\n\n{extra}" if extra else question for question, extra in pairs]
    contents = list(zip(questions, answers, strict=True))
    kept = list(range(len(contents)))
    if bad:
        kept = [i for i in kept if i not in bad]
        contents = [contents[i] for i in kept]
    return Talks(kept, [("user", "assistant")] * len(kept), contents)


def _contexts(rows: "Rows", name: str, reject: base.Reject, bad: set[int]) -> list[Any]:
    # A context may be absent, and a number is as good as a text: only broken text is refused.
    values = rows.columns[name]
    if not base.are_texts([value for value in values if isinstance(value, str)]):
        for i, value in enumerate(values):
            if i not in bad and isinstance(value, str) and (fault := base.text_fault(value)):
                bad.add(i)
                reject(rows.where(i), f'column "{name}" is {fault}: fill it in or remove the row')
    return values


def _are_simple(values: list[Any]) -> bool:
    """Return whether all are lists of messages with text under role and content, and nothing is null."""
    if not set(map(type, values)) <= {list} or not all(values):
        return False
    flat = list(chain.from_iterable(values))
    if not set(map(type, flat)) <= {dict}:
        return False
    try:
        texts = list(map(itemgetter("role"), flat)) + list(map(itemgetter("content"), flat))
    except KeyError:
        return False
    has_nulls = bool(set(map(len, flat)) - {2}) and any(None in message.values() for message in flat)
    return not has_nulls and base.are_texts(texts)


def _checked(
    rows: "Rows", values: list[Any], reject: base.Reject
) -> tuple[list[list[chat.Message]], list[int]]:
    good, kept = [], []
    for i, value in enumerate(values):
        try:
            good.append(chat.check_messages(value))
        except DataError as error:
            reject(rows.where(i), str(error))
        else:
            kept.append(i)
    return good, kept
