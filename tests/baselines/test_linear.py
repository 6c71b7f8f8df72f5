"""Linear models score as scikit-learn's own pipelines, and as a plain naive-Bayes SVM, do."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from baselines import linear
from baselines.mixture import fit_mixture
from data_prep.dataset import Dataset
from data_prep.sample import make_sample
from launcher.config import parse_config
from launcher.errors import InputError


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_sample(size=500, seed=1)


def fitted(dataset: Dataset, folder: Path, settings: dict[str, Any]) -> linear.Linear:
    values = {"method": "baselines.linear", "run": {"name": "r"}, "data": {"path": "d"}}
    config = linear.prepare(parse_config({**values, "linear": settings}), dataset)
    linear.build(config, dataset.labels).fit(dataset.splits, folder)
    method = linear.build(config, dataset.labels)
    method.load_export(folder)
    return method


def scores(method: linear.Linear, texts: list[str]) -> np.ndarray:
    (batch,) = method.score_batches(texts)
    assert batch.rows == [*range(len(texts))]
    return method.scores(batch).numpy()


def calibrated(distances: np.ndarray, folder: Path) -> np.ndarray:
    model = load_file(folder / "linear" / "model.safetensors")
    logits = distances * model["calibration.weights"] + model["calibration.bias"]
    return torch.tensor(logits).log_softmax(dim=1).numpy()


def columns(dataset: Dataset, split: str) -> tuple[list[str], np.ndarray]:
    table = dataset.splits[split]
    return table["text"].to_pylist(), table["label"].to_numpy()


def test_support_vector_machines_are_scikit_learns_and_calibrated(
    dataset: Dataset, tmp_path: Path
) -> None:
    method = fitted(dataset, tmp_path, {"classifier": "svm", "ngrams": [1, 3]})
    texts, gold = columns(dataset, "train")
    dev, _ = columns(dataset, "dev")
    dev.append("♨")  # nothing of it is known
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True),
        LinearSVC(C=0.6, random_state=0),
    )
    distances = pipeline.fit(texts, gold).decision_function(dev)
    found = scores(method, dev)
    np.testing.assert_allclose(found, calibrated(distances, tmp_path), rtol=0, atol=2e-3)

    # Calibrated on a fifth of which the other four have not seen even the n-grams.
    part = np.random.default_rng(0).permutation(len(gold)) % 5
    rest = [text for text, one in zip(texts, part, strict=True) if one]
    pipeline.fit(rest, gold[part > 0])
    left_out = [text for text, one in zip(texts, part, strict=True) if not one]
    weights, bias = fit_mixture(pipeline.decision_function(left_out)[:, None], gold[part == 0])
    model = load_file(tmp_path / "linear" / "model.safetensors")
    np.testing.assert_allclose(model["calibration.weights"], weights, rtol=0, atol=2e-3)
    np.testing.assert_allclose(model["calibration.bias"], bias, rtol=0, atol=2e-3)


def test_logistic_regression_is_scikit_learns(dataset: Dataset, tmp_path: Path) -> None:
    texts, gold = columns(dataset, "train")
    dev, _ = columns(dataset, "dev")
    labels = len(dataset.labels)
    for kept in (range(labels), range(1, labels), (0, 2)):
        rows = np.isin(gold, kept)
        part = {"train": dataset.splits["train"].filter(pa.array(rows))}
        one = Dataset(dataset.labels, part, {}, None, {})
        method = fitted(one, tmp_path, {"classifier": "logistic", "ngrams": [2, 2]})
        pipeline = make_pipeline(
            TfidfVectorizer(analyzer="char", ngram_range=(2, 2), sublinear_tf=True),
            LogisticRegression(C=3.0, max_iter=1000),
        )
        pipeline.fit([text for text, own in zip(texts, rows, strict=True) if own], gold[rows])
        found = scores(method, dev)
        expected = pipeline.predict_log_proba(dev)
        np.testing.assert_allclose(found[:, [*kept]], expected, rtol=0, atol=2e-3)
        missing = sorted({*range(labels)} - {*kept})
        assert (found[:, missing] < -10).all() and np.isfinite(found).all()


def test_naive_bayes_machines_are_as_published(dataset: Dataset, tmp_path: Path) -> None:
    settings = {
        "classifier": "nb_svm",
        "ngrams": [1, 2],
        "features": {"characters": 0.8},
        "min_count": 2,
    }
    method = fitted(dataset, tmp_path, settings)
    texts, gold = columns(dataset, "train")
    dev, _ = columns(dataset, "dev")
    counter = CountVectorizer(analyzer="char", ngram_range=(1, 2), binary=True, min_df=2)
    present, in_dev = counter.fit_transform(texts).toarray(), counter.transform(dev).toarray()
    distances = []
    for label in range(len(dataset.labels)):
        p, q = (1.0 + present[gold == label].sum(0)), (1.0 + present[gold != label].sum(0))
        ratio = 0.8 * np.log((p / p.sum()) / (q / q.sum()))
        machine = LinearSVC(C=0.1, max_iter=1000, random_state=0)
        machine.fit(present * ratio, gold == label)
        distances.append(machine.decision_function(in_dev * ratio))
    expected = calibrated(np.stack(distances, axis=1), tmp_path)
    np.testing.assert_allclose(scores(method, dev), expected, rtol=0, atol=5e-3)


def test_what_does_not_fit_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    method = fitted(dataset, tmp_path, {"ngrams": [1, 1]})
    values = {"method": "baselines.linear", "run": {"name": "r"}, "data": {"path": "d"}}
    one = dataset.splits["train"].slice(0, 1)
    for splits, expected in [({}, "needs the split 'train'"), ({"train": one}, "at least two")]:
        with pytest.raises(InputError, match=expected):
            linear.prepare(parse_config(values), Dataset(dataset.labels, splits, {}, None, {}))
    with pytest.raises(InputError, match=r"parallel\.zero: 3"):
        linear.prepare(parse_config({**values, "parallel": {"zero": 3}}), dataset)
    with pytest.raises(InputError, match="shortest, longest"):
        parse_config({**values, "linear": {"ngrams": [3, 1]}})
    method.labels = 2
    with pytest.raises(InputError, match="belongs to another run"):
        method.load_export(tmp_path)
    (tmp_path / "linear" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors: not readable"):
        method.load_export(tmp_path)
