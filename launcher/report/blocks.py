"""What a report is made of, whatever form it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.report.drawing import Drawing
from launcher.report.tables import Table


@dataclass(frozen=True)
class Notes:
    """Sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Explorer:
    """The table of all wrong predictions, which the page's script fills."""

    data: list[dict[str, Any]]
    rows: int


Block = Table | Drawing | Notes | Explorer


@dataclass(frozen=True)
class Section:
    """A heading over blocks; `parts` are folded away below it."""

    key: str
    title: str
    blocks: list[Block]
    parts: list["Section"] = field(default_factory=list)


def notes(lines: Sequence[str]) -> list[Block]:
    """The block that says `lines`, if there are any."""
    return [Notes(lines)] if lines else []
