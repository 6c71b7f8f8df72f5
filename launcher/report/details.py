"""Each run by itself: its categories, its calibration, its errors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.report import errors, figures, tables
from launcher.report.blocks import Block, Notes, Section, notes
from launcher.report.drawing import draw
from launcher.report.neighbours import Neighbours
from launcher.report.runs import Run
from launcher.report.tables import Cell, Chat, Table

_CONFUSED = 30
"""Categories that a confusion matrix shows at most."""
_OTHERS = "others"


def details_of(runs: Sequence[Run], near: dict[int, Neighbours | None], *, png: bool) -> Section:
    """A part for each run; `near` has the index of training texts by `id` of the examples."""
    parts = [_run(run, place, near, png=png) for place, run in enumerate(runs)]
    if len(parts) == 1:
        return Section("runs", "In detail", parts[0].blocks)
    return Section("runs", "Each run", [], parts)


def _run(run: Run, place: int, near: dict[int, Neighbours | None], *, png: bool) -> Section:
    about = {"Method": run.method, "Prompt": run.prompt, "Folder": run.folder}
    blocks: list[Block] = [Notes([f"{what}: {value}" for what, value in about.items() if value])]
    for split, measured in run.metrics["splits"].items():
        blocks.append(Notes([_summary(split, measured)]))
        blocks.append(_classes(run, split, measured))
        stem = f"{split}_{place + 1}"
        blocks += _confusion(run, split, stem, measured["confusion"], png=png)
        answers = run.answers[split]
        if answers.probabilities is not None and measured["n"]:
            title, painted = f"{split}: reliability, {run.title}", figures.reliability(answers)
            blocks.append(draw(f"reliability_{stem}", title, (4.4, 3.6), painted, png=png))
        if measured["n"]:
            found, lacks = errors.tables_of(run, split, near.get(id(answers.examples)))
            blocks += [*found, *notes(lacks)]
    title = run.title if run.title == run.name else f"{run.title} ({run.name})"
    return Section(f"run-{place + 1}", title, blocks)


def _summary(split: str, measured: dict[str, Any]) -> str:
    ece = measured["ece"]
    known = ece["value"] is not None
    shown = tables.shown(tables.Estimate(ece["value"], *ece["ci95"]) if known else None)
    return (
        f"{split}: {tables.count(measured['n'], 'example')} with a gold label, "
        f"{measured['unlabelled']:,} without; expected calibration error {shown}."
    )


def _classes(run: Run, split: str, measured: dict[str, Any]) -> Table:
    keys = ("precision", "recall", "f1")
    rows: list[list[Cell]] = [
        [Chat(label), *(one[key] for key in keys), one["support"]]
        for label, one in measured["per_class"].items()
    ]
    header = ["category", "precision", "recall", "F1", "examples"]
    caption = f"{split}: precision, recall and F1 per category"
    context = {"run": run.name, "split": split}
    return Table(caption, header, rows, file="classes", context=context)


def _confusion(
    run: Run, split: str, stem: str, confusion: list[list[int]], *, png: bool
) -> list[Block]:
    """The table, and among the files its picture; of many categories the most confused ones."""
    counts, labels = np.array(confusion), run.metrics["labels"]
    columns, caption, about = [*labels, errors.UNMATCHED], f"{split}: confusion", []
    if len(labels) > _CONFUSED:
        wrong = counts.sum(axis=1) - np.diagonal(counts)
        kept = np.sort(np.argsort(-wrong, kind="stable")[:_CONFUSED])
        rest = np.delete(counts[kept, :-1], kept, axis=1).sum(axis=1)
        counts = np.column_stack([counts[np.ix_(kept, kept)], rest, counts[kept, -1]])
        labels = [labels[place] for place in kept.tolist()]
        columns = [*labels, _OTHERS, errors.UNMATCHED]
        about = [f"The {_CONFUSED} categories with the most errors; the others are one column."]
    caption += ", rows gold, columns predicted"
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    table = Table(
        caption,
        ["gold", *columns],
        [[Chat(label), *row] for label, row in zip(labels, counts.tolist(), strict=True)],
        notes=about,
        shades=shares.tolist(),
        file="confusion",
        context={"run": run.name, "split": split},
    )
    if not png or not counts.any():
        return [table]
    size = 2.2 + 0.36 * len(labels)
    title, painted = (
        f"{caption}, % of a row: {run.title}",
        figures.confusion(shares, labels, columns),
    )
    return [table, draw(f"confusion_{stem}", title, (size, size), painted, on_page=False)]
