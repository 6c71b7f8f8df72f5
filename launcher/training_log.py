"""What training tells while it runs: `train_log.jsonl`, and the same numbers for TensorBoard."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from launcher.distributed import World, max_over_ranks, on_rank_0, sum_over_ranks
from launcher.files import replacing, writing


class TrainingLog:
    """A line every few steps, with means over the steps since the line before.

    All ranks call every method together, and all raise the InputError if the disk is full; rank 0
    alone writes. The clock runs from the line before to the last step added, so that what follows
    a step and ends in a line of its own, as evaluation does, is not taken for training.
    """

    def __init__(
        self, folder: Path, world: World, step: int, *, peak_flops_per_s: float | None = None
    ) -> None:
        """Begin the log, or go on with it after `step`: what it holds of later steps is dropped.

        Args:
            folder: the run's folder, which gets `train_log.jsonl` and `tensorboard/`.
            peak_flops_per_s: what all ranks together can reach; None: no `peak_flops_share`.
        """
        self._folder, self._world, self._peak = folder, world, peak_flops_per_s
        self._path = folder / "train_log.jsonl"
        self._curves: RecordWriter | None = None
        on_rank_0(world, lambda: self._open(step))
        self._restart()

    def add(self, loss: torch.Tensor, tokens: int, flops: float) -> None:
        """Count one optimizer step.

        Args:
            loss: 0-d, this rank's share of the step's mean loss; not waited for.
            tokens: of the whole step, over all ranks.
            flops: the model's FLOPs for the whole step, over all ranks.
        """
        self._loss += loss.detach()
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._last = time.monotonic()

    def write(self, step: int, epoch: int, lr: float, **extra: float) -> float:
        """Write a line about the steps since the last one, at least one, and give their mean loss.

        `memory_bytes` is the largest peak over ranks: allocated by torch on a GPU, else resident.
        A number that is not finite becomes null in `train_log.jsonl`.
        """
        mean = sum_over_ranks(self._world, float(self._loss / self._steps))
        seconds = time.monotonic() - self._start
        flops_per_s = self._flops / seconds
        values = {
            "loss": mean,
            "lr": lr,
            "tokens_per_s": round(self._tokens / seconds, 1),
            "model_flops_per_s": round(flops_per_s, 1),
        }
        if self._peak is not None:
            values["peak_flops_share"] = flops_per_s / self._peak
        values["memory_bytes"] = max_over_ranks(self._world, peak_memory(self._world.device))
        values |= extra
        line = {"step": step, "epoch": epoch, **values}
        on_rank_0(self._world, lambda: self._append(line, "train", {"epoch": epoch, **values}))
        self._restart()
        return mean

    def write_dev(self, step: int, epoch: int, **values: float) -> None:
        """Write a line of figures of the dev split; the time since the last step is not counted."""
        line = {"step": step, "epoch": epoch, **{f"dev_{k}": v for k, v in values.items()}}
        on_rank_0(self._world, lambda: self._append(line, "dev", values))
        now = time.monotonic()
        self._start += now - self._last
        self._last = now

    def close(self) -> None:
        """Close the file for TensorBoard."""
        if self._curves is not None:
            self._curves.close()

    def _restart(self) -> None:
        # Summed in float64 on the device: nothing waits for a step until a line is written.
        self._loss = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._start = self._last = time.monotonic()

    def _open(self, step: int) -> None:
        kept = [line for line in _complete_lines(self._path) if line["step"] <= step]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(map(_json_line, kept)), encoding="utf-8")
        self._curves = _event_file(self._folder / "tensorboard", step)

    def _append(self, line: dict[str, Any], group: str, values: dict[str, float]) -> None:
        assert self._curves is not None
        tagged = [Summary.Value(tag=f"{group}/{k}", simple_value=v) for k, v in values.items()]
        event = Event(wall_time=time.time(), step=line["step"], summary=Summary(value=tagged))
        with writing(self._folder):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_json_line(line))
            self._curves.write(event.SerializeToString())
            self._curves.flush()


def peak_memory(device: torch.device) -> int:
    """Bytes this process has had at most: allocated by torch on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Parsed lines; a run that was killed may have left half a line."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _json_line(line: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity, though Python would write them.
    known = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(known, allow_nan=False) + "\n"


def _event_file(folder: Path, step: int) -> RecordWriter:
    """A new event file whose start drops what the older ones hold of steps after `step`.

    tensorboardX's SummaryWriter is not used: its queue never empties once the disk is full, and
    the training would wait for it for ever; and its files of one second overwrite each other.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names: numbers, because the clocks of
        # two machines may differ.
        number = len(list(folder.glob("events.out.tfevents.*")))
        writer = RecordWriter(str(folder / f"events.out.tfevents.{number:06d}"))
        session = SessionLog(status=SessionLog.START)
        for event in (
            Event(file_version="brain.Event:2"),
            Event(step=step + 1, session_log=session),
        ):
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        writer.flush()
    return writer
