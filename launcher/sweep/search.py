"""Which points to try, which runs to stop early: Optuna's samplers and pruner, one study for each
arm. The studies live in memory; the trials' files are what a sweep goes on from.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from launcher.sweep.settings import Arm, Dimension, SearchSettings

optuna.logging.set_verbosity(optuna.logging.WARNING)


def grid(arm: Arm) -> list[dict[str, Any]]:
    """Every combination of the listed values, each once, the last key changing fastest."""
    points: list[dict[str, Any]] = [{}]
    for key, dimension in arm.space.items():
        points = list(
            itertools.chain.from_iterable(
                [{**point, key: value} for value in dimension.values or []]
                if dimension.applies(point)
                else [point]
                for point in points
            )
        )
    return points


class Study:
    """The points of one arm."""

    def __init__(self, arm: Arm, search: SearchSettings) -> None:
        self.arm, self.search = arm, search
        self.grid = grid(arm) if search.method == "grid" else []
        self.points = len(self.grid) if self.grid else arm.samples or search.samples
        stopping = search.early_stopping
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if stopping is not None:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=stopping.first_rung, reduction_factor=stopping.reduction
            )
        self.study = optuna.create_study(direction="maximize", pruner=pruner)

    def begin(
        self, number: int, point: dict[str, Any] | None = None
    ) -> tuple[optuna.Trial, dict[str, Any]]:
        """A run at point `number`, or again at `point`, another run's: what to report to, and the
        values."""
        if self.grid:
            point = self.grid[number]
        if point is not None:
            self.study.enqueue_trial({k: _code(self.arm.space[k], v) for k, v in point.items()})
        # Drawn from the number: a resumed sweep draws what an uninterrupted one would.
        seed = self.search.seed * 1_000_003 + number
        self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        if self.search.method == "tpe":
            # Points being computed count as bad ones, so that those beside them differ.
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = self.study.ask()
        values: dict[str, Any] = {}
        for key, dimension in self.arm.space.items():
            if dimension.applies(values):
                values[key] = _suggested(trial, key, dimension)
        return trial, values

    def end(self, trial: optuna.Trial, value: float | None, *, pruned: bool = False) -> None:
        """Tell what came out: a value, or that the run was stopped early, or that it failed."""
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        self.study.tell(trial, value, state=TrialState.PRUNED if pruned else state)


def stops(
    trial: optuna.Trial, looks: Sequence[float], known: int, *, to_the_end: bool = False
) -> bool:
    """Report the dev figures after the first `known`; whether one of them is hopeless, at which it
    ends, unless all are to be reported."""
    hopeless = False
    for number, figure in enumerate(looks, start=1):
        if number > known and (to_the_end or not hopeless):
            trial.report(figure, number)
            hopeless |= trial.should_prune()
    return hopeless


def _suggested(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    if dimension.uniform:
        return trial.suggest_float(key, *dimension.uniform)
    if dimension.log_uniform:
        return trial.suggest_float(key, *dimension.log_uniform, log=True)
    if dimension.integers:
        return trial.suggest_int(key, *dimension.integers)
    assert dimension.values is not None
    names = _names(dimension.values)
    return dimension.values[names.index(trial.suggest_categorical(key, names))]


def _code(dimension: Dimension, value: Any) -> Any:
    if dimension.values is None:
        return value
    return _names(dimension.values)[dimension.values.index(value)]


def _names(values: Sequence[Any]) -> list[str]:
    """Listed values as texts: Optuna takes no lists or mappings, which config keys may be."""
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
