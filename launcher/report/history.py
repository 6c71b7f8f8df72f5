"""What a run cost and how it learned, from `environment.json` and `train_log.jsonl`."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.report.runs import Run


@dataclass(frozen=True)
class Cost:
    """What is known; None is what the run did not write."""

    trained_parameters: int | None
    tokens_per_s: float | None
    memory_bytes: float | None
    wall_seconds: float | None
    device: str | None


@dataclass(frozen=True)
class Curve:
    """Looks at the dev split during training."""

    epochs: list[float]
    accuracy: list[float]  # Acc@1


def cost_of(run: Run) -> Cost:
    """The cost of a run; `tokens_per_s` is the median over the lines of its training log."""
    lines = _lines(run.folder)
    measured = run.environment.get("cost") or {}
    rates = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    peaks = [line["memory_bytes"] for line in lines if line.get("memory_bytes")]
    peaks += [measured["memory_bytes"]] if measured.get("memory_bytes") else []
    return Cost(
        trained_parameters=measured.get("trained_parameters"),
        tokens_per_s=statistics.median(rates) if rates else None,
        memory_bytes=max(peaks, default=None),
        wall_seconds=measured.get("wall_seconds"),
        device=_device(run.environment.get("hardware") or {}),
    )


def curve_of(run: Run) -> Curve | None:
    """Acc@1 on the dev split over the epochs; None for a run that looked less than twice."""
    lines = _lines(run.folder)
    # A line of epoch e at step s says that an epoch has at least s / (e + 1) steps, and the last
    # line of an epoch says it exactly.
    per_epoch = max(
        (-(-line["step"] // (line["epoch"] + 1)) for line in lines if "loss" in line), default=0
    )
    looks = [line for line in lines if line.get("dev_acc@1") is not None]
    if len(looks) < 2 or not per_epoch:
        return None
    return Curve(
        [line["step"] / per_epoch for line in looks], [line["dev_acc@1"] for line in looks]
    )


def _device(hardware: dict[str, Any]) -> str | None:
    gpus, ranks = hardware.get("gpus") or [], hardware.get("world_size")
    if not hardware:
        return None
    if not gpus:
        kind = hardware.get("cpu") or "CPU"
        return f"{kind}, {ranks} ranks" if (ranks or 1) > 1 else str(kind)
    names = sorted(set(gpus))
    return f"{ranks or len(gpus)} × {', '.join(names)}"


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of the training log; a run that was killed may have left half of one."""
    path = folder / "train_log.jsonl"
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append({"epoch": 0, **value})
    return found
