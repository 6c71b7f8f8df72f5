"""The report as files: a page that needs nothing else, Markdown, CSV and figures."""

import base64
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from launcher.files import replacing, write_text
from launcher.report import errors
from launcher.report.blocks import Block, Explorer, Notes, Section
from launcher.report.drawing import Drawing
from launcher.report.runs import SYNTHETIC, Run, is_synthetic
from launcher.report.tables import Cell, Chat, Estimate, Quantity, Table, shown, sort_key

_TEMPLATES = Path(__file__).parents[1] / "templates"


def write_page(path: Path, title: str, runs: Sequence[Run], sections: Sequence[Section]) -> Path:
    """Write one HTML file that fetches nothing: style, script, figures and data are inside.

    Its policy allows no script but its own, so that text from data could not run even if it were
    not escaped.
    """
    style, script = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    found = [block for block in _blocks(sections) if isinstance(block, Explorer)]
    text = _render(
        "report.html.jinja",
        title=title,
        runs=runs,
        warning=_warning(runs),
        sections=sections,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_json([explorer.data for explorer in found]),
    )
    write_text(path, text)
    return path


def write_markdown(
    path: Path, title: str, runs: Sequence[Run], sections: Sequence[Section]
) -> Path:
    """Write the tables as Markdown, with links to the figures."""
    text = _render("report.md.jinja", title=title, warning=_warning(runs), sections=sections)
    write_text(path, text.rstrip() + "\n")
    return path


def overview(runs: Sequence[Run], shown_tables: Sequence[Table]) -> str:
    """Tables as Markdown under the warning that synthetic data need."""
    macros: Any = _environment().get_template("report.md.jinja").module
    return macros.overview(_warning(runs), shown_tables).strip() + "\n"


def write_figures(folder: Path, sections: Sequence[Section]) -> None:
    """Write every figure as SVG, and as PNG where it has one."""
    for block in _blocks(sections):
        if isinstance(block, Drawing):
            write_text(folder / f"{block.name}.svg", block.svg)
            if block.png is not None:
                with replacing(folder / f"{block.name}.png") as temporary:
                    temporary.write_bytes(block.png)


def write_csv(folder: Path, runs: Sequence[Run], sections: Sequence[Section]) -> None:
    """Write the tables as CSV, numbers in full; those of one kind go into one file."""
    files: dict[str, list[dict[str, Any]]] = {}
    for block in _blocks(sections):
        if isinstance(block, Table) and block.file:
            rows = files.setdefault(block.file, [])
            for row in [*block.rows, *block.bars]:
                named = zip(block.header, row, strict=True)
                rows.append({**block.context, **dict(_csv_cells(named))})
    for name, rows in files.items():
        header = list(dict.fromkeys(key for row in rows for key in row))
        lines: list[list[Any]] = [[row.get(key) for key in header] for row in rows]
        _write_lines(folder / f"{name}.csv", header, lines)
    header, lines = [], []
    for run in runs:
        for split in run.answers:
            columns = errors.csv_columns(run, split)
            header = list(columns)
            lines += [list(line) for line in zip(*columns.values(), strict=True)]
    _write_lines(folder / "errors.csv", header, lines)


def script_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _csv_cells(named: Any) -> Iterator[tuple[str, Any]]:
    for name, cell in named:
        if not isinstance(cell, Estimate):
            yield name, cell.value if isinstance(cell, Quantity) else cell
            continue
        yield name, cell.value
        for what, value in (("low", cell.low), ("high", cell.high), ("sd", cell.sd)):
            if value is not None:
                yield f"{name} {what}", value


def _write_lines(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def _blocks(sections: Sequence[Section]) -> Iterator[Block]:
    for section in sections:
        yield from section.blocks
        yield from _blocks(section.parts)


def _warning(runs: Sequence[Run]) -> str | None:
    return SYNTHETIC if is_synthetic(runs) else None


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name is not None and ".html." in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tests: Mapping[str, type] = {
        "table": Table, "drawing": Drawing, "notes": Notes, "explorer": Explorer, "chat": Chat,
        "estimate": Estimate, "nothing": type(None),
    }  # fmt: skip
    for name, kind in tests.items():
        environment.tests[name] = lambda value, kind=kind: isinstance(value, kind)
    environment.filters |= {"plain": _plain, "shown": shown, "sort_key": sort_key}
    return environment


def _plain(cell: Cell) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = shown(cell)
    for mark in "\\`*|":
        text = text.replace(mark, "\\" + mark)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
    return " ↵ ".join(text.splitlines())
