"""Wrong predictions: which, how sure, what is confused with what, and what the labels say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from launcher.report import tables
from launcher.report.label_errors import label_errors
from launcher.report.neighbours import Neighbours
from launcher.report.runs import Answers, Examples, Group, Run
from launcher.report.tables import Cell, Chat, Table

RANDOM = 5
_CONFIDENT = 15
_PAIRS = 15
_SUSPECTS = 15
_TYPICAL = 3
_TOP = 5
UNMATCHED = "unmatched"

Near = Neighbours | None


def tables_of(run: Run, split: str, near: Near) -> tuple[list[Table], list[str]]:
    """The error tables of one run, and a sentence for each that can't be made."""
    answers = run.answers[split]
    wrong = wrong_rows(answers)
    lacks: list[str] = []
    if not len(wrong):
        return [], [f"{split}: no wrong predictions."]
    context = {"run": run.name, "split": split}

    def listed(caption: str, rows: np.ndarray) -> Table:
        table = Table(f"{split}: {caption}", ["predicted"], [])
        return _listed(answers, rows, answers.predicted[rows], near, table)

    drawn = np.random.default_rng(0).choice(wrong, min(RANDOM, len(wrong)), replace=False)
    found = [listed(f"{RANDOM} errors drawn at random", drawn)]
    found.append(_pairs(answers, wrong, split, context))
    if answers.probabilities is None:
        lacks.append(
            f"{split}: the most confident errors and likely label errors need scores; this run "
            "names a category only."
        )
        return found, lacks
    own = answers.probabilities[wrong, np.maximum(answers.predicted[wrong], 0)]
    sure = wrong[np.argsort(-own, kind="stable")][:_CONFIDENT]
    found.insert(1, listed("most confident errors", sure))
    found.append(_suspects(answers, near, split, context))
    return found, lacks


def wrong_rows(answers: Answers) -> np.ndarray:
    """Rows that are wrong by the study's Acc@1."""
    return np.flatnonzero(~answers.right())


def gold_shown(examples: Examples, row: int, most: int = 3) -> str:
    """The gold label, or the largest shares where there are several."""
    shares, names = examples.shares[row], examples.labels
    present = np.flatnonzero(shares > 0)
    if len(present) < 2:
        return names[int(examples.gold[row])]
    largest = present[np.argsort(-shares[present], kind="stable")]
    parts = [f"{names[label]} {shares[label]:.2f}" for label in largest[:most].tolist()]
    return ", ".join(parts) + (", …" if len(largest) > most else "")


def table_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the page's table of wrong predictions is made of, as compact as JSON allows.

    Probabilities are in units of 1e-4. Texts that no run has wrong are left out.
    """
    return [_group_data(group) for group in groups if len(group.examples)]


def csv_columns(run: Run, split: str) -> dict[str, list[Any]]:
    """Every wrong prediction of a run as columns."""
    answers, rows = run.answers[split], wrong_rows(run.answers[split])
    examples, margins = answers.examples, answers.margins()
    names = [*examples.labels, ""]
    columns: dict[str, list[Any]] = {
        "run": [run.name] * len(rows),
        "split": [split] * len(rows),
        "id": examples.ids[rows].tolist(),
        "text": examples.texts[rows].tolist(),
        "gold": [names[label] for label in examples.gold[rows].tolist()],
        "predicted": [names[label] for label in answers.predicted[rows].tolist()],
        "probability": [None] * len(rows),
        "margin": [None] * len(rows),
    }
    if margins is not None and answers.probabilities is not None:
        own = answers.probabilities[rows, np.maximum(answers.predicted[rows], 0)]
        columns["probability"] = np.round(own.astype(np.float64), 4).tolist()
        columns["margin"] = np.round(margins[rows].astype(np.float64), 4).tolist()
    return columns


def _group_data(group: Group) -> dict[str, Any]:
    examples = group.examples
    wrong = [wrong_rows(one) for one in group.answers()]
    used = np.unique(np.concatenate(wrong))
    spread = (examples.shares[used] > 0).sum(axis=1) > 1
    return {
        "split": group.split,
        "labels": list(examples.labels),
        "n": len(examples),
        "texts": examples.texts[used].tolist(),
        "gold": examples.gold[used].tolist(),
        "shares": [
            _flat_top(examples.shares[row]) if several else 0
            for row, several in zip(used.tolist(), spread.tolist(), strict=True)
        ],
        "runs": [
            _run_data(name, one, rows, np.searchsorted(used, rows))
            for name, one, rows in zip(group.names, group.answers(), wrong, strict=True)
        ],
    }


def _run_data(name: str, answers: Answers, rows: np.ndarray, places: np.ndarray) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": name,
        "rows": places.tolist(),
        "predicted": answers.predicted[rows].tolist(),
    }
    if answers.probabilities is not None:
        p = np.rint(answers.probabilities[rows] * 1e4).astype(np.int64)
        best = np.argsort(-p, axis=1, kind="stable")[:, :_TOP]
        pairs = np.stack([best, np.take_along_axis(p, best, axis=1)], axis=2)
        line = np.arange(len(rows))
        data["top"] = pairs.reshape(-1).tolist()
        data["width"] = best.shape[1]
        data["own"] = p[line, np.maximum(answers.predicted[rows], 0)].tolist()
        data["gold"] = p[line, answers.examples.gold[rows]].tolist()
    return data


def _flat_top(shares: np.ndarray) -> list[int]:
    best = np.argsort(-shares, kind="stable")[:_TOP]
    return [
        value
        for label in best.tolist()
        if shares[label] > 0
        for value in (label, round(float(shares[label]) * 1e4))
    ]


def _listed(
    answers: Answers,
    rows: np.ndarray,
    said: np.ndarray,
    near: Near,
    table: Table,
) -> Table:
    """`table` filled with the texts `rows`, for each of which the label `said` is held to be."""
    examples, names = answers.examples, [*answers.examples.labels, UNMATCHED]
    header = ["text", "gold", *table.header]
    header += ["its p", "p gold"] if answers.probabilities is not None else []
    header += ["nearest training texts"] if near else []
    for row, label in zip(rows.tolist(), said.tolist(), strict=True):
        text = str(examples.texts[row])
        line: list[Cell] = [Chat(text), Chat(gold_shown(examples, row)), Chat(names[label])]
        if answers.probabilities is not None:
            p = answers.probabilities[row]
            line += [float(p[label]) if label >= 0 else None, float(p[int(examples.gold[row])])]
        if near:
            found = near.nearest(text)
            line.append(
                Chat("；".join(f"{other}（{_label(names, own)}）" for other, own, _ in found))
            )
        table.rows.append(line)
    return replace(table, header=header)


def _label(names: Sequence[str], label: int) -> str:
    return names[label] if label >= 0 else tables.NONE


def _pairs(answers: Answers, wrong: np.ndarray, split: str, context: dict[str, str]) -> Table:
    """Gold and predicted categories that are most often confused, with typical texts."""
    examples, names = answers.examples, [*answers.examples.labels, UNMATCHED]
    labels = len(examples.labels)
    gold = examples.gold[wrong]
    predicted = np.where(answers.predicted[wrong] < 0, labels, answers.predicted[wrong])
    cells = gold * (labels + 1) + predicted
    kinds, counts = np.unique(cells, return_counts=True)
    support = np.bincount(examples.gold, minlength=labels)
    margins = answers.margins()
    rows: list[list[Cell]] = []
    for place in np.argsort(-counts, kind="stable")[:_PAIRS].tolist():
        from_label, to_label = divmod(int(kinds[place]), labels + 1)
        members = wrong[cells == kinds[place]]
        if margins is not None:
            # Those of a middling margin: neither close calls nor the strangest.
            distance = np.abs(margins[members] - np.median(margins[members]))
            members = members[np.argsort(distance, kind="stable")]
        texts = "；".join(str(text) for text in examples.texts[members[:_TYPICAL]])
        share = float(counts[place] / support[from_label])
        rows.append(
            [Chat(names[from_label]), Chat(names[to_label]), int(counts[place]), share, Chat(texts)]
        )
    header = ["gold", "predicted", "errors", "share of gold", "typical texts"]
    return Table(
        f"{split}: most confused pairs", header, rows, file="confused_pairs", context=context
    )


def _suspects(answers: Answers, near: Near, split: str, context: dict[str, str]) -> Table:
    examples = answers.examples
    assert answers.probabilities is not None
    found = label_errors(examples.gold, answers.probabilities)
    shown = found.suspects[:_SUSPECTS]
    note = (
        f"Confident learning (Northcutt et al. 2021) takes {100 * found.share:.1f} % of the labels "
        f"for wrong; {tables.count(len(found.suspects), 'suspect')}, the surest first. A weak "
        "model's own confusions look like label errors too: read the texts."
    )
    table = Table(
        f"{split}: likely label errors",
        ["likely"],
        [],
        notes=[note],
        file="label_errors",
        context=context,
    )
    return _listed(answers, shown, found.suggested[:_SUSPECTS], near, table)
