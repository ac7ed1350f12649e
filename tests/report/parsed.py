"""A page as a browser's parser sees it."""

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Parsed(HTMLParser):
    """Tags in order, the ids of sections, all text; complains where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]

    def seconds(self) -> Iterator[tuple[str | None, float]]:
        """The ledger's lines, and the whole under None."""
        for tag, attributes in self.tags:
            if tag == "tr" and "data-seconds" in attributes:
                yield attributes.get("data-kind"), float(attributes["data-seconds"] or "nan")
