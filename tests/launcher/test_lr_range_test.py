"""The learning-rate range test, on curves with a known answer and on models that are trained."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from launcher.errors import InputError
from launcher.lr_range_test import MIN_STEPS, diverged, learning_rate, suggestion, write

# A curve that is flat, falls along a straight line between 1e-4 and 1e-2, is flat until 1e-1 and
# rises steeply: 95 % of its fall are done at 10 ** -2.1.
ANSWER = 10**-2.1

# A model, and the mean loss of the rows of its 800 examples.
Problem = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


def known_curve(steps: int, noise: float, seed: int = 0) -> tuple[list[float], list[float]]:
    rates = np.geomspace(1e-6, 1, steps)
    losses = np.interp(np.log10(rates), [-6, -4, -2, -1, 0], [3, 3, 1, 1, 9])
    losses += np.random.default_rng(seed).normal(0, noise, steps)
    return rates.tolist(), losses.tolist()


def test_rates_are_geometric() -> None:
    rates = [learning_rate(1e-5, 2.0, step, 50) for step in range(50)]
    assert rates == pytest.approx(np.geomspace(1e-5, 2.0, 50).tolist())


@pytest.mark.parametrize("steps", [60, 150, 600])
@pytest.mark.parametrize("noise", [0, 0.02, 0.2])
def test_a_known_curve(steps: int, noise: float) -> None:
    for seed in range(5):
        rates, losses = known_curve(steps, noise, seed)
        assert 0.3 < suggestion(rates, losses) / ANSWER < 3
        if noise <= 0.02:
            assert suggestion(rates, losses) == pytest.approx(ANSWER, rel=0.5)


def test_single_losses_far_off_change_nothing() -> None:
    rates, losses = known_curve(150, 0.02)
    found = suggestion(rates, losses)
    for place in (0, 40, 100, 110):
        spiked = [*losses[:place], 1e30, *losses[place + 1 :]]
        assert suggestion(rates, spiked) == pytest.approx(found, rel=0.2)
        assert not diverged(spiked[:115])
    assert suggestion(rates, [*losses[:130], math.inf, *losses[131:]]) == found
    dip = [*losses[:118], -3.0, -3.0, -3.0, -3.0]
    assert suggestion(rates[:122], dip) == pytest.approx(found, rel=0.2)
    assert suggestion([*rates, 2, 3], [*losses, 1e30, math.nan]) == pytest.approx(found, rel=0.2)


def test_divergence_is_seen_and_nothing_else_is() -> None:
    for seed in range(20):
        noisy = np.random.default_rng(seed).normal(3, 0.5, 120).tolist()
        falling = (np.linspace(3, 1, 120) + np.array(noisy) / 10).tolist()
        for losses in (noisy, falling):
            assert not any(diverged(losses[:count]) for count in range(1, 121))
        rates, losses = known_curve(120, 0.05, seed)
        first = next(rate for i, rate in enumerate(rates) if diverged(losses[: i + 1]))
        # The line to 9 has lost half of the fall at 10 ** -0.875.
        assert 10**-0.875 < first < 10**-0.6
    rising = np.linspace(1, 2, 60).tolist()
    assert [diverged(rising[:count]) for count in (MIN_STEPS - 1, 60)] == [False, True]
    assert diverged([math.nan])
    assert diverged([3.0, 2.0, -math.inf])


def test_a_curve_that_only_falls() -> None:
    rates = np.geomspace(1e-6, 1, 101).tolist()
    assert suggestion(rates, np.linspace(3, 1, 101).tolist()) == pytest.approx(rates[95], rel=0.5)


@pytest.mark.parametrize("losses", [[2.0] * 40, np.geomspace(1, 100, 40).tolist()])
def test_no_fall_no_suggestion(losses: list[float], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"train\.lr_range_test.* lower .*lowest.* raise .*highest"
    ):
        write(tmp_path, np.geomspace(1e-5, 1, 40).tolist(), losses)
    written = json.loads((tmp_path / "lr_range_test.json").read_text(encoding="utf-8"))
    assert written["suggested"] is None
    assert written["losses"] == losses
    assert (tmp_path / "lr_range_test.svg").exists()


@pytest.mark.parametrize("losses", [[], [math.nan] * 50, [3.0] * (MIN_STEPS - 1), [2.0, math.inf]])
def test_too_few_losses(losses: list[float], tmp_path: Path) -> None:
    rates = np.geomspace(1e-5, 1, 50)[: len(losses)].tolist()
    with pytest.raises(InputError, match=rf"train\.lr_range_test\.steps: .* {MIN_STEPS} expected"):
        write(tmp_path, rates, losses)
    assert (tmp_path / "lr_range_test.json").exists()


def regression(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(800, 10, generator=generator) * torch.logspace(0, -0.5, 10)
    y = x @ torch.randn(10, generator=generator) + 0.3 * torch.randn(800, generator=generator)
    model = nn.Linear(10, 1)
    return model, lambda rows: nn.functional.mse_loss(model(x[rows])[:, 0], y[rows])


def network(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(800, 20, generator=generator)
    odds = torch.softmax(2 * (x @ torch.randn(20, 5, generator=generator)).tanh(), 1)
    y = torch.multinomial(odds, 1, generator=generator)[:, 0]
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    return model, lambda rows: nn.functional.cross_entropy(model(x[rows]), y[rows])


def trained(
    problem: Callable[[int], Problem],
    optimizer: type[torch.optim.Optimizer],
    seed: int,
    rates: Sequence[float],
    stop: Callable[[list[float]], bool] = lambda losses: False,
) -> tuple[list[float], float]:
    """Losses of the steps, one for each rate unless `stop` ends it, and the whole set's loss."""
    torch.manual_seed(seed)
    model, loss_of = problem(seed)
    descent = optimizer(model.parameters(), lr=1.0)  # type: ignore[call-arg]
    losses: list[float] = []
    for rate in rates:
        descent.param_groups[0]["lr"] = rate
        loss = loss_of(torch.randint(800, (64,)))
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(float(loss.detach()))
        if stop(losses):
            break
    return losses, float(loss_of(torch.arange(800)).detach())


@pytest.mark.parametrize("problem", [regression, network])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_suggestion_trains(
    problem: Callable[[int], Problem], optimizer: type[torch.optim.Optimizer], seed: int
) -> None:
    rates = [learning_rate(1e-5, 100.0, step, 150) for step in range(150)]
    losses, _ = trained(problem, optimizer, seed, rates, diverged)
    found, too_high = suggestion(rates[: len(losses)], losses), 10 * rates[len(losses) - 1]

    def final(rate: float) -> float:
        return trained(problem, optimizer, seed, [rate * (1 - i / 150) for i in range(150)])[1]

    best = np.nanmin([final(float(rate)) for rate in np.geomspace(1e-3, 10, 9)])
    assert final(found) < 2 * best
    assert not trained(problem, optimizer, seed, [too_high] * 150)[1] < 2 * best


def test_the_files(tmp_path: Path) -> None:
    rates, losses = known_curve(80, 0.05)
    losses[-2:] = [1e12, math.nan]
    suggested = write(tmp_path, rates, losses)
    assert suggested == suggestion(rates, losses)
    json_file, svg_file = tmp_path / "lr_range_test.json", tmp_path / "lr_range_test.svg"
    assert sorted(tmp_path.iterdir()) == [json_file, svg_file]
    written = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written["rates"] == rates
    assert written["losses"] == [*losses[:-1], None]
    assert written["suggested"] == suggested
    assert written["smoothed"][40] == np.median(losses[37:44])
    assert written["smoothed"][-1] is None
    first = svg_file.read_bytes()
    texts = [element.text for element in ElementTree.fromstring(first).iter() if element.text]
    for text in ("training loss (nats)", f"suggested: {suggested:.2g}"):
        assert text in texts
    assert any("learning rate" in text for text in texts)
    write(tmp_path, rates, losses)
    assert svg_file.read_bytes() == first
