"""Training: the schedule, who computes which rows, and equal results however a run is run."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launcher.batching import micro_batches, step_order
from launcher.config import TrainSettings
from launcher.training import learning_rate


def test_learning_rate_rises_and_falls() -> None:
    def rates(schedule: str, warmup: float = 0.2) -> list[float]:
        settings = TrainSettings.model_validate({"lr": 2, "schedule": schedule, "warmup": warmup})
        return [learning_rate(settings, step, 10) for step in range(10)]

    rise = [1.0, 2.0]
    assert rates("constant") == rise + [2.0] * 8
    assert rates("linear") == pytest.approx([*rise, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25])
    cosine = [1 + math.cos(math.pi * done / 8) for done in range(8)]
    assert rates("cosine") == pytest.approx(rise + cosine)
    assert rates("linear", warmup=0)[0] == 2


@pytest.mark.parametrize("examples", [1, 7, 64, 1000])
def test_an_epoch_has_every_row_once(examples: int) -> None:
    lengths = np.random.default_rng(examples).integers(1, 60, examples)
    steps = step_order(lengths, 7, seed=1)
    assert len(steps) == math.ceil(examples / 7)
    assert max(map(len, steps)) <= 7
    assert sorted(np.concatenate(steps).tolist()) == list(range(examples))
    again, other = step_order(lengths, 7, seed=1), step_order(lengths, 7, seed=2)
    assert all(map(np.array_equal, steps, again))
    assert len(steps) == 1 or not all(map(np.array_equal, steps, other))


def test_neighbours_in_length_share_a_step() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    spread = [np.ptp(lengths[rows]) for rows in step_order(lengths, 20, seed=0)]
    assert np.mean(spread) < 10


def test_micro_batches_share_out_a_step() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        lengths = random.integers(1, 40, 50)
        rows = random.permutation(50)[: random.integers(1, 30)]
        tokens, ranks = int(random.integers(1, 120)), int(random.integers(1, 6))
        shares = [micro_batches(rows, lengths, tokens, ranks, rank) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        counted = [part for share in shares for part, counts in share if counts]
        assert sorted(np.concatenate(counted).tolist()) == sorted(rows.tolist())
        for part, counts in (one for share in shares for one in share):
            assert len(part) * lengths[part].max() <= tokens or len(part) == 1
            assert counts or (len(part) == 1 and lengths[part] == lengths[rows].min())


@pytest.fixture(scope="session")
def uninterrupted(start: Any, pretrain: list[str], runs: Path) -> Path:
    """The run on one rank that others are compared with."""
    job = start([*pretrain, "run.name=whole"]).wait()
    assert job.codes == [0], job.err
    return runs / "whole"


def logged(run: Path) -> list[dict[str, Any]]:
    lines = (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    timed = {"tokens_per_s", "model_flops_per_s", "peak_flops_share", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in timed} for line in logged(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_the_log_tells_of_steps_rates_and_the_dev_split(uninterrupted: Path) -> None:
    lines = logged(uninterrupted)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 3, 5, 6, 9, 10, 12, 15]
    assert [line["step"] for line in lines if "dev_loss" in line] == [5, 10, 15]
    settings = TrainSettings(lr=1e-3)
    rates = [learning_rate(settings, line["step"] - 1, 15) for line in trained]
    assert [line["lr"] for line in trained] == pytest.approx(rates)
    assert trained[-1]["loss"] < 0.95 * trained[0]["loss"]
    assert [path.name for path in (uninterrupted / "checkpoints/last").glob("step_*")] == [
        "step_15"
    ]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_train_as_one(
    zero: int, uninterrupted: Path, start: Any, pretrain: list[str], runs: Path
) -> None:
    name = f"two_ranks_zero_{zero}"
    job = start([*pretrain, f"run.name={name}", f"parallel.zero={zero}"], ranks=2).wait()
    assert job.codes == [0, 0], job.err
    given, expected = logged(runs / name), logged(uninterrupted)
    assert [line["step"] for line in given] == [line["step"] for line in expected]
    for one, other in zip(given, expected, strict=True):
        kind = "loss" if "loss" in one else "dev_loss"
        assert one[kind] == pytest.approx(other[kind], rel=1e-5)
    trained, alone = weights(runs / name), weights(uninterrupted)
    assert trained.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    number: signal.Signals, uninterrupted: Path, start: Any, pretrain: list[str], runs: Path
) -> None:
    arguments = [*pretrain, f"run.name=stopped_by_{number.name}"]
    run = runs / f"stopped_by_{number.name}"
    job = start(arguments)
    wait_for(run / "checkpoints" / "last" / "step_3", job)
    os.kill(job.processes[0].pid, number)
    job.wait()
    assert job.codes == [75 if number == signal.SIGTERM else -number], job.err
    assert ("--resume goes on from here" in job.err) == (number == signal.SIGTERM)
    assert not (run / "model").exists()
    refused = start(arguments).wait()
    assert refused.codes == [2]
    assert "exists already" in refused.err
    job = start([*arguments, "--resume"]).wait()
    assert job.codes == [0], job.err
    assert untimed(run) == untimed(uninterrupted)
    for key, value in weights(uninterrupted).items():
        torch.testing.assert_close(weights(run)[key], value, rtol=0, atol=0, msg=key)


def test_a_loss_that_is_no_number_ends_the_run(start: Any, pretrain: list[str], runs: Path) -> None:
    job = start([*pretrain, "run.name=nan", "train.lr=1e30", "train.warmup=0"]).wait()
    assert job.codes == [2]
    message = job.err.strip().splitlines()[-1]
    assert message.startswith("train: the loss or its gradient is not a number in step 2;")
    found = json.loads((runs / "nan" / "not_finite.json").read_text(encoding="utf-8"))
    assert found["step"] == 2 and len(found["examples"]) == found["of"] == 70
    assert "lower train.lr" in message
    assert "Traceback" not in job.err
    assert not (runs / "nan" / "model").exists()
    assert not list((runs / "nan").glob("checkpoints/last/step_*"))


def wait_for(path: Path, job: Any) -> None:
    """Return as soon as `path` exists."""
    while not path.exists():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.002)
