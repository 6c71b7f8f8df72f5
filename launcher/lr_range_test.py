"""The learning-rate range test: train a little while the rate grows, and see where it is too high.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3. Here the
rate grows by a constant factor a step, because useful rates span orders of magnitude.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launcher.errors import InputError
from launcher.files import replacing, write_json

MIN_STEPS = 20
# Half the window of the running median, as a share of the number of losses.
_HALF_WINDOW = 0.04
# In standard deviations of the smoothed loss. Losses that are nothing but noise seem to fall by 5
# in about three tests of a hundred, and to rise by 10 at any of the steps in about one.
_CLEAR_FALL, _CLEAR_RISE = 5.0, 10.0
_LEARNED = 0.95


def learning_rate(lowest: float, highest: float, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps` (at least 2): geometric, both ends included."""
    return lowest * (highest / lowest) ** (step / (steps - 1))


def diverged(losses: Sequence[float]) -> bool:
    """Whether the test can end, by the losses of all steps so far.

    It can once the last loss is not finite, or once the smoothed loss has lost half of its fall
    again and the rise is far above its noise.
    """
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < MIN_STEPS:
        return False
    smoothed, noise = _smoothed(losses)
    lowest = smoothed.min()
    margin = max((smoothed[0] - lowest) / 2, _CLEAR_RISE * noise)
    return bool(smoothed[-1] - lowest > margin)


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The first rate at which the smoothed loss has made 95 % of its fall to its lowest point.

    That is where learning slows down, Smith's sign for the upper bound. The other usual rule, the
    steepest descent, depends on the length of the test: the more steps it has, the earlier the
    model has learned what is easy, at rates far below the best. Where the loss still falls at the
    highest rate tested, the suggestion is a lower bound.

    Args:
        rates: learning rate of each step, ascending.
        losses: loss of each step; what follows the first that is not finite is ignored.

    Raises:
        InputError: there are too few losses, or they don't fall clearly.
    """
    count = _finite(losses)
    if count < MIN_STEPS:
        raise InputError(
            f"train.lr_range_test.steps: {count} steps with a finite loss, at least {MIN_STEPS} "
            "expected: raise it, or lower train.lr_range_test.lowest if the loss diverged"
        )
    smoothed, noise = _smoothed(losses[:count])
    # Not among the last, which are medians of few losses.
    bottom = int(smoothed[: -_half_window(count)].argmin())
    fall = smoothed[0] - smoothed[bottom]
    if fall <= _CLEAR_FALL * noise:
        raise InputError(
            f"train.lr_range_test: the smoothed loss falls by {fall:.3g} between learning rates "
            f"{rates[0]:.3g} and {rates[count - 1]:.3g}, no more than its noise, so no rate can "
            "be suggested: raise train.lr_range_test.steps, or lower "
            "train.lr_range_test.lowest if the loss rises from the first, or else raise "
            "train.lr_range_test.highest"
        )
    learned = smoothed <= smoothed[0] - _LEARNED * fall
    return float(rates[int(learned.argmax())])


def write(folder: Path, rates: Sequence[float], losses: Sequence[float]) -> float:
    """Write `lr_range_test.json` and `lr_range_test.svg` into `folder` and give the suggestion.

    The JSON file holds `rates`, `losses`, `smoothed` and `suggested`; a number that is not finite
    is null.

    Raises:
        InputError: as `suggestion`, with both files written, or because they can't be written.
    """
    try:
        suggested = suggestion(rates, losses)
    except InputError:
        _write_files(folder, rates, losses, None)
        raise
    _write_files(folder, rates, losses, suggested)
    return suggested


def _finite(losses: Sequence[float]) -> int:
    """How many losses come before the first that is not finite."""
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))


def _half_window(count: int) -> int:
    return max(2, round(_HALF_WINDOW * count))


def _smoothed(losses: Sequence[float]) -> tuple[np.ndarray, float]:
    """Running median [steps] of finite losses, and the standard deviation of its noise.

    A median, because losses a million times higher just before the end must not reach back.
    """
    values = np.asarray(losses, dtype=np.float64)
    if len(values) < 2:
        return values, 0.0
    half = _half_window(len(values))
    # NaN at both ends makes the windows there shorter.
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(values, half, constant_values=np.nan), 2 * half + 1
    )
    # Differences of neighbours leave the curve's own shape out. 1.4826 turns the median of
    # absolute deviations into a standard deviation, and a median of n numbers has 1.25 times the
    # standard deviation of their mean.
    single = 1.4826 * np.median(np.abs(np.diff(values))) / math.sqrt(2)
    return np.nanmedian(windows, axis=1), float(1.25 * single / math.sqrt(2 * half + 1))


def _write_files(
    folder: Path, rates: Sequence[float], losses: Sequence[float], suggested: float | None
) -> None:
    count = _finite(losses)
    smoothed = _smoothed(losses[:count])[0].tolist() if count else []
    write_json(
        folder / "lr_range_test.json",
        {
            "rates": list(rates),
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "smoothed": smoothed + [None] * (len(losses) - count),
            "suggested": suggested,
        },
    )
    _draw(folder / "lr_range_test.svg", rates[:count], losses[:count], smoothed, suggested)


def _draw(
    path: Path,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggested: float | None,
) -> None:
    # Imported here: it takes half a second, which a run without the test should not cost.
    import matplotlib
    from matplotlib.figure import Figure

    # The same numbers give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lr_range_test"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_xlabel("learning rate (no unit, log scale)")
        axes.set_ylabel("training loss (nats)")
        axes.plot(rates, losses, ".", color="0.65", label="loss of the step")
        axes.plot(rates, smoothed, color="#1f5a94", label="running median")
        if suggested is not None:
            axes.axvline(
                suggested, color="#b3401a", linestyle="--", label=f"suggested: {suggested:.2g}"
            )
            # Losses of the divergence would flatten the part that tells something.
            lowest, begin = min(losses), smoothed[0]
            highest = min(max(losses), 2 * begin - min(smoothed))
            margin = 0.05 * (highest - lowest)
            axes.set_ylim(lowest - margin, highest + margin)
        axes.legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
