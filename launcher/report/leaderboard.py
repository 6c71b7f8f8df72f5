"""The leaderboard: one row per config, whose seeds are folded into mean and spread."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report import tables
from launcher.report.history import Cost, cost_of
from launcher.report.runs import Group, Run
from launcher.report.tables import Cell, Estimate, Table, without_empty_columns

DEFINITIONS = (
    "Acc@k, the study's: the share of examples whose one predicted category is among the gold "
    "categories with the at most k largest non-zero shares, where an output that names no "
    "category is wrong.",
    "hit@k, the usual top-k accuracy: the share of examples whose gold category is among the k "
    "categories with the highest scores.",
    "macro-F1 is the mean F1 of the categories; ECE the expected calibration error over 15 bins, "
    "0 at best; unmatched counts the outputs that named no category.",
    "[low, high] is the 95 % interval of the percentile bootstrap over examples; ± is the standard "
    "deviation over seeds, and such a row holds the means over its runs.",
)
_METRICS = {
    "acc@1": "Acc@1",
    "acc@3": "Acc@3",
    "hit@1": "hit@1",
    "hit@3": "hit@3",
    "macro_f1": "macro-F1",
}


@dataclass(frozen=True)
class Entry:
    """Runs of one config with different seeds, by their places in the group."""

    name: str
    places: list[int]


def entries_of(group: Group) -> list[Entry]:
    """Fold runs whose configs differ in name, folder and seed alone.

    A run without a config, and one whose seed was there before, which is no further draw, stay by
    themselves.
    """
    folded: dict[str, list[int]] = {}
    for place, run in enumerate(group.runs):
        key = _key(run)
        same = [group.runs[other].seed for other in folded.get(key, [])]
        alone = not run.config or run.seed in same
        folded.setdefault(f"{place} {key}" if alone else key, []).append(place)
    found = [*folded.values()]
    titles = [group.runs[places[0]].title for places in found]
    sizes = [f" ({len(places)} seeds)" if len(places) > 1 else "" for places in found]
    names = [title + size for title, size in zip(titles, sizes, strict=True)]
    unique = [names.count(name) == 1 for name in names]
    folders = [group.folder_names[places[0]] for places in found]
    return [
        Entry(name if alone else folder + size, places)
        for name, alone, folder, size, places in zip(
            names, unique, folders, sizes, found, strict=True
        )
    ]


def study_table(group: Group) -> Table:
    """The table in the study's form: a row per config in the order given, then the bars to pass."""
    return _table(group, entries_of(group), costs=False)


def leaderboard(group: Group) -> Table:
    """The same with calibration and cost, the best Acc@1 first."""

    def rank(entry: Entry) -> float:
        found = figure(group, entry, "acc@1")
        return -found.value if found else 0.0

    return without_empty_columns(_table(group, sorted(entries_of(group), key=rank), costs=True))


def levels(group: Group) -> Table | None:
    """The same runs with their labels rolled up to coarser ones; None where there are none."""
    rows: list[list[Cell]] = []
    for entry in entries_of(group):
        measured = [group.runs[place].metrics["splits"][group.split] for place in entry.places]
        for level, first in measured[0].get("levels", {}).items():
            found = [one["levels"][level] for one in measured]
            figures = [_estimate([one[key] for one in found]) for key in _METRICS]
            rows.append([entry.name, level, len(first["labels"]), *figures])
    if not rows:
        return None
    return Table(
        f"{group.split}: rolled up to coarser categories",
        ["run", "level", "categories", *_METRICS.values()],
        rows,
        notes=["Probabilities and gold shares of a level's members are added up."],
        file="levels",
        context={"split": group.split},
    )


def figure(group: Group, entry: Entry, key: str) -> Estimate | None:
    """A metric of a row: with its interval, or over seeds mean and standard deviation."""
    runs = [group.runs[place] for place in entry.places]
    return _estimate([run.metrics["splits"][group.split][key] for run in runs])


def _estimate(metrics: Sequence[dict[str, Any]]) -> Estimate | None:
    values = [metric["value"] for metric in metrics]
    if None in values:
        return None
    if len(values) == 1:
        return Estimate(values[0], *metrics[0]["ci95"])
    return Estimate(statistics.fmean(values), sd=statistics.stdev(values))


def _table(group: Group, entries: Sequence[Entry], *, costs: bool) -> Table:
    measured = group.runs[0].metrics["splits"][group.split]
    header = ["run", "prompt", "method", *_METRICS.values()]
    header += ["ECE"] * costs + ["n", "unmatched"]
    if costs:
        header += ["trained", "tokens/s", "peak memory", "wall time", "device"]
    notes = []
    if group.differs:
        notes.append(
            f"Set apart: measured on other {group.differs} than the first table, so figures of the "
            "two must not be compared."
        )
    return Table(
        caption=f"{group.split}: {tables.count(measured['n'], 'example')}, "
        f"{tables.count(len(group.examples.labels), 'category', 'categories')}",
        header=header,
        rows=[_row(group, entry, costs=costs) for entry in entries],
        bars=_bars(measured, len(group.examples.labels), header, "method" if costs else "prompt"),
        notes=notes,
        file="leaderboard",
        context={"split": group.split},
    )


def _row(group: Group, entry: Entry, *, costs: bool) -> list[Cell]:
    runs = [group.runs[place] for place in entry.places]
    first = runs[0]
    title = first.title if len(runs) == 1 else entry.name
    title += " (synthetic data)" if first.synthetic else ""
    keys = [*_METRICS, *(["ece"] if costs else [])]
    figures = [figure(group, entry, key) for key in keys]
    measured = [run.metrics["splits"][group.split] for run in runs]
    unmatched = [one["unmatched"] for one in measured]
    counts: list[Cell] = [measured[0]["n"], unmatched[0]]
    if len(set(unmatched)) > 1:
        mean = statistics.fmean(unmatched)
        counts[1] = tables.Quantity(mean, f"{mean:,.1f}")
    cells: list[Cell] = [title, first.prompt, first.method, *figures, *counts]
    return cells + _costs([cost_of(run) for run in runs]) if costs else cells


def _costs(costs: Sequence[Cost]) -> list[Cell]:
    """Cells of the cost columns, means over seeds; the peak is that of the worst."""

    def over(
        read: Callable[[Cost], float | None], reduce: Callable[[list[float]], float]
    ) -> float | None:
        known = [value for value in map(read, costs) if value is not None]
        return reduce(known) if known else None

    devices = sorted({cost.device for cost in costs if cost.device})
    return [
        tables.parameters(over(lambda cost: cost.trained_parameters, statistics.fmean)),
        tables.rate(over(lambda cost: cost.tokens_per_s, statistics.fmean)),
        tables.memory(over(lambda cost: cost.memory_bytes, max)),
        tables.duration(over(lambda cost: cost.wall_seconds, statistics.fmean)),
        "; ".join(devices) or None,
    ]


def _bars(measured: dict[str, Any], labels: int, header: list[str], about: str) -> list[list[Cell]]:
    """What a constant answer and guessing reach; the column `about` says which they are."""
    rows = []
    for name, bar in measured["bars"].items():
        row: dict[str, Cell] = dict.fromkeys(header)
        row["run"] = "majority class" if name == "majority" else name
        row[about] = f"one of {labels}" if name == "chance" else None
        if name == "majority" and bar:
            row[about] = f"always {bar['label']}"
        row |= {title: (bar or {}).get(key) for key, title in _METRICS.items()}
        row["n"] = measured["n"]
        rows.append([*row.values()])
    return rows


def _key(run: Run) -> str:
    """The resolved config and the data's hashes without what a seed may change."""
    settings = run.config.get("run") or {}
    named = {key: value for key, value in settings.items() if key not in ("name", "dir")}
    parts = [_unseeded({**run.config, "run": named}), run.environment.get("data_sha256")]
    return json.dumps(parts, sort_keys=True, default=str)


def _unseeded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unseeded(inner) for key, inner in value.items() if key != "seed"}
    return [_unseeded(inner) for inner in value] if isinstance(value, list) else value
