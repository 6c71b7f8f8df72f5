"""The training log: figures that add up over ranks, and curves without the steps of a lost run."""

import json
import math
import resource
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from launcher import distributed, training_log
from launcher.distributed import World
from launcher.errors import InputError
from launcher.training_log import TrainingLog

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`clock.now`: the time that the log sees, in seconds."""
    clock = SimpleNamespace(now=50.0)
    times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(training_log, "time", times)
    return clock


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log, by a parser that takes no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (folder / "train_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag as TensorBoard shows them: a session's start at step s hides what
    stands before it for step s and later."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while len(data) >= 8 and len(data) >= 16 + (size := struct.unpack_from("<Q", data)[0]):
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                for tag, points in found.items():
                    found[tag] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def add(log: TrainingLog, *losses: float) -> None:
    for loss in losses:
        log.add(torch.tensor(loss), tokens=100, flops=1e6)


def test_a_line_tells_of_the_steps_since_the_line_before(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    log = TrainingLog(tmp_path, ALONE, 0, peak_flops_per_s=5e6)
    add(log, 8, 8)
    clock.now += 10
    add(log, 2)
    log.write(3, 0, 0.5)
    add(log, 1)
    clock.now += 4
    log.add(torch.tensor(2.0, requires_grad=True), tokens=500, flops=7e6)
    assert log.write(5, 1, 0.25, grad_norm=3) == 1.5
    log.close()
    first, second = lines(tmp_path)
    assert first["loss"] == 6
    memory = second.pop("memory_bytes")
    assert 0 <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20
    expected = {"loss": 1.5, "lr": 0.25, "tokens_per_s": 150, "model_flops_per_s": 2e6}
    expected |= {"peak_flops_share": 0.4, "grad_norm": 3}
    assert second == {"step": 5, "epoch": 1} | expected
    shown = {tag: points[-1] for tag, points in curves(tmp_path).items()}
    assert shown.pop("train/memory_bytes") == (5, pytest.approx(memory))
    expected = {"epoch": 1} | expected
    assert shown == {f"train/{name}": (5, pytest.approx(v)) for name, v in expected.items()}


def test_without_a_peak_there_is_no_share(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, ALONE, 0)
    add(log, 1)
    log.write(1, 0, 0.5)
    assert "peak_flops_share" not in lines(tmp_path)[0]


def test_evaluation_is_not_training_time(tmp_path: Path, clock: SimpleNamespace) -> None:
    log = TrainingLog(tmp_path, ALONE, 0)
    clock.now += 3
    add(log, 1)
    clock.now += 1000
    log.write_dev(1, 0, loss=0.5, f1=0.75)
    clock.now += 2
    add(log, 1)
    log.write(2, 0, 0.1)
    clock.now += 1000
    log.write_dev(2, 0, loss=0.25)
    clock.now += 4
    add(log, 1)
    log.write(3, 1, 0.1)
    first, rate, second, last = lines(tmp_path)
    assert first == {"step": 1, "epoch": 0, "dev_loss": 0.5, "dev_f1": 0.75}
    assert second == {"step": 2, "epoch": 0, "dev_loss": 0.25}
    assert rate["tokens_per_s"] == 200 / (3 + 2)
    assert last["tokens_per_s"] == 100 / 4
    shown = curves(tmp_path)
    assert shown["dev/loss"] == [(1, 0.5), (2, 0.25)]
    assert shown["dev/f1"] == [(1, 0.75)]


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_resumed_log_has_every_step_once(tmp_path: Path, cut: int) -> None:
    """The first run was killed `cut` bytes before the end of what it wrote last."""
    log = TrainingLog(tmp_path, ALONE, 0)
    for step in range(1, 7):
        add(log, step)
        log.write(step, 0, math.nan if step == 2 else 0.1)
    log.write_dev(4, 0, loss=1)
    log.write_dev(5, 0, loss=1)
    for file in (tmp_path / "train_log.jsonl", *(tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) - cut])
    log = TrainingLog(tmp_path, ALONE, 4)
    for step in range(5, 8):
        add(log, 10 * step)
        log.write(step, 0, 0.1)
    log.close()
    wanted = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70)]
    logged = lines(tmp_path)
    assert [(line["step"], line["loss"]) for line in logged if "loss" in line] == wanted
    assert [line["step"] for line in logged if "dev_loss" in line] == [4]
    assert logged[1]["lr"] is None
    shown = curves(tmp_path)
    assert shown["train/loss"] == wanted
    assert shown["dev/loss"] == [(4, 1)]
    TrainingLog(tmp_path, ALONE, 0).close()
    assert lines(tmp_path) == []
    assert not any(curves(tmp_path).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_null(tmp_path: Path, value: float) -> None:
    log = TrainingLog(tmp_path, ALONE, 0)
    add(log, 1, value, 1)
    assert not math.isfinite(log.write(3, 0, 0.1, grad_norm=value))
    log.write_dev(3, 0, loss=value)
    trained, dev = lines(tmp_path)
    assert (trained["loss"], trained["grad_norm"], dev["dev_loss"]) == (None, None, None)
    assert not math.isfinite(curves(tmp_path)["train/loss"][0][1])


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, ALONE, 0)
    (tmp_path / "train_log.jsonl").unlink()
    (tmp_path / "train_log.jsonl").symlink_to("/dev/full")
    add(log, 1)
    with pytest.raises(InputError, match=f"{tmp_path}: not written.*free some"):
        log.write(1, 0, 0.1)


def test_ranks_add_up(start: Any, tmp_path: Path) -> None:
    job = start([str(tmp_path)], module=__name__, ranks=2).wait()
    assert job.codes == [0, 0], job.err
    told = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank_*"))]
    assert [rank["mean"] for rank in told] == [0.75, 0.75]
    line = lines(tmp_path)[0]
    assert line["loss"] == 0.75
    small, large = sorted(rank["memory"] for rank in told)
    assert large - small > 2.5e8
    assert line["memory_bytes"] == pytest.approx(large, abs=2**20)
    assert all("free some" in rank["error"] for rank in told)


def main(arguments: Sequence[str]) -> int:
    """One of the two ranks above: rank 1 holds 300 MB more; at last the disk is full."""
    folder, world = Path(arguments[0]), distributed.start()
    ballast = torch.ones(75_000_000 * world.rank)
    log = TrainingLog(folder, world, 0)
    add(log, 0.25, 0.25) if world.rank else add(log, 0.75, 0.25)
    told: dict[str, Any] = {"mean": log.write(2, 0, 0.1)}
    told["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if world.rank == 0:
        (folder / "train_log.jsonl").rename(folder / "kept")
        (folder / "train_log.jsonl").symlink_to("/dev/full")
    try:
        log.write_dev(2, 0, loss=float(ballast.numel()))
    except InputError as error:
        told["error"] = str(error)
    if world.rank == 0:
        (folder / "kept").replace(folder / "train_log.jsonl")
    (folder / f"rank_{world.rank}").write_text(json.dumps(told), encoding="utf-8")
    distributed.stop()
    return 0
