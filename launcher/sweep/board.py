"""What a sweep tells while it runs: a table that is always there on a terminal, and now and then in
a log."""

import sys
import time
from collections import Counter

from launcher.progress import clock
from launcher.sweep.settings import SweepConfig
from launcher.sweep.trial import Trial

_EVERY_S = 20.0
_ROWS = 12


class Board:
    """Trials, their states, the best, the rate and the time left."""

    def __init__(self, sweep: SweepConfig, every: list[Trial]) -> None:
        self.sweep, self.trials = sweep, every
        self.start = self.last = time.monotonic()
        # Over before this process began: they say nothing of its speed.
        self.before = sum(trial.over for trial in every)
        self.lines = 0
        self.terminal = sys.stderr.isatty()

    def tell(self, trial: Trial, what: str) -> None:
        """A line that stays: something has happened to a trial."""
        self._wipe()
        point = ", ".join(f"{key}={value}" for key, value in (trial.point or {}).items())
        print(f"{trial.name} {trial.state}: {what}  {point}".rstrip(), file=sys.stderr, flush=True)

    def show(self) -> None:
        """The table, if it is time for it."""
        now = time.monotonic()
        if now - self.last >= (1.0 if self.terminal else _EVERY_S):
            self.last = now
            self._print()

    def close(self) -> None:
        """The table for the last time."""
        self._print()

    def _print(self) -> None:
        self._wipe()
        lines = self.table()
        self.lines = len(lines) if self.terminal else 0
        print("\n".join(lines), file=sys.stderr, flush=True)

    def table(self) -> list[str]:
        """The summary, and a row for each run under way."""
        counts = Counter(trial.state for trial in self.trials)
        over = sum(trial.over for trial in self.trials)
        seconds = time.monotonic() - self.start
        done = over - self.before
        left = seconds / done * (len(self.trials) - over) if done else float("inf")
        states = ", ".join(f"{counts[state]} {state}" for state in sorted(counts))
        best = max(
            (trial for trial in self.trials if trial.value is not None),
            key=lambda trial: trial.value or 0.0,
            default=None,
        )
        shown = f"best {self.sweep.search.metric} {best.value:.3f} ({best.name})" if best else ""
        rate = 60 * done / seconds if seconds else 0.0
        head = f"{self.sweep.name}: {over}/{len(self.trials)} over; {states}; {rate:.1f} a minute"
        lines = [", ".join(filter(None, [head, f"{clock(left)} left", shown]))]
        for trial in [t for t in self.trials if t.state == "running"][:_ROWS]:
            look = f"dev Acc@1 {trial.looks[-1]:.3f}" if trial.looks else "no look yet"
            lines.append(f"  {trial.name:24} attempt {trial.attempts}  {look}")
        return lines

    def _wipe(self) -> None:
        """Take the last table off the terminal."""
        if self.lines:
            print(f"\x1b[{self.lines}A\x1b[J", end="", file=sys.stderr)
            self.lines = 0
