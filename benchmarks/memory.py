"""What a command and all the processes that it starts hold in memory, sampled from outside."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

GIB = 2**30
INTERVAL_S = 0.2


@dataclass
class Usage:
    """A finished command.

    Proportional set sizes: of a page that several processes map, each is charged its share, so the
    sum over processes counts every page once, those of mapped files included.
    """

    seconds: float
    cpu_seconds: float
    """Of the command and those of its children that it waited for."""
    peak: int
    """Bytes of all processes together, at the fullest moment that was sampled."""
    private_peak: int
    """The same without pages of files, which the system can take back when it needs their room."""
    ranks: list[int] = field(default_factory=list)
    """Bytes of each process at its own fullest moment, the largest first."""
    output: str = ""


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Usage:
    """Run a command to its end.

    Raises:
        RuntimeError: its exit code is not 0; holds the end of what it printed.
    """
    before, begun = _children_cpu(), time.monotonic()
    with (
        (folder / "output.txt").open("w+b") as output,
        subprocess.Popen(
            command, env={**environment}, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        watch = _Watch(process.pid)
        code = process.wait()
        watch.stop()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{text[-3000:]}")
    seconds = time.monotonic() - begun
    cpu = _children_cpu() - before
    ranks = sorted(watch.largest.values(), reverse=True)
    return Usage(seconds, cpu, watch.peak, watch.private_peak, ranks, text)


class _Watch:
    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.peak = self.private_peak = 0
        self.largest: dict[int, int] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.ended.wait(INTERVAL_S):
            total = private = 0
            try:
                processes = [self.root, *self.root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in processes:
                own, anonymous = _proportional(process.pid)
                total, private = total + own, private + anonymous
                self.largest[process.pid] = max(own, self.largest.get(process.pid, 0))
            self.peak = max(self.peak, total)
            self.private_peak = max(self.private_peak, private)


def _proportional(pid: int) -> tuple[int, int]:
    """Bytes that a process is charged, and those of them behind which there is no file."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # it has ended
        return 0, 0
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0)


def _children_cpu() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)
