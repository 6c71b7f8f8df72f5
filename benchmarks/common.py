"""What all benchmarks share: the clock, the machine, the verdict and the results file."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from launcher.files import write_json

Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Seconds:
    """Processor time of this process (all threads) and wall time, in seconds.

    Processor time is what claims are made of: other processes on the machine stretch the wall
    time of whoever runs beside them.
    """

    cpu: float
    wall: float


@dataclass
class Timings:
    """How long one method took, again and again."""

    seconds: list[tuple[Seconds, int]] = field(default_factory=list)
    """Time of each run, and its items (texts, examples)."""

    def per_item(self, clock: str) -> float:
        """Median milliseconds of `cpu` or `wall` time per item."""
        return 1e3 * median([getattr(spent, clock) / items for spent, items in self.seconds])


@dataclass(frozen=True)
class Claim:
    """A statement that a benchmark confirms or refutes."""

    name: str
    measured: float
    goal: float
    """The least value at which the claim holds; the largest if it is `at_most`."""
    at_most: bool = False
    unit: str = "x"

    @property
    def holds(self) -> bool:
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal

    def line(self) -> str:
        """`claim: measured, goal, holds | falls short`."""
        verdict = "holds" if self.holds else "falls short"
        goal = f"{'at most ' if self.at_most else ''}{self.goal:g}{self.unit}"
        return f"{self.name}: {self.measured:.2f}{self.unit}, goal {goal}, {verdict}"


def timed(work: Callable[[], Result]) -> tuple[Result, Seconds]:
    """What `work` returns, and the time it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, threads, versions, date and command: what the figures depend on."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, "-m", _module_name(), *sys.argv[1:]]),
    }


def conclude(name: str, claims: Sequence[Claim], figures: dict[str, Any]) -> int:
    """Print one line per claim, write `results/<name>.json`; the exit code, 1 if one fails."""
    for claim in claims:
        print(claim.line())
    verdicts = [
        {
            "claim": c.name,
            "measured": c.measured,
            "at_most" if c.at_most else "goal": c.goal,
            "holds": c.holds,
        }
        for c in claims
    ]
    write_json(RESULTS / f"{name}.json", {"claims": verdicts, **figures})
    return 0 if all(claim.holds for claim in claims) else 1


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]
