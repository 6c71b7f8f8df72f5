"""The network is the study's: written out with one-hot words it gives the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, leaky_relu

from baselines import mlp
from baselines.features import Features, read_vocabulary
from data_prep.dataset import Dataset
from data_prep.sample import make_sample
from launcher.config import parse_config


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_sample(size=240, seed=2)


def built(dataset: Dataset, folder: Path, **settings: Any) -> mlp.Mlp:
    values: dict[str, Any] = {
        "method": "baselines.mlp",
        "run": {"name": "r", "dir": str(folder)},
        "data": {"path": "d"},
        "model": {"precision": "fp32"},
        "mlp": settings,
    }
    method = mlp.build(mlp.prepare(parse_config(values), dataset), dataset.labels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return method


def one_hot(features: Features, places: dict[str, int], texts: list[str]) -> Tensor:
    rows = torch.zeros(len(texts), len(places))
    for row, text in zip(rows, texts, strict=True):
        for feature in features.of(text):
            if feature in places:
                row[places[feature]] += 1
    return rows


def test_the_studys_network_written_out(dataset: Dataset, tmp_path: Path) -> None:
    method = built(dataset, tmp_path)
    weights = dict(method.module.named_parameters())
    assert [tuple(value.shape[:1]) for name, value in weights.items() if "layers" in name] == (
        [(50,)] * 6
    )
    dev = dataset.splits["dev"]
    texts, gold = dev["text"].to_pylist(), torch.tensor(dev["label"].to_numpy()).long()
    places = read_vocabulary(tmp_path / "r" / "vocabulary.json")
    states = one_hot(method.features, places, texts)
    assert 0 < float((states > 0).float().sum()) < sum(len(method.features.of(t)) for t in texts)
    states = states @ weights["vectors.weight"] + weights["bias"]
    for layer in range(3):
        states = leaky_relu(states, 0.1)
        states = states @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    expected = leaky_relu(states, 0.1) @ weights["head.weight"].T + weights["head.bias"]
    method.module.eval()
    examples = method.training_set(dev, 0)
    batch = examples.batch(range(len(texts)))
    torch.testing.assert_close(method.loss(batch), cross_entropy(expected, gold, reduction="sum"))
    assert (examples.weights == 1).all() and (examples.lengths >= 1).all()
    found = np.full((len(texts), len(dataset.labels)), np.nan, dtype=np.float32)
    method.micro_batch_tokens = 7
    parts = method.score_batches(texts)
    assert (
        max(int(part.starts[-1]) for part in parts if len(part.rows) > 1) <= 14 and len(parts) > 5
    )
    for part in parts:
        found[part.rows] = method.scores(part).numpy()
    np.testing.assert_allclose(found, expected.log_softmax(1).detach(), rtol=0, atol=1e-4)


def test_dropout_stands_in_the_middle(dataset: Dataset, tmp_path: Path) -> None:
    method = built(dataset, tmp_path, dropout=1 - 1e-9)
    weights = dict(method.module.named_parameters())
    method.module.train()
    batch = method.training_set(dataset.splits["dev"], 0).batch([0, 1, 2])
    # Nothing is left of the second layer's outputs, so the rest sees its biases only.
    states = leaky_relu(weights["layers.1.bias"], 0.1)
    states = leaky_relu(states @ weights["layers.2.weight"].T + weights["layers.2.bias"], 0.1)
    expected = (states @ weights["head.weight"].T + weights["head.bias"]).expand(3, -1)
    torch.testing.assert_close(method.module(batch.features, batch.starts), expected)


def test_square_root_pooling_and_what_is_saved(dataset: Dataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "features": ["characters"],
        "hidden": [8],
        "pooling": "sqrt",
        "feature_dropout": 0.4,
    }
    method = built(dataset, tmp_path, **settings)
    weights = dict(method.module.named_parameters())
    texts = [*dataset.splits["dev"]["text"].to_pylist(), "♨"]
    places = read_vocabulary(tmp_path / "r" / "vocabulary.json")
    rows = one_hot(method.features, places, texts)
    rows = rows / rows.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    states = leaky_relu(rows @ weights["vectors.weight"] + weights["bias"], 0.1)
    expected = (states @ weights["head.weight"].T + weights["head.bias"]).log_softmax(dim=1)
    method.module.eval()
    (batch,) = method.score_batches(texts)
    torch.testing.assert_close(method.scores(batch), expected.detach(), rtol=0, atol=1e-4)
    method.module.train()
    drawn = [method.module(batch.features, batch.starts) for _ in range(2)]
    assert not torch.equal(*drawn), "features are dropped"
    state = {name: value.detach().clone() for name, value in weights.items()}
    method.export(state, tmp_path / "r")
    other = built(dataset, tmp_path, **{**settings, "hidden": [8]})
    with torch.no_grad():
        other.module.head.weight.zero_()
    other.load_export(tmp_path / "r")
    other.module.eval()
    assert torch.equal(other.scores(batch), method_scores(method, batch))


def method_scores(method: mlp.Mlp, batch: mlp.BagBatch) -> Tensor:
    method.module.eval()
    return method.scores(batch)
