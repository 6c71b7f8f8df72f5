"""Tables of typed cells: page, Markdown and CSV are made from the same ones, so they agree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

NONE = "–"


class Chat(str):
    """Text from the data; shown as it is, and as Chinese."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, or a mean over seeds with its standard deviation."""

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    sign: bool = False

    def __str__(self) -> str:
        value, *bounds = (
            NONE if x is None else f"{x:+.3f}" if self.sign else f"{x:.3f}"
            for x in (self.value, self.low, self.high)
        )
        if self.sd is not None:
            return f"{value} ± {self.sd:.3f}"
        return value if self.low is None else f"{value} [{bounds[0]}, {bounds[1]}]"


@dataclass(frozen=True)
class Quantity:
    """A number that is shown with its unit, or otherwise than with three decimals."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


Cell = str | int | float | Estimate | Quantity | None


@dataclass(frozen=True)
class Table:
    """A caption over rows; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    bars: list[list[Cell]] = field(default_factory=list)
    """Rows that stay below the others however they are sorted."""
    notes: Sequence[str] = ()
    shades: list[list[float]] | None = None
    """0 to 1 for each number of each row."""
    file: str | None = None
    """Stem of the CSV file, which may hold several tables."""
    context: dict[str, str] = field(default_factory=dict)
    """What tells the rows of this table from those of others in the same CSV file."""

    @property
    def text_columns(self) -> list[bool]:
        """Which columns hold text."""
        columns = zip(*self.rows, *self.bars, strict=True)
        found = [any(isinstance(cell, str) for cell in column) for column in columns]
        return found or [True] * len(self.header)


def without_empty_columns(table: Table) -> Table:
    """`table` without the columns in which no row has a value."""
    kept = [any(cell is not None for cell in column) for column in zip(*table.rows, strict=True)]
    if not kept or all(kept):
        return table

    def cut(row: Sequence[Cell]) -> list[Cell]:
        return [cell for cell, keep in zip(row, kept, strict=True) if keep]

    header = [name for name, keep in zip(table.header, kept, strict=True) if keep]
    rows, bars = [cut(row) for row in table.rows], [cut(row) for row in table.bars]
    return Table(table.caption, header, rows, bars, table.notes, None, table.file, table.context)


def shown(cell: Cell) -> str:
    """The cell as a reader sees it."""
    if cell is None:
        return NONE
    if isinstance(cell, bool | str | Estimate | Quantity):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"


def sort_key(cell: Cell) -> str | None:
    """The number by which a column is sorted; None where it is sorted by its text."""
    if cell is None or isinstance(cell, str):
        return None
    return f"{cell.value if isinstance(cell, Estimate | Quantity) else cell:.9g}"


def count(number: int, one: str, several: str | None = None) -> str:
    """`1 example`, `2,000 examples`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def parameters(number: float | None) -> Quantity | None:
    """1234567 as `1.23 M`."""
    if number is None:
        return None
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return Quantity(number, f"{number / size:.3g}{unit}")
    return Quantity(number, f"{number:g}")


def memory(number: float | None) -> Quantity | None:
    """Bytes as MiB or GiB."""
    if number is None:
        return None
    small = number < 1 << 30
    unit = "MiB" if small else "GiB"
    return Quantity(number, f"{number / (1 << (20 if small else 30)):.{0 if small else 1}f} {unit}")


def duration(seconds: float | None) -> Quantity | None:
    """Seconds as `12 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds is None:
        return None
    whole = round(seconds)
    if whole < 60:
        return Quantity(seconds, f"{seconds:.2g} s" if seconds < 10 else f"{whole} s")
    if whole < 3600:
        return Quantity(seconds, f"{whole // 60} min {whole % 60} s")
    return Quantity(seconds, f"{whole // 3600} h {whole % 3600 // 60} min")


def rate(number: float | None) -> Quantity | None:
    """A number per second, without decimals."""
    return None if number is None else Quantity(number, f"{number:,.0f}")


def probability(p: float | None) -> Quantity | None:
    """A p-value."""
    if p is None:
        return None
    return Quantity(p, "< 0.001" if p < 0.001 else f"{p:.3f}")
