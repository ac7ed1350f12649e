"""What the documents hold: their blocks, commands, links and headings."""

import re
import shlex
from dataclasses import dataclass

from tests.conftest import ROOT

WITH_COMMANDS = [
    "README.md",
    "CONTRIBUTING.md",
    "ds_configs/README.md",
    "cluster/README.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
ALL = ["ARCHITECTURE.md", *WITH_COMMANDS]


_BEGINS = r"(\w+=\S+ )*(launcher|python|make|ray|pip|export|cp|sbatch)\b"
"""What an indented block begins with that is one of commands."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, or an indented one of commands.

    Attributes:
        document: its path below the project's root.
        line: at which it begins.
        kind: what the fence says (bash, yaml, json, python, text); of an indented block `bash`.
        text: without the fence and the indent.
    """

    document: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True, slots=True)
class Line:
    """One command line of a shell block; with its pipes, as a reader types it."""

    block: Block
    text: str

    def __str__(self) -> str:
        return f"{self.block.document}: {self.text[:70]}"

    @property
    def words(self) -> list[str]:
        """The words of the command behind the last pipe, without redirections, assignments and what shells it is in."""
        text = re.split(r"\s[<>]", self.text.split(" | ")[-1])[0]
        words = shlex.split(text, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        return words


def read(document: str) -> str:
    """Return a document's text."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """Return a document's blocks in order."""
    found: list[Block] = []
    lines = read(document).splitlines()
    at = 0
    while at < len(lines):
        if fence := re.match(r"(\s*)```(\w*)", lines[at]):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            indent = len(fence[1])
            text = "\n".join(line[indent:] for line in lines[at + 1 : end])
            found.append(Block(document, at + 1, fence[2], text + "\n"))
            at = end
        elif lines[at].startswith("    ") and at and not lines[at - 1].strip():
            end = next((i for i in range(at, len(lines)) if not lines[i].startswith("    ")), len(lines))
            text = "\n".join(line[4:] for line in lines[at:end])
            kind = "bash" if re.match(_BEGINS, text) else "text"
            found.append(Block(document, at + 1, kind, text + "\n"))
            at = end - 1
        at += 1
    return found


def commands(document: str) -> list[Line]:
    """Return the command lines of a document's shell blocks; loops and continued lines are one each."""
    found = []
    for block in blocks(document):
        if block.kind != "bash":
            continue
        text = block.text.replace("\\\n", " ")
        # What stands in a loop or a group is of it; the shell takes or refuses it whole.
        text = re.sub(r"^for .*?^done$", "for", text, flags=re.DOTALL | re.MULTILINE)
        for line in text.splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(Line(block, line.strip()))
    return found


def headings(document: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^\s*```.*?^\s*```$", "", read(document), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for title in re.findall(r"^#+\s+(.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def links(document: str) -> list[str]:
    """Return the targets of a document's relative links and pictures."""
    text = re.sub(r"^\s*```.*?^\s*```$", "", read(document), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img[^>]*src="([^"]+)"', text)
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]
