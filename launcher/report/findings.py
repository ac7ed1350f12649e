"""What a pre-flight found: one line a check, for a terminal, and plain data for a file."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        what: in words; when it is not ok, also what to do.
        figures: what was measured, for a file or a report.
    """

    name: str
    status: Status
    what: str
    figures: dict[str, Any] = field(default_factory=dict)


def lines(findings: list[Finding]) -> list[str]:
    """Return the findings as a table."""
    width = max((len(finding.name) for finding in findings), default=0)
    return [f"{each.status:<8}{each.name:<{width + 2}}{each.what}" for each in findings]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings as plain data."""
    return [asdict(finding) for finding in findings]


def finding(name: str, said: list[tuple[Status, str]], fine: str, figures: Any) -> Finding:
    """Return one finding out of what was said of it: the worst first; `fine` when nothing was said."""
    worst = [what for status, what in said if status == "failed"]
    doubts = [what for status, what in said if status == "warning"]
    status: Status = "failed" if worst else "warning" if doubts else "ok"
    return Finding(name=name, status=status, what="; ".join(worst + doubts) or fine, figures=figures)
