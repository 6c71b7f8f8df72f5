"""What the figures show; each function gives what `drawing.draw` paints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.report.drawing import ACCENT, LINE, QUIET, Draw
from launcher.report.runs import Answers
from launcher.report.slices import wilson

# Told apart by people who see colours differently, too (after Okabe and Ito 2008), and by marks.
COLOURS = (ACCENT, "#c8590a", "#0b8a66", "#b8468f", "#8a6d00", "#3f9bd1", "#7a5fc0", "#b3261e")
_MARKS = "osD^vPX*"
_BINS = 15


def accuracy(rows: Sequence[tuple[str, float, float, float]], bars: dict[str, float]) -> Draw:
    """Acc@1 of each row with its interval, and the bars to pass."""

    def paint(axes: Any) -> None:
        for place, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2, alpha=0.55)
            axes.plot(value, place, "o", color=COLOURS[0], markersize=5.5)
        for place, (name, value) in enumerate(bars.items()):
            style = (0, (2 + 3 * place, 2))
            axes.axvline(value, color=QUIET, linewidth=1, linestyle=style, label=name)
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("Acc@1")
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return paint


def lines(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str) -> Draw:
    """Curves over a common axis; series of one name are one kind, drawn alike."""

    def paint(axes: Any) -> None:
        names = list(dict.fromkeys(name for name, *_ in series))
        told: set[str] = set()
        for name, xs, ys in series:
            place = names.index(name)
            label = None if name in told else _short(name)
            told.add(name)
            axes.plot(
                xs, ys, color=COLOURS[place % 8], marker=_MARKS[place % 8], markersize=4,
                linewidth=1.6, linestyle=("-", "--", ":")[place // 8 % 3], label=label,
            )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        _legend(axes, len(names))

    return paint


def parts(
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float], Sequence[float], Any]],
    x: str,
) -> Draw:
    """Accuracy on parts in order, for each row (name, value, low and high), side by side."""

    def paint(axes: Any) -> None:
        step = 0.6 / max(1, len(series))
        for place, (name, values, low, high) in enumerate(series):
            at = np.arange(len(names)) + (place - (len(series) - 1) / 2) * step
            colour = COLOURS[place % 8]
            axes.vlines(at, low, high, color=colour, linewidth=1.6, alpha=0.5)
            axes.plot(
                at, values, color=colour, marker=_MARKS[place % 8], markersize=4.5,
                linewidth=0.8, alpha=0.9, label=_short(name),
            )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(x)
        axes.set_ylabel("Acc@1")
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        _legend(axes, len(series))

    return paint


def reliability(answers: Answers) -> Draw:
    """How often the best label is right over how probable it was held (Guo et al. 2017), with the
    95 % interval of each bin."""
    assert answers.probabilities is not None
    confidence = answers.probabilities.max(axis=1)
    right = answers.probabilities.argmax(axis=1) == answers.examples.gold
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    kept = np.flatnonzero(counts)
    sure = np.bincount(bins, weights=confidence, minlength=_BINS)[kept] / counts[kept]
    hits = np.bincount(bins, weights=right, minlength=_BINS)[kept]
    shares = [wilson(int(hit), int(n)) for hit, n in zip(hits, counts[kept], strict=True)]

    def paint(axes: Any) -> None:
        edges = (np.arange(_BINS) + 0.5) / _BINS
        axes.bar(edges, counts / len(bins), width=0.9 / _BINS, color=LINE, label="of all examples")
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        low, high = [one.low for one in shares], [one.high for one in shares]
        axes.vlines(sure, low, high, color=COLOURS[0], linewidth=1.6, alpha=0.55)
        axes.plot(sure, [one.value for one in shares], "o", color=COLOURS[0], markersize=4.5,
                  label="right")  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability of the best label")
        axes.set_ylabel("share")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    return paint


def confusion(shares: np.ndarray, labels: Sequence[str], columns: Sequence[str]) -> Draw:
    """Shares of each gold label's examples by what was predicted, [labels, columns]."""
    rows, names = [*map(_short, labels)], [*map(_short, columns)]

    def paint(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        ramp = LinearSegmentedColormap.from_list("blues", ["#f4f7fb", COLOURS[0]])
        axes.imshow(shares, cmap=ramp, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
        small = 9 if len(labels) <= 12 else 7.5
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=small)
        axes.set_yticks(range(len(rows)), rows, fontsize=small)
        axes.set_xlabel("predicted")
        axes.set_ylabel("gold")
        axes.tick_params(length=0)
        if len(labels) <= 12:
            for row, column in np.ndindex(*shares.shape):
                colour = "#ffffff" if shares[row, column] > 0.55 else "#1c2025"
                percent = f"{100 * shares[row, column]:.0f}"
                axes.text(column, row, percent, ha="center", va="center", fontsize=8, color=colour)

    return paint


def _legend(axes: Any, count: int) -> None:
    if count > 1:
        axes.legend(
            frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0
        )


def _short(name: str, most: int = 40) -> str:
    plain = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split()))
    return plain if len(plain) <= most else plain[: most - 1] + "…"
