"""Progress of long work: how much is done, how fast, how much time is left."""

import sys
import time


class Progress:
    """Prints a line now and then, on rank 0 only: on one line, or every 10 s in a log."""

    def __init__(self, title: str, total: int, unit: str, *, rank: int = 0, done: int = 0) -> None:
        self.title, self.total, self.unit, self.rank = title, total, unit, rank
        self.done = self.begun_at = done
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.interval_s = 0.5 if self.terminal else 10.0
        self.last = self.start

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more as done."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.interval_s:
            self.last = now
            self._print(note, end="\r" if self.terminal else "\n")

    def finish(self, note: str = "") -> None:
        """Print the last line."""
        self._print(note, end="\n")

    def _print(self, note: str, end: str) -> None:
        if self.rank != 0:
            return
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.begun_at) / seconds
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        when = f"{clock(left)} left" if self.done < self.total else f"in {clock(seconds)}"
        line = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {when}"
        print(f"{line}{', ' if note else ''}{note}".ljust(78), end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them; ? for no idea."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
