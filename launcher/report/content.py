"""What a report says, section by section, whatever form it takes."""

from collections.abc import Sequence

from launcher.report import errors, figures, tables
from launcher.report.blocks import Block, Explorer, Notes, Section, notes
from launcher.report.compare import comparisons
from launcher.report.data import Data, Shelf
from launcher.report.details import details_of
from launcher.report.drawing import Drawing, draw
from launcher.report.history import curve_of
from launcher.report.leaderboard import DEFINITIONS, entries_of, leaderboard, levels
from launcher.report.leaderboard import figure as metric_of
from launcher.report.memes import meme_table
from launcher.report.neighbours import Neighbours
from launcher.report.paper import paper_table
from launcher.report.runs import Examples, Group, Run, groups_of
from launcher.report.slices import Slicing, slicings, table_of
from launcher.report.tables import Table

_MOST_TRAINING_TEXTS = 200_000


def sections_of(
    runs: Sequence[Run], *, against_paper: bool = False, png: bool = True, quick: bool = False
) -> list[Section]:
    """The whole report.

    Args:
        against_paper: with the study's figures beside those of matching configs.
        png: with pictures, for which a font is looked for.
        quick: leave out what is looked up in a very large training set.
    """
    groups, shelf = groups_of(runs), Shelf()
    filled = [group for group in groups if len(group.examples)]
    sources = {id(group): _source(group, shelf, quick=quick) for group in filled}
    near = _near([(group.examples, sources[id(group)][0]) for group in filled])
    sections = [
        _leaderboard(groups, png=png),
        _comparisons(filled),
        _paper(groups) if against_paper else None,
        _curves(runs, groups, png=png),
        _slices(filled, sources, png=png),
        _errors(filled),
        _memes(filled, sources),
        details_of(runs, near, png=png),
    ]
    return [section for section in sections if section is not None and _says_something(section)]


def _says_something(section: Section) -> bool:
    return bool(section.blocks or section.parts)


def _leaderboard(groups: Sequence[Group], *, png: bool) -> Section:
    blocks: list[Block] = []
    for place, group in enumerate(groups):
        blocks.append(leaderboard(group))
        drawing = _accuracy_figure(group, place, png=png)
        rolled_up = levels(group)
        blocks += [block for block in (rolled_up, drawing) if block is not None]
    return Section("leaderboard", "Leaderboard", [*blocks, Notes(DEFINITIONS)])


def _accuracy_figure(group: Group, place: int, *, png: bool) -> Drawing | None:
    rows = []
    for entry in entries_of(group):
        found = metric_of(group, entry, "acc@1")
        if found is None:
            return None
        spread = found.sd or 0.0
        low = found.value - spread if found.low is None else found.low
        high = found.value + spread if found.high is None else found.high
        rows.append((entry.name, found.value, low, high))
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: -row[1])
    bars = group.runs[0].metrics["splits"][group.split]["bars"]
    lines = {"majority": bars["majority"]["acc@1"], "chance": bars["chance"]["acc@1"]}
    height = 1.1 + 0.3 * len(rows)
    title = f"{group.split}: Acc@1 with 95 % intervals (several seeds: ± standard deviation)"
    return draw(_name("accuracy", group, place), title, (7.2, height),
                figures.accuracy(rows, lines), png=png)  # fmt: skip


def _comparisons(groups: Sequence[Group]) -> Section:
    found = [comparisons(group) for group in groups]
    blocks: list[Block] = [table for table in found if table is not None]
    return Section("comparisons", "Paired comparisons", blocks)


def _paper(groups: Sequence[Group]) -> Section:
    table, lacks = paper_table(list(groups))
    blocks: list[Block] = [table] if table.rows else []
    return Section("paper", "Beside the study", [*blocks, *notes(lacks)])


def _curves(runs: Sequence[Run], groups: Sequence[Group], *, png: bool) -> Section:
    names = {id(run): run.title for run in runs}
    for group in groups:
        for entry in entries_of(group):
            names |= {id(group.runs[place]): entry.name for place in entry.places}
    found = [(names[id(run)], curve_of(run)) for run in runs]
    series = [(name, curve.epochs, curve.accuracy) for name, curve in found if curve]
    without = [name for name, curve in found if curve is None]
    if not series:
        return Section("curves", "Learning curves", [])
    title = "Acc@1 on the dev split after each epoch of training"
    drawing = draw("learning_curves", title, (8.2, 3.6),
                   figures.lines(series, "epoch", "Acc@1 on dev"), png=png)  # fmt: skip
    table = Table(
        "Best look at the dev split",
        ["run", "epoch", "Acc@1", "looks"],
        [
            [name, tables.Quantity(best, f"{best:.3g}"), max(curve.accuracy), len(curve.epochs)]
            for name, curve in zip((run.name for run in runs), (c for _, c in found), strict=True)
            if curve
            for best in [curve.epochs[curve.accuracy.index(max(curve.accuracy))]]
        ],
        notes=["On the dev examples that training looks at, which may be fewer than the split's."],
        file="learning_curves",
    )
    lack = [f"Without a curve, because they did not train: {', '.join(dict.fromkeys(without))}."]
    return Section("curves", "Learning curves", [drawing, table, *notes(lack * bool(without))])


def _slices(groups: Sequence[Group], sources: dict[int, tuple[Data, Run]], *, png: bool) -> Section:
    blocks: list[Block] = []
    for place, group in enumerate(groups):
        data, run = sources[id(group)]
        found, lacks = slicings(group.examples, data)
        for slicing in found:
            table = table_of(group, slicing)
            blocks.append(table)
            if slicing.ordered and len(slicing.parts) > 1:
                blocks.append(_slice_figure(group, place, slicing, table, png=png))
        if data.dataset is not None and len(group.runs) > 1:
            lacks = [f"Training set and frequencies are those of {run.name}'s data.", *lacks]
        blocks += notes(lacks)
    return Section("slices", "Where runs are right", blocks)


def _slice_figure(
    group: Group, place: int, slicing: Slicing, table: Table, *, png: bool
) -> Drawing:
    series = []
    for column, name in enumerate(table.header[2:], start=2):
        found = [row[column] for row in table.rows]
        cells = [cell for cell in found if isinstance(cell, tables.Estimate)]
        values = [cell.value for cell in cells]
        low = [c.value - (c.sd or 0) if c.low is None else c.low for c in cells]
        high = [c.value + (c.sd or 0) if c.high is None else c.high for c in cells]
        series.append((name, values, low, high))
    names = [name for name, _ in slicing.parts]
    painted = figures.parts(names, series, slicing.title)
    stem = _name(f"slices_{slicing.key}", group, place)
    return draw(stem, table.caption, (8.2 if len(series) > 1 else 6.2, 3.2), painted, png=png)


def _errors(groups: Sequence[Group]) -> Section:
    data = errors.table_data(groups)
    rows = sum(len(run["rows"]) for group in data for run in group["runs"])
    return Section("errors", "Wrong predictions", [Explorer(data, rows)] if rows else [])


def _memes(groups: Sequence[Group], sources: dict[int, tuple[Data, Run]]) -> Section:
    if not groups:
        return Section("memes", "What the classifier sees", [])
    data, _ = sources[id(groups[0])]
    table, lacks = meme_table(data, groups[0].examples)
    return Section("memes", "What the classifier sees", [*([table] if table else []),
                                                         *notes(lacks)])  # fmt: skip


def _source(group: Group, shelf: Shelf, *, quick: bool) -> tuple[Data, Run]:
    data, run = shelf.of_any(group.runs)
    if quick and data.dataset is not None and "train" in data.dataset.splits:
        size = len(data.dataset.splits["train"])
        if size > _MOST_TRAINING_TEXTS:
            lack = (
                f"the training set has {size:,} texts, too many to be looked through at the end of "
                "a run; python -m launcher.report does it."
            )
            return Data(None, lack), run
    return data, run


def _near(pairs: Sequence[tuple[Examples, Data]]) -> dict[int, Neighbours | None]:
    """The index of training texts by `id` of the examples; None where there is none."""
    known: dict[int, Neighbours | None] = {}
    found = {}
    for examples, data in pairs:
        if id(data) not in known:
            train = data.train()
            known[id(data)] = Neighbours(*train) if train else None
        alike = data.dataset is not None and data.dataset.labels == examples.labels
        found[id(examples)] = known[id(data)] if alike else None
    return found


def _name(stem: str, group: Group, place: int) -> str:
    return f"{stem}_{group.split}" if place == 0 else f"{stem}_{group.split}_{place + 1}"
