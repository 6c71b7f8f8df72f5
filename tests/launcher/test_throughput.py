"""How fast the machine is, against a clock that is known, and FLOPs against PyTorch's count."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launcher import distributed, throughput
from launcher.distributed import World
from launcher.throughput import peak_flops_per_s, transformer_flops


class Machine:
    """A clock that only products of square matrices move on, at `rate` FLOP/s; but another
    process has the core for 0.1 s during the products numbered in `slow`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rate: float, slow: Sequence[int] = ()
    ) -> None:
        self.now, self.rate, self.slow = 0.0, rate, slow
        self.products, self.largest = 0, 0
        self.dtypes: set[torch.dtype] = set()
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "mm", self.multiply)

    def multiply(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        assert left.shape == right.shape == out.shape == (len(left), len(left))
        self.dtypes |= {left.dtype, right.dtype, out.dtype}
        self.largest = max(self.largest, len(left))
        self.now += 2 * len(left) ** 3 / self.rate + 0.1 * (self.products in self.slow)
        self.products += 1


@pytest.mark.parametrize("rate", [3e8, 1e10, 1e11, 5e12, 9e14])
def test_the_rate_of_a_known_machine(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    machine = Machine(monkeypatch, rate)
    world = World(0, 1, torch.device("cpu"))
    assert peak_flops_per_s(world, torch.bfloat16) == pytest.approx(rate)
    assert machine.now < 1
    assert machine.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("slow", [0, 1, 2, 6])
def test_one_slow_product_does_not_make_the_matrices_small(
    monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    machine = Machine(monkeypatch, 1e11, [slow, 30])
    assert peak_flops_per_s(World(0, 1, torch.device("cpu")), torch.bfloat16) == pytest.approx(1e11)
    assert machine.largest == 1024


def test_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    assert peak_flops_per_s(World(0, 1, torch.device("cpu")), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("trained", [True, False])
def test_flops_are_those_that_pytorch_counts(trained: bool) -> None:
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)).requires_grad_(trained)
    x = torch.randn(7, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    weights = 2 * 24 * 96
    assert transformer_flops(weights=weights, tokens=7, trained=trained) == (
        counter.get_total_flops()
    )


def test_ranks_add_up(start: Any, tmp_path: Path) -> None:
    job = start([str(tmp_path)], module=__name__, ranks=2).wait()
    assert job.codes == [0, 0], job.err
    first, second = (json.loads(file.read_text()) for file in tmp_path.iterdir())
    assert first["peak"] == second["peak"] == pytest.approx(first["own"] + second["own"])
    assert first["own"] != second["own"]


def main(arguments: Sequence[str]) -> int:
    """One of the two ranks above, on a machine whose speed is known."""
    world = distributed.start()
    with pytest.MonkeyPatch.context() as patch:
        own = 1e10 * (1 + 2 * world.rank)
        Machine(patch, own)
        peak = peak_flops_per_s(world, torch.float32)
    file = Path(arguments[0]) / str(world.rank)
    file.write_text(json.dumps({"own": own, "peak": peak}), encoding="utf-8")
    distributed.stop()
    return 0
