"""Conversations to text, quickly: by joining fixed pieces where a chat template does no more than that.

Most templates write each content as it is, between pieces that depend on the roles alone. For a
sequence of roles the pieces are found by rendering words in the contents' place, and put to the test
with contents that a template may treat in its own way: empty ones, ones that white space surrounds,
ones that hold a string of the template's source. What fails such a test goes through the template, and
so does a sample of the rows of each batch, to be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
import numpy as np

from launcher.errors import DataError
from launcher.tasks import chat
from launcher.tasks.talks import Talks, messages

NUM_COMPARED = 32
MOST_LAYOUTS = 256
_BLANKS = ("", " \n\t", " \n zq\t\n ")

Edges = Sequence[int]
"""Characters where the assistant's parts begin and end, in turn."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Conversations as text.

    Attributes:
        which: of the conversations given, those that the template took.
        texts: their texts.
        edges: the edges in each text; empty if they are not asked for.
    """

    which: list[int]
    texts: list[str]
    edges: list[Edges]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a template writes conversations of one sequence of roles.

    Attributes:
        pattern: the text, with a `%s` for each content.
        edges: for each edge, how many contents precede it, and how many other characters.
        marks: assistant messages, and what ends them in the text (empty: white space alone).
        trims: whether white space around contents, or empty ones, are written otherwise.
        touchy: strings that, in a content, make the template write something else.
    """

    pattern: str
    edges: tuple[tuple[int, int], ...] = ()
    marks: tuple[tuple[int, str], ...] = ()
    trims: bool = False
    touchy: tuple[str, ...] = ()

    def odd(self, contents: Sequence[tuple[str, ...]]) -> set[int]:
        """Return which conversations need the template itself."""
        odd = set()
        flat = list(chain.from_iterable(contents))
        if self.trims and ("" in flat or list(map(str.strip, flat)) != flat):
            odd |= {i for i, texts in enumerate(contents) if any(t != t.strip() or not t for t in texts)}
        if self.touchy:
            everything = "\0".join(flat)
            for string in (string for string in self.touchy if string in everything):
                odd |= {i for i, texts in enumerate(contents) if any(string in t for t in texts)}
        for j, mark in self.marks:
            odd |= {i for i, texts in enumerate(contents) if _hides_end(texts[j], mark)}
        return odd

    def texts(self, contents: Sequence[tuple[str, ...]]) -> list[str]:
        """Return the text of each conversation."""
        return list(map(self.pattern.__mod__, contents))

    def edges_in(self, contents: Sequence[tuple[str, ...]]) -> list[Edges]:
        """Return the edges in the text of each conversation."""
        if not (self.edges and contents):
            return [()] * len(contents)
        sizes = np.fromiter(map(len, chain.from_iterable(contents)), dtype=np.int64).reshape(
            len(contents), -1
        )
        before = np.zeros((len(contents), sizes.shape[1] + 1), dtype=np.int64)
        np.cumsum(sizes, axis=1, out=before[:, 1:])
        num_contents, characters = np.array(self.edges).T
        return (before[:, num_contents] + characters).tolist()


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: with its template set.
        wants_edges: whether to tell the assistant's parts.
    """

    def __init__(self, tokenizer: Any, *, wants_edges: bool) -> None:
        self.render = chat.renderer(tokenizer)
        self.wants_edges = wants_edges
        self.is_plain = True
        self.layouts: dict[tuple[str, ...], Layout | None] = {}
        self.strings = template_strings(tokenizer.get_chat_template())

    def __call__(self, talks: Talks, refuse: Callable[[int, str], None]) -> Rendered:
        """Render conversations; `refuse` is told which the template does not take, and why."""
        count = len(talks.roles)
        texts: list[str | None] = [None] * count
        edges: list[Edges] = [()] * count
        if self.is_plain:
            self._join(talks, texts, edges)
            step = -(-count // NUM_COMPARED) or 1
            self.is_plain = all(
                texts[i] is None or self._agrees(talks.messages(i), texts[i], edges[i])
                for i in range(0, count, step)
            )
        if not self.is_plain:
            texts = [None] * count
        for i in (i for i in range(count) if texts[i] is None):
            try:
                texts[i], edges[i] = self.exact(talks.messages(i))
            except DataError as error:
                refuse(i, str(error))
        which = [i for i, text in enumerate(texts) if text is not None]
        if len(which) < count:
            edges = [edges[i] for i in which]
        return Rendered(which, [text for text in texts if text is not None], edges)

    def exact(self, conversation: list[chat.Message]) -> tuple[str, Edges]:
        """Render one conversation by the template itself.

        Raises:
            DataError: the template refuses it; without the place.
        """
        text = chat.rendered(self.render, conversation, False)
        if not self.wants_edges:
            return text, ()
        return text, list(chain.from_iterable(chat.assistant_spans(self.render, conversation, text)))

    def _join(self, talks: Talks, texts: list[str | None], edges: list[Edges]) -> None:
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, roles in enumerate(talks.roles):
            groups.setdefault(roles, []).append(i)
        for roles, members in groups.items():
            if (layout := self._layout(roles)) is None:
                continue
            odd = layout.odd([talks.contents[i] for i in members])
            if odd or talks.richer:
                members = [i for j, i in enumerate(members) if j not in odd and i not in talks.richer]
            contents = [talks.contents[i] for i in members]
            joined = zip(members, layout.texts(contents), layout.edges_in(contents), strict=True)
            for i, text, places in joined:
                texts[i], edges[i] = text, places

    def _agrees(self, conversation: list[chat.Message], text: str, edges: Edges) -> bool:
        try:
            exact_text, exact_edges = self.exact(conversation)
        except DataError:
            return False
        return exact_text == text and list(exact_edges) == list(edges)

    def _layout(self, roles: tuple[str, ...]) -> Layout | None:
        if roles not in self.layouts:
            if len(self.layouts) >= MOST_LAYOUTS:
                return None
            self.layouts[roles] = self._probe(roles)
        return self.layouts[roles]

    def _probe(self, roles: tuple[str, ...]) -> Layout | None:
        words = tuple(f"zq{j} \n {j}qz" for j in range(len(roles)))
        try:
            text, edges = self.exact(messages(roles, words))
        except DataError:
            return None
        pieces = _pieces(text, words)
        # An assistant who speaks first begins at the first letter, wherever that is in the content.
        if pieces is None or (self.wants_edges and roles[0] == "assistant"):
            return None
        pattern = "%s".join(piece.replace("%", "%%") for piece in pieces)
        layout = Layout(pattern, _relative(edges, words, roles), self._marks(roles, words))
        trims = not all(self._fits(layout, roles, blank, is_thorough=True) for blank in _BLANKS)
        touchy = []
        for string in self.strings:
            bare = string.strip()
            probes = {bare, f"{bare}zq{bare}", f"zq{string}zq"}
            if not trims:
                probes |= {string, f"{string}zq{string}"}
            if bare and not all(self._fits(layout, roles, probe) for probe in probes):
                touchy.append(bare)
        return Layout(pattern, layout.edges, layout.marks, trims, tuple(touchy))

    def _marks(self, roles: tuple[str, ...], words: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
        if not self.wants_edges:
            return ()
        found = []
        for j in (j for j, role in enumerate(roles) if role == "assistant"):
            until = chat.rendered(self.render, messages(roles[: j + 1], words[: j + 1]), False)
            found.append((j, until.rpartition(words[j])[2].rstrip()))
        return tuple(found)

    def _fits(
        self, layout: Layout, roles: tuple[str, ...], content: str, *, is_thorough: bool = False
    ) -> bool:
        contents = (content,) * len(roles)
        joined, conversation = layout.pattern % contents, messages(roles, contents)
        if is_thorough and not layout.odd([contents]):
            return self._agrees(conversation, joined, layout.edges_in([contents])[0])
        try:
            return chat.rendered(self.render, conversation, False) == joined
        except DataError:
            return False


def template_strings(source: str) -> list[str]:
    """Return the strings in a Jinja template's source, which it may look for in a content."""
    tokens = jinja2.Environment().lexer.tokenize(source)
    return sorted({token.value for token in tokens if token.type == "string"})


def _pieces(text: str, words: Sequence[str]) -> list[str] | None:
    """Return what surrounds the words in the text; None if one is not there once, in its turn."""
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found or word in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _relative(edges: Edges, words: Sequence[str], roles: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return (contents before, other characters before) for the edges in a text with these words."""
    turns = [j for j, role in enumerate(roles) if role == "assistant"]
    preceding = [j + k for j in turns for k in (0, 1)][: len(edges)]
    return tuple(
        (count, edge - sum(map(len, words[:count]))) for count, edge in zip(preceding, edges, strict=True)
    )


def _hides_end(content: str, mark: str) -> bool:
    """Return whether the end of this content is told otherwise than by the rule (see `assistant_spans`)."""
    text = content.rstrip()
    if not mark:
        return not text
    return text.endswith(mark[-1]) and (content + mark).endswith(text)
