"""What is learned: targets, weights and levels, against torch's own losses and plain sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    log_softmax,
    sigmoid,
)

from data_prep.dataset import Dataset
from data_prep.sample import make_sample
from finetune.levels import memberships, resolve, roll_up
from finetune.settings import LevelSettings
from launcher import metrics
from launcher.errors import InputError
from launcher.predictions import Predictions, make_table, merge_parts, read_predictions, write_part
from tests.finetune.models import score

Built = Callable[..., Any]
ROWS = list(range(9))


@pytest.fixture
def loss_and_logits(
    built: Built, model: Callable[[str], Path]
) -> Callable[..., tuple[float, torch.Tensor]]:
    """`(overrides)`: our mean loss on nine examples, and their logits."""

    def make(*overrides: str, **given: Any) -> tuple[float, torch.Tensor]:
        method = built("encoder", model("bert"), *overrides, **given)
        method.module.model.classifier.weight.data *= 100
        dataset = given.get("data")
        table = dataset.splits["train"] if dataset else make.table  # type: ignore[attr-defined]
        examples = method.training_set(table, 0)
        batch = examples.batch(ROWS)
        loss = method.loss(batch) / examples.weights[ROWS].sum()
        with torch.no_grad():
            logits = method.module(batch.ids, batch.mask, batch.lengths)
        return float(loss.detach()), logits

    return make


@pytest.fixture
def table(dataset: Dataset, loss_and_logits: Any) -> pa.Table:
    loss_and_logits.table = dataset.splits["train"]
    return dataset.splits["train"].slice(0, len(ROWS))


def test_cross_entropy_with_class_weights_is_torchs(loss_and_logits: Any, table: pa.Table) -> None:
    labels = torch.from_numpy(table["label"].to_numpy()).long()
    weight = torch.tensor([1.0, 2.5, 1, 0, 1])
    loss, logits = loss_and_logits("finetune.class_weights={音乐舞蹈: 2.5, 生活: 0}")
    assert loss == pytest.approx(float(cross_entropy(logits, labels, weight)), abs=1e-5)
    assert abs(loss - float(cross_entropy(logits, labels))) > 1e-2


def test_label_smoothing_is_torchs(loss_and_logits: Any, table: pa.Table) -> None:
    labels = torch.from_numpy(table["label"].to_numpy()).long()
    loss, logits = loss_and_logits("finetune.label_smoothing=0.2")
    expected = float(cross_entropy(logits, labels, label_smoothing=0.2))
    assert loss == pytest.approx(expected, abs=1e-5)
    assert abs(loss - float(cross_entropy(logits, labels))) > 1e-2


def test_shares_are_learned_as_soft_targets(loss_and_logits: Any, table: pa.Table) -> None:
    shares = torch.tensor(table["distribution"].to_pylist())
    assert ((shares > 0) & (shares < 1)).any()
    loss, logits = loss_and_logits("finetune.soft_targets=true")
    assert loss == pytest.approx(float(cross_entropy(logits, shares)), abs=1e-5)


def test_many_labels_are_learned_by_themselves(loss_and_logits: Any, table: pa.Table) -> None:
    present = (torch.tensor(table["distribution"].to_pylist()) > 0).float()
    loss, logits = loss_and_logits("finetune.multi_label=true")
    expected = float(binary_cross_entropy_with_logits(logits, present))
    assert loss == pytest.approx(expected, abs=1e-5)


def test_many_labels_are_scored_in_proportion(
    built: Built, model: Callable[[str], Path], table: pa.Table
) -> None:
    method = built("encoder", model("bert"), "finetune.multi_label=true")
    text = table["text"][0].as_py()
    ids = torch.tensor([method.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        chances = sigmoid(method.module.model.eval()(ids).logits[0])
    expected = (chances / chances.sum()).log()
    np.testing.assert_allclose(score(method, [text])[0], expected, rtol=0, atol=1e-5)


def test_balanced_weights_make_labels_count_alike(
    built: Built, model: Callable[[str], Path], dataset: Dataset
) -> None:
    method = built("encoder", model("bert"), "finetune.class_weights=balanced")
    examples = method.training_set(dataset.splits["train"], 0)
    labels = dataset.splits["train"]["label"].to_numpy()
    totals = np.bincount(labels, weights=examples.weights)
    np.testing.assert_allclose(totals, len(labels) / 5, rtol=1e-4)


ZONES = "finetune.levels.main.weight=0.7"


def test_levels_are_learned_together(loss_and_logits: Any, built: Built) -> None:
    """Brute force: the probability of a group is the sum of its zones'."""
    zones = make_sample(size=240, seed=3, labels="zones21")
    assert zones.grouping is not None
    loss, logits = loss_and_logits(ZONES, data=zones)
    labels = zones.splits["train"]["label"].to_numpy()[ROWS]
    expected = 0.0
    for row, label in enumerate(labels):
        probabilities = logits[row].double().softmax(0)
        group = next(m for m in zones.grouping.values() if zones.labels[label] in m)
        of_group = sum(float(probabilities[zones.labels.index(zone)]) for zone in group)
        expected -= np.log(float(probabilities[label])) + 0.7 * np.log(of_group)
    assert loss == pytest.approx(expected / len(labels), rel=1e-5)
    assert zones.provenance["levels"] == {"main": zones.grouping}


def test_levels_never_contradict_each_other() -> None:
    labels = ["a", "b", "c", "d", "e"]
    levels = resolve(
        {
            "middle": LevelSettings(grouping={"ab": ["a", "b"], "cd": ["c", "d"], "e": ["e"]}),
            "top": LevelSettings(grouping={"front": ["ab"], "back": ["cd", "e"]}),
        },
        labels,
        None,
    )
    assert levels["top"].grouping == {"front": ["a", "b"], "back": ["c", "d", "e"]}
    logits = 5 * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    log_probs = log_softmax(logits, 1).requires_grad_()
    middle, top = (roll_up(log_probs, one) for one in memberships(levels, labels))
    torch.testing.assert_close(middle.exp()[:, 1], log_probs.exp()[:, 2:4].sum(1))
    torch.testing.assert_close(top.exp()[:, 1], middle.exp()[:, 1:].sum(1))
    (gradient,) = torch.autograd.grad(top.sum(), log_probs)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        (None, "no grouping"),
        ({"x": ["a"]}, "lacks labels: b"),
        ({"x": ["a", "b"], "y": ["b"]}, "in more than one place: b"),
        ({"x": ["a", "b", "z"]}, "no labels or groups: z"),
        ({"x": ["a", "b"], "y": []}, "has no members"),
    ],
)
def test_groupings_that_are_none(grouping: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"finetune\.levels\.main: .*{message}"):
        resolve({"main": LevelSettings(grouping=grouping)}, ["a", "b"], None)


def test_levels_are_measured_from_predictions_alone(tmp_path: Path) -> None:
    grouping = {"front": ["a", "b"], "back": ["c"]}
    scores = np.log(np.array([[0.3, 0.3, 0.4], [0.1, 0.1, 0.8], [0.5, 0.2, 0.3]], np.float32))
    table = make_table(
        ["1", "2", "3"], ["x", "y", "z"], [1, 2, None], [None, None, [0.0, 0.4, 0.6]],
        scores, None, ["a", "b", "c"], {"levels": {"half": grouping}},
    )  # fmt: skip
    write_part(tmp_path, "dev", 0, table)
    stored: Predictions = read_predictions(merge_parts(tmp_path, "dev"))
    # The first text: c is the most probable label, front the more probable group.
    assert stored.predicted.tolist() == [2, 2, 0]
    rolled = metrics.roll_up(stored, grouping)
    assert rolled.predicted.tolist() == [0, 1, 0]
    assert rolled.labels.tolist() == [0, 1, -1]
    np.testing.assert_allclose(rolled.distributions, [[1, 0], [0, 1], [0.4, 0.6]], atol=1e-6)
    np.testing.assert_allclose(np.exp(rolled.scores), [[0.6, 0.4], [0.2, 0.8], [0.7, 0.3]], 1e-5)
    found = metrics.write_metrics(tmp_path)["splits"]["dev"]
    assert found["acc@1"]["value"] == pytest.approx(1 / 3)
    assert found["levels"]["half"]["acc@1"]["value"] == pytest.approx(2 / 3)
    assert found["levels"]["half"]["acc@3"]["value"] == 1
    assert found["levels"]["half"]["labels"] == ["front", "back"]
