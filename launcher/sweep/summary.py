"""What a sweep leaves: the leaderboard's report, a picture of each arm's space, the best config."""

import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.visualization import matplotlib as pictures

from launcher import report
from launcher.config import dump_config
from launcher.errors import InputError
from launcher.files import replacing, write_text
from launcher.progress import clock
from launcher.sweep.driver import make_studies, planned, trial_config
from launcher.sweep.plan import estimates
from launcher.sweep.settings import SweepConfig, first_point
from launcher.sweep.trial import Trial


def write_summary(sweep: SweepConfig, trials: list[Trial]) -> list[str]:
    """Write `report/`, `best.yaml` and the plots; gives lines that tell what came out.

    Raises:
        InputError: no trial has finished.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        raise InputError(f"{sweep.folder}: no trial has finished; trials/*.json say why")
    folder = sweep.folder / "trials"
    written = report.write_report([folder / t.name for t in finished], sweep.folder / "report")
    name, mean, best = best_point(finished)
    write_text(sweep.folder / "best.yaml", _best_yaml(sweep, best, mean))
    plots = [path for arm in sweep.arms if (path := _picture(sweep, arm, finished)) is not None]
    seeds = f", mean of {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else ""
    lines = [f"best: {name}, {sweep.search.metric} {mean:.3f}{seeds}: {_shown(best.point or {})}"]
    failed = [trial.name for trial in trials if trial.state == "failed"]
    if failed:
        lines.append(f"failed: {', '.join(failed)}; the reasons are in {folder}/NAME.json")
    paths = [sweep.folder / "best.yaml", *plots, *written]
    return [*lines, *map(str, paths)]


def dry_run(sweep: SweepConfig) -> Iterator[str]:
    """Two lines for each run that the sweep would start: its values, and the memory and time that
    the planner expects. What is drawn stands as its range and is planned at its first value."""
    trials = planned(sweep, make_studies(sweep))
    points = [t.point if t.point is not None else first_point(sweep.arms[t.arm]) for t in trials]
    configs = [
        trial_config(sweep, replace(trial, point=point))
        for trial, point in zip(trials, points, strict=True)
    ]
    total, unknown = 0.0, 0
    for trial, (told, seconds) in zip(trials, estimates(configs, sweep.resources), strict=True):
        space = sweep.arms[trial.arm].space
        drawn = {k: d.model_dump(exclude_defaults=True, mode="json") for k, d in space.items()}
        yield f"{trial.name}  {_shown(drawn if trial.point is None else trial.point)}".rstrip()
        yield f"  {told}"
        total += seconds or 0.0
        unknown += seconds is None
    resources = sweep.resources
    yield (
        f"{len(trials)} runs of {resources.ranks} ranks, each rank with "
        f"{resources.cpus_per_rank:g} CPU and {resources.gpus_per_rank:g} GPU; "
        f"{clock(total)} one after another, beside starting up"
        + (f"; {unknown} without an estimate" if unknown else "")
    )


def best_point(finished: list[Trial]) -> tuple[str, float, Trial]:
    """Name and mean metric of the best point, and its first trial; a point some of whose seeds have
    no result is behind those that have them all."""
    points: dict[tuple[str, int], list[Trial]] = {}
    for trial in finished:
        points.setdefault((trial.arm, trial.number), []).append(trial)
    most = max(map(len, points.values()))
    whole = [members for members in points.values() if len(members) == most]
    best = max(whole, key=lambda members: statistics.fmean(t.value or 0.0 for t in members))
    mean = statistics.fmean(trial.value or 0.0 for trial in best)
    return f"{best[0].arm}-{best[0].number:03d}", mean, best[0]


def leaderboard(trials: list[Trial]) -> list[str]:
    """A line for each trial that has finished, the best first."""
    finished = sorted(
        (t for t in trials if t.state == "finished"), key=lambda t: (-(t.value or 0.0), t.name)
    )
    return [f"{t.value:.4f}  {t.name}  {_shown(t.point or {})}".rstrip() for t in finished]


def _best_yaml(sweep: SweepConfig, best: Trial, mean: float) -> str:
    config = trial_config(sweep, best)
    run = config.run.model_copy(update={"name": f"{sweep.name}_best", "dir": sweep.dir.parent})
    config = config.model_copy(update={"run": run})
    command = f"deepspeed --num_accelerators {sweep.resources.ranks} launcher/run.py --config"
    return (
        f"# The best of the sweep {sweep.name}: {sweep.search.split} {sweep.search.metric} "
        f"{mean:.3f}. It was chosen on\n# that split, where its figure is therefore too good.\n"
        f"#   {command} {sweep.folder / 'best.yaml'}\n{dump_config(config)}"
    )


def _picture(sweep: SweepConfig, arm: str, finished: list[Trial]) -> Path | None:
    """Parallel coordinates of an arm's points, where two keys or more vary."""
    of_arm = [trial for trial in finished if trial.arm == arm]
    if len(sweep.arms[arm].space) < 2 or len(of_arm) < 2:
        return None
    study = make_studies(sweep)[arm]
    for trial in of_arm:
        told, _ = study.begin(trial.number, trial.point)
        study.end(told, trial.value)
    path = sweep.folder / f"parallel_{arm}.svg"
    with warnings.catch_warnings():
        # Optuna calls all of its pictures experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = pictures.plot_parallel_coordinate(study.study, target_name=sweep.search.metric)
    figure: Any = axes.figure
    assert isinstance(figure, Figure)
    axes.set_title(f"{sweep.name}: {arm}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight")
    return path


def _shown(point: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in point.items()
    )
