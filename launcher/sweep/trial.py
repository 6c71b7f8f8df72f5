"""One run of a sweep: its file, and its ranks as fresh processes in a Ray placement group."""

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.files import write_json
from launcher.sweep.settings import ResourceSettings, SearchSettings

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAST_LINES = 15
_NOTICE_S = 15


@dataclass
class Trial:
    """One point of one arm with one seed; kept as `trials/<name>.json`."""

    name: str
    arm: str
    number: int
    seed: int
    point: dict[str, Any] | None = None
    """Values by config key; None: not drawn yet."""
    state: str = "waiting"
    """waiting, running, finished, stopped (early), failed."""
    attempts: int = 0
    halvings: int = 0
    """How often the micro batch was halved because memory ran out."""
    value: float | None = None
    """The search's metric."""
    looks: list[float] = field(default_factory=list)
    """Dev Acc@1 while it trained."""
    seconds: float = 0.0
    """Wall time of its last attempt, from the first rank's start to the last one's end."""
    problem: str | None = None
    """Why it failed, with its last log lines."""

    @property
    def over(self) -> bool:
        """Whether it is never run again."""
        return self.state in ("finished", "stopped", "failed")

    def save(self, folder: Path) -> None:
        """Write it into the folder of the trials."""
        write_json(folder / f"{self.name}.json", asdict(self))


@dataclass
class Attempt:
    """A trial's processes, asked for or running."""

    group: Any
    config: Path
    resumes: bool
    pending: list[Any]
    """Answers awaited: first the places of the ranks, then their exit codes."""
    begun: bool = False
    broken_s: float | None = None
    """When, on the monotonic clock, a rank was first seen to have failed while others went on."""

    def lost(self) -> bool:
        """Whether a rank has failed and the others have had their time to notice it. Before they
        have met, none of them would for half an hour."""
        ended, going = ray.wait(self.pending, num_returns=len(self.pending), timeout=0)
        if self.broken_s is None and going and any(_code(answer) for answer in ended):
            self.broken_s = time.monotonic()
        return self.broken_s is not None and time.monotonic() - self.broken_s > _NOTICE_S


def ask(resources: ResourceSettings, config: Path, *, resumes: bool) -> Attempt:
    """Ask Ray for a place for each rank; nothing waits."""
    bundle = {"CPU": resources.cpus_per_rank, "GPU": resources.gpus_per_rank}
    bundles = [{k: v for k, v in bundle.items() if v} for _ in range(resources.ranks)]
    group = ray.util.placement_group(bundles, strategy="PACK")
    places = [_on(group, resources, rank, _place).remote() for rank in range(resources.ranks)]
    return Attempt(group, config, resumes, places)


def begin(attempt: Attempt, resources: ResourceSettings, logs: Path) -> None:
    """Start the ranks at their places; the first one's is where they meet."""
    places = ray.get(attempt.pending)
    nodes = Counter(node for node, _, _ in places)
    _, address, port = places[0]
    attempt.pending = []
    for rank, (node, _, _) in enumerate(places):
        environment = {
            "RANK": str(rank),
            # Ray shows each process its own GPUs only.
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(resources.ranks),
            "LOCAL_WORLD_SIZE": str(nodes[node]),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(resources.threads_per_rank),
        }
        if not resources.gpus_per_rank:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        arguments = ["--config", str(attempt.config), *["--resume"] * attempt.resumes]
        log = logs / f"{attempt.config.stem}.rank{rank}.log"
        task = _on(attempt.group, resources, rank, _run_rank)
        attempt.pending.append(task.remote(arguments, environment, str(log)))
    attempt.begun = True


def kill(attempt: Attempt) -> None:
    """End all of its processes and give the resources back; Ray kills what runs in the group, and
    the kernel what those had started."""
    ray.util.remove_placement_group(attempt.group)


def outcome(attempt: Attempt) -> tuple[list[int | str], float]:
    """Exit code of each rank, or why there is none; and the wall time of those that have one."""
    ended, _ = ray.wait(attempt.pending, num_returns=len(attempt.pending), timeout=0)
    codes = [_code(answer) if answer in ended else "still running" for answer in attempt.pending]
    spans = [ray.get(answer)[1:] for answer in ended if isinstance(_code(answer), int)]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    return codes, seconds


def last_lines(logs: Path, name: str, ranks: int) -> str:
    """The end of the log of each rank that says something."""
    shown = []
    for rank in range(ranks):
        file = logs / f"{name}.rank{rank}.log"
        lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
        kept = [line for line in lines if line.strip()][-_LAST_LINES:]
        if kept:
            shown.append(f"rank {rank}: " + "\n".join(kept))
    return "\n".join(shown)


def dev_looks(run_dir: Path) -> list[float]:
    """Dev Acc@1 of each look after the first step, as the run's log has it so far."""
    try:
        lines = (run_dir / "train_log.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return []
    looks = []
    for line in lines:
        try:
            known = json.loads(line)
        except ValueError:
            continue  # Half a line: it is being written.
        if known.get("dev_acc@1") is not None and known["step"] > 0:
            looks.append(float(known["dev_acc@1"]))
    return looks


def metric(run_dir: Path, search: SearchSettings) -> float:
    """The search's metric of a finished run; 0 where it is undefined."""
    measured = json.loads((run_dir / "metrics.json").read_text("utf-8"))
    return float(measured["splits"][search.split][search.metric]["value"] or 0.0)


def _on(group: Any, resources: ResourceSettings, rank: int, function: Any) -> Any:
    return function.options(
        num_cpus=resources.cpus_per_rank,
        num_gpus=resources.gpus_per_rank,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
    )


def _code(answer: Any) -> int | str:
    try:
        return int(ray.get(answer)[0])
    except ray.exceptions.RayError:
        return "lost"


@ray.remote(max_retries=0)
def _place() -> tuple[str, str, int]:
    """Node, address and a free port of wherever this task lies."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    return ray.get_runtime_context().get_node_id(), address, port


@ray.remote(max_retries=0)
def _run_rank(arguments: list[str], own: dict[str, str], log: str) -> tuple[int, float, float]:
    """Run one rank to its end: exit code, and when it started and ended."""
    environment = {k: v for k, v in os.environ.items() if k not in _RENDEZVOUS} | own
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    start = time.time()
    with open(log, "ab") as file:
        # The process inherits the lock: an attempt waits for the processes of the one before it,
        # whose sweep may have been killed a moment ago.
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.run", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        code = process.wait()
    return code, start, time.time()


def _die_with_parent() -> None:
    """Ray ends a cancelled task by killing its worker, which must not leave the rank behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
