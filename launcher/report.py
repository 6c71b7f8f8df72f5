"""Compare runs: `python -m launcher.report RUN... --out DIR` writes `report.md` and `report.html`.

Everything shown is derived anew from the runs' predictions, so it is never out of date. Both files
are rendered from the same tables, so they can't disagree.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from launcher.errors import InputError
from launcher.files import replacing
from launcher.metrics import summarise
from launcher.predictions import Predictions, prediction_files, read_predictions

SYNTHETIC = "Synthetic data: figures show that the tool works, not how good a method is."
DEFINITIONS = (
    "Acc@k, the study's: the share of examples whose one predicted category is among the gold "
    "categories with the at most k largest non-zero shares, where an output that names no "
    "category is wrong.",
    "hit@k, the usual top-k accuracy: the share of examples whose gold category is among the k "
    "categories with the highest scores.",
    "macro-F1 is the mean F1 of the categories; [low, high] is the 95 % interval of the "
    "percentile bootstrap over examples; unmatched counts the outputs that named no category.",
)
_COLUMNS = ("acc@1", "acc@3", "hit@1", "hit@3", "macro_f1")
_NAMES = ["Acc@1", "Acc@3", "hit@1", "hit@3", "macro-F1"]
_NONE = "–"


@dataclass(frozen=True)
class _Run:
    folder: Path
    title: str
    prompt: str
    method: str
    synthetic: bool
    metrics: dict[str, Any]  # the content of metrics.json
    examples: dict[str, str]  # split to a digest of its ids and gold labels


@dataclass(frozen=True)
class _Table:
    caption: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1
    notes: Sequence[str] = ()
    shades: list[list[float]] | None = None  # 0 to 1 per number


@dataclass(frozen=True)
class _Section:
    title: str
    tables: list[_Table]
    lines: Sequence[str] = ()
    folded: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.report", description="Compare runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        for path in write_report(arguments.runs, arguments.out):
            print(path)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_report(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """Write `report.md` and `report.html` into `out`; the same runs give the same bytes.

    Runs are compared in one table only where labels, split, ids and gold labels are the same.

    Raises:
        InputError: a run is missing, unfinished, without predictions or unreadable.
    """
    runs = _read_runs(run_dirs)
    names = ("report.md", "report.html")
    return [_render(out / name, "Comparison of runs", runs) for name in names]


def write_run_report(run_dir: Path) -> Path:
    """Write the run's own `report.html`; raises InputError as `write_report` does."""
    runs = _read_runs([run_dir])
    return _render(run_dir / "report.html", runs[0].title, runs)


def prompts_table(run_dirs: Sequence[Path]) -> str:
    """The table in the study's form as Markdown: one row per run, then the bars to pass."""
    runs = _read_runs(run_dirs)
    macros: Any = _templates().get_template("report.md.jinja").module
    return macros.overview(_warning(runs), _prompts_tables(runs)).strip() + "\n"


def _read_runs(run_dirs: Sequence[Path]) -> list[_Run]:
    return [_read_run(folder) for folder in dict.fromkeys(run_dirs)]


def _read_run(folder: Path) -> _Run:
    files = prediction_files(folder)
    predictions = {split: read_predictions(path) for split, path in files.items()}
    config = _mapping(folder / "config.yaml", yaml.safe_load)
    row = _mapping(folder / "report_row.json", json.loads)
    prompt = config.get("prompt") or {}
    template = prompt.get("template")
    question = template if isinstance(template, dict) else prompt
    metrics = summarise(predictions)
    return _Run(
        folder=folder,
        title=str(row.get("title") or folder.absolute().name),
        prompt=str(row.get("prompt") or question.get("question") or _NONE),
        method=str(row.get("method") or config.get("method") or _NONE),
        synthetic=any(known.get("synthetic") is True for known in (row, metrics["provenance"])),
        metrics=metrics,
        examples={split: _digest(one) for split, one in predictions.items()},
    )


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected keys and values, seen {type(value).__name__}")
    return value


def _digest(one: Predictions) -> str:
    order = one.ids.argsort()
    digest = hashlib.sha256("\0".join(one.ids[order]).encode())
    digest.update(one.labels[order].tobytes() + one.distributions[order].tobytes())
    return digest.hexdigest()


def _prompts_tables(runs: Sequence[_Run]) -> Iterator[_Table]:
    """One table per set of examples; runs that can't be compared never share one."""
    groups: dict[tuple[str, tuple[str, ...], str], list[_Run]] = {}
    for run in runs:
        for split, digest in run.examples.items():
            groups.setdefault((split, tuple(run.metrics["labels"]), digest), []).append(run)
    first = next(iter(groups))
    kinds = ("split", "labels", "examples or gold labels")
    for key, members in groups.items():
        split, labels, _ = key
        # The first difference only: with other labels the gold labels differ anyway.
        differs = [kind for kind, a, b in zip(kinds, first, key, strict=True) if a != b][:1]
        measured = members[0].metrics["splits"][split]
        rows = [_overview_row(run, run.metrics["splits"][split]) for run in members]
        yield _Table(
            caption=f"{split}: {measured['n']:,} examples, {len(labels)} categories",
            header=["run", "prompt", "method", *_NAMES, "n", "unmatched"],
            rows=rows + _bar_rows(measured, len(labels)),
            text_columns=3,
            notes=[
                f"Set apart: measured on other {kind} than the first table, so figures of the two "
                "must not be compared."
                for kind in differs
            ],
        )


def _overview_row(run: _Run, measured: Mapping[str, Any]) -> list[str]:
    title = run.title + (" (synthetic data)" if run.synthetic else "")
    counts = [f"{measured[key]:,}" for key in ("n", "unmatched")]
    return [title, run.prompt, run.method, *(_metric(measured[key]) for key in _COLUMNS), *counts]


def _bar_rows(measured: Mapping[str, Any], count: int) -> list[list[str]]:
    rows = []
    for name, bar in measured["bars"].items():
        what = f"one of {count}" if name == "chance" else f"always {bar['label']}" if bar else _NONE
        title = "majority class" if name == "majority" else name
        values = [_number((bar or {}).get(key)) for key in _COLUMNS]
        rows.append([title, what, _NONE, *values, f"{measured['n']:,}", _NONE])
    return rows


def _run_section(run: _Run, folded: bool) -> _Section:
    name, labels = run.folder.absolute().name, run.metrics["labels"]
    tables, lines = [], [f"Method: {run.method}.", f"Prompt: {run.prompt}"]
    for split, measured in run.metrics["splits"].items():
        lines.append(
            f"{split}: {measured['n']:,} examples with a gold label, {measured['unlabelled']:,} "
            f"without; expected calibration error {_metric(measured['ece'])}."
        )
        keys = ("precision", "recall", "f1")
        scores = [
            [label, *(_number(one[key]) for key in keys), f"{one['support']:,}"]
            for label, one in measured["per_class"].items()
        ]
        header = ["category", "precision", "recall", "F1", "examples"]
        tables.append(_Table(f"{split}: precision, recall and F1 per category", header, scores))
        tables.append(_confusion_table(split, labels, measured["confusion"]))
    title = run.title if run.title == name else f"{run.title} ({name})"
    return _Section(title, tables, lines, folded)


def _confusion_table(split: str, labels: list[str], confusion: list[list[int]]) -> _Table:
    return _Table(
        caption=f"{split}: confusion, rows gold, columns predicted",
        header=["gold", *labels, "unmatched"],
        rows=[
            [label, *(f"{cell:,}" for cell in row)]
            for label, row in zip(labels, confusion, strict=True)
        ],
        shades=[[cell / max(1, sum(row)) for cell in row] for row in confusion],
    )


def _metric(metric: Mapping[str, Any]) -> str:
    if metric["value"] is None:
        return _NONE
    low, high = metric["ci95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    for mark in "\\`*|":
        text = text.replace(mark, "\\" + mark)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
    return " ↵ ".join(text.splitlines())


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and ".html." in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _plain
    return environment


def _render(path: Path, title: str, runs: Sequence[_Run]) -> Path:
    """Write the report on `runs` in the form that the suffix of `path` names."""
    overview = _Section("Prompts and methods", list(_prompts_tables(runs)), DEFINITIONS)
    sections = [overview, *(_run_section(run, folded=len(runs) > 1) for run in runs)]
    template = _templates().get_template(f"report{path.suffix}.jinja")
    text = template.render(title=title, warning=_warning(runs), sections=sections)
    with replacing(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _warning(runs: Sequence[_Run]) -> str | None:
    return SYNTHETIC if any(run.synthetic for run in runs) else None


if __name__ == "__main__":
    sys.exit(main())
