"""The sweep's loop: start runs while there is room, follow them, stop or try again, go on later."""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import ray

from launcher.config import Config, dump_config, parse_config
from launcher.errors import InputError
from launcher.files import write_text
from launcher.sweep import trial as trials
from launcher.sweep.board import Board
from launcher.sweep.search import Study, stops
from launcher.sweep.settings import ResourceSettings, SweepConfig, run_values, sweep_yaml
from launcher.sweep.trial import Attempt, Trial

_POLL_S = 0.5
_SMALLEST_MICRO_BATCH = 64
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory", re.IGNORECASE
)


def run_sweep(sweep: SweepConfig, *, resume: bool) -> list[Trial]:
    """Run every trial that is not over; gives all of them, in order.

    Raises:
        InputError: the folder exists (or, to resume, does not), or no node has what a rank wants.
    """
    with _held(sweep, resume=resume):
        concurrent = _room(sweep.resources)
        driver = _Driver(sweep)
        driver.recall()
        driver.run(concurrent)
        return driver.trials


def planned(sweep: SweepConfig, studies: dict[str, Study]) -> list[Trial]:
    """All trials in the order in which they start: arms in turn, the seeds of a point together."""
    found = []
    for number in range(max(study.points for study in studies.values())):
        for arm, study in studies.items():
            for seed in sweep.seeds if number < study.points else ():
                name = f"{arm}-{number:03d}" + (f"-s{seed}" if len(sweep.seeds) > 1 else "")
                point = study.grid[number] if study.grid else None
                found.append(Trial(name, arm, number, seed, point))
    return found


def make_studies(sweep: SweepConfig) -> dict[str, Study]:
    """The study of each arm."""
    return {name: Study(arm, sweep.search) for name, arm in sweep.arms.items()}


def trial_config(sweep: SweepConfig, trial: Trial) -> Config:
    """The config of a trial's run, with micro batches halved as often as memory ran out."""
    values = run_values(sweep, sweep.arms[trial.arm], trial.name, trial.seed, trial.point or {})
    config = parse_config(values, source=trial.name)
    for section in ("train", "evaluation") if trial.halvings else ():
        settings = getattr(config, section)
        tokens = max(_SMALLEST_MICRO_BATCH, settings.micro_batch_tokens >> trial.halvings)
        update = {"micro_batch_tokens": tokens}
        config = config.model_copy(update={section: settings.model_copy(update=update)})
    return config


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one.

    Raises:
        InputError: there is no cluster at that address.
    """
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"RAY_ADDRESS: no cluster at {address}: {reason}") from None


@dataclass
class _Running:
    trial: Trial
    told: optuna.Trial
    attempt: Attempt


class _Driver:
    """What waits, what runs and what is known, while a sweep lasts."""

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self.folder = sweep.folder / "trials"
        self.studies = make_studies(sweep)
        self.trials = planned(sweep, self.studies)
        self.queue: list[Trial] = []
        self.running: list[_Running] = []

    def recall(self) -> None:
        """Take over what an earlier process has written; a run that was under way waits again."""
        for trial in self.trials:
            file = self.folder / f"{trial.name}.json"
            if file.exists():
                vars(trial).update(json.loads(file.read_text("utf-8")))
            if not trial.over:
                trial.state = "waiting"
                continue
            study = self.studies[trial.arm]
            told, _ = study.begin(trial.number, trial.point)
            # The pruner notes what it knows of each rung when it is asked.
            stops(told, trial.looks, 0, to_the_end=True)
            study.end(told, trial.value, pruned=trial.state == "stopped")

    def run(self, concurrent: int) -> None:
        """Until every trial is over."""
        self.queue = [trial for trial in self.trials if not trial.over]
        self.board = Board(self.sweep, self.trials)
        try:
            while self.queue or self.running:
                while self.queue and len(self.running) < concurrent:
                    self._start(self.queue.pop(0))
                pending = [answer for one in self.running for answer in one.attempt.pending]
                ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
                for one in list(self.running):
                    self._follow(one)
                self.board.show()
        finally:
            for one in self.running:
                trials.kill(one.attempt)
        self.board.close()

    def _start(self, trial: Trial) -> None:
        # The seeds of a point share its values.
        twins = [t.point for t in self.trials if (t.arm, t.number) == (trial.arm, trial.number)]
        known = next((point for point in twins if point is not None), None)
        told, trial.point = self.studies[trial.arm].begin(trial.number, known)
        config, run_dir = self.folder / f"{trial.name}.yaml", self.folder / trial.name
        resumes = (run_dir / "config.yaml").exists()
        if not resumes:
            shutil.rmtree(run_dir, ignore_errors=True)
        write_text(config, dump_config(trial_config(self.sweep, trial)))
        trial.state, trial.looks = "running", []
        trial.attempts += 1
        trial.save(self.folder)
        attempt = trials.ask(self.sweep.resources, config, resumes=resumes)
        self.running.append(_Running(trial, told, attempt))

    def _follow(self, one: _Running) -> None:
        """Move one run on: from its places to its processes, to its end, or to an early one."""
        trial, attempt = one.trial, one.attempt
        _, waiting = ray.wait(attempt.pending, num_returns=len(attempt.pending), timeout=0)
        if waiting and not (attempt.begun and attempt.lost()):
            if attempt.begun and self.sweep.search.early_stopping:
                self._perhaps_stop(one)
            return
        if not attempt.begun:
            try:
                trials.begin(attempt, self.sweep.resources, self.folder)
            except ray.exceptions.RayError as error:
                self._end(one)
                self._failed(trial, f"its place was lost: {' '.join(str(error).split())[:200]}")
            return
        codes, trial.seconds = trials.outcome(attempt)
        trial.looks = trials.dev_looks(self.folder / trial.name)
        if any(codes):
            self._end(one)
            lines = trials.last_lines(self.folder, trial.name, self.sweep.resources.ranks)
            # Wrong input stays wrong.
            shown = ", ".join(map(str, codes))
            self._failed(trial, f"exit codes {shown}\n{lines}", final=2 in codes)
            return
        trial.value = trials.metric(self.folder / trial.name, self.sweep.search)
        self._end(one, trial.value)
        self._over(trial, "finished", f"{trial.value:.3f} in {trial.seconds:.0f} s")

    def _perhaps_stop(self, one: _Running) -> None:
        trial, known = one.trial, len(one.trial.looks)
        trial.looks = trials.dev_looks(self.folder / trial.name)
        if stops(one.told, trial.looks, known):
            self._end(one, pruned=True)
            shown = f"Acc@1 {trial.looks[-1]:.3f} after {len(trial.looks)} looks"
            self._over(trial, "stopped", shown)

    def _end(self, one: _Running, value: float | None = None, *, pruned: bool = False) -> None:
        """Free what an attempt had, and tell the study."""
        trials.kill(one.attempt)
        self.running.remove(one)
        self.studies[one.trial.arm].end(one.told, value, pruned=pruned)

    def _over(self, trial: Trial, state: str, shown: str) -> None:
        trial.state = state
        trial.save(self.folder)
        self._forget_weights()
        self.board.tell(trial, shown)

    def _failed(self, trial: Trial, problem: str, *, final: bool = False) -> None:
        """Try again, with smaller micro batches where memory ran out; or record it as failed."""
        trial.problem = problem
        tokens = trial_config(self.sweep, trial).train.micro_batch_tokens
        if _OUT_OF_MEMORY.search(problem) and tokens > _SMALLEST_MICRO_BATCH:
            trial.halvings += 1
            trial.attempts -= 1
            # Its config changes, so the run begins anew.
            shutil.rmtree(self.folder / trial.name, ignore_errors=True)
            what = f"out of memory: again with micro batches of {tokens // 2} tokens"
            self.board.tell(trial, f"{what}; the global batch stays as it is")
        elif final or trial.attempts > self.sweep.retries:
            self._over(trial, "failed", problem)
            return
        else:
            again = f"attempt {trial.attempts + 1} of {self.sweep.retries + 1}"
            self.board.tell(trial, f"{problem.splitlines()[0]}: {again}")
        trial.state = "waiting"
        trial.save(self.folder)
        self.queue.insert(0, trial)

    def _forget_weights(self) -> None:
        """Remove checkpoints and trained weights of all but the best `keep` runs."""
        ended = [trial for trial in self.trials if trial.over]
        ended.sort(key=lambda trial: -1.0 if trial.value is None else trial.value, reverse=True)
        for trial in ended[self.sweep.keep :]:
            for part in ("checkpoints", "model"):
                shutil.rmtree(self.folder / trial.name / part, ignore_errors=True)


@contextmanager
def _held(sweep: SweepConfig, *, resume: bool) -> Iterator[None]:
    """The sweep's folder, new or found again, for this process alone."""
    file = sweep.folder / "sweep.yaml"
    if resume:
        if not file.exists():
            raise InputError(f"--resume: no sweep in {sweep.folder}; leave --resume out to start")
        if file.read_text("utf-8") != sweep_yaml(sweep):
            raise InputError(f"--resume: the config is not the one that {file} began with")
    elif sweep.folder.exists():
        raise InputError(f"name: {sweep.folder} exists already: give another name, or --resume")
    (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
    with (sweep.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{sweep.folder}: another process runs this sweep now") from None
        write_text(file, sweep_yaml(sweep))
        yield


def _room(resources: ResourceSettings) -> int:
    """How many runs the cluster holds at a time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": resources.cpus_per_rank, "GPU": resources.gpus_per_rank}
    ranks = sum(
        int(min(node.get(kind, 0.0) / amount + 1e-9 for kind, amount in wanted.items() if amount))
        for node in nodes
    )
    if ranks < resources.ranks:
        has = "; ".join(
            ", ".join(f"{node.get(kind, 0.0):g} {kind}" for kind in wanted) for node in nodes
        )
        raise InputError(
            f"resources: no room for {resources.ranks} ranks of {wanted['CPU']:g} CPU and "
            f"{wanted['GPU']:g} GPU each; the nodes have {has}: ask for less, or give Ray more"
        )
    return min(ranks // resources.ranks, resources.max_concurrent or ranks)
