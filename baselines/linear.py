"""Linear models on what a text is made of: the bar that every large model must clear.

They are fitted in one go, on rank 0, by scikit-learn. What is kept is a matrix: the scores of a
text are its features' rows added up, and become log-probabilities by calibration.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from baselines import mixture
from baselines.features import (
    Features,
    TextBatch,
    encode,
    read_vocabulary,
    text_batches,
    vocabulary,
    write_vocabulary,
)
from baselines.settings import LinearSettings
from launcher.errors import InputError
from launcher.files import replacing

TRAINS, CLASSIFIES = False, True
_STRENGTHS = {"logistic": 3.0, "svm": 0.6, "nb_svm": 0.1}
_CALIBRATION_PARTS = 5
"""One of so many parts of the examples is left out to calibrate on."""
_NEVER = -20.0
"""Log-odds of a label that no example to learn from has."""


def trains_model(config: Any) -> bool:
    """No network is trained."""
    return False


def prepare(config: Any, dataset: Any) -> Any:
    """Fix the strength, and refuse data that nothing can be learned from."""
    settings: LinearSettings = config.linear
    if config.parallel.zero == 3:
        raise InputError(
            "parallel.zero: 3 shards a network, which baselines.linear has not: leave it out"
        )
    _labelled(dataset.splits.get("train"))
    if settings.strength is None:
        strength = _STRENGTHS[settings.classifier]
        settings = settings.model_copy(update={"strength": strength})
    return config.model_copy(update={"linear": settings})


def build(config: Any, labels: Sequence[str]) -> "Linear":
    """The method, still without weights."""
    return Linear(config.linear, len(labels), config.run.seed)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate the data; show the features of one text."""
    settings: LinearSettings = prepare(config, dataset).linear
    text = dataset.splits["train"]["text"][0].as_py()
    features = Features([*settings.features], settings.ngrams)
    return [
        f"classifier: {settings.classifier}, strength {settings.strength}",
        f"text: {text}",
        f"  features {' '.join(features.of(text))}",
    ]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    settings: LinearSettings = config.linear
    return {"title": f"{settings.classifier} on {', '.join(settings.features)}", "prompt": ""}


class Linear:
    """A linear model; see `launcher.method.Classifier` and `launcher.method.Fitted`."""

    def __init__(self, settings: LinearSettings, labels: int, seed: int) -> None:
        self.module = nn.Module()
        self.settings, self.labels, self.seed = settings, labels, seed
        self.features = Features([*settings.features], settings.ngrams)
        self._places: dict[str, int] = {}
        self._model: dict[str, np.ndarray] = {}

    def fit(self, splits: dict[str, pa.Table], folder: Path) -> None:
        """Fit on the train split, write `linear/` in the run folder.

        Support vector machines give distances, not probabilities: four fifths of the examples are
        learned from to calibrate on the rest, then all of them. Logistic regression needs none.
        """
        texts, gold = _labelled(splits["train"])
        names = vocabulary(self.features, texts, self.settings.min_count)
        self._places = {name: place for place, name in enumerate(names)}
        counts = self._counts(texts)
        own = _kind_weights(names, self.settings.features)
        weights, bias = np.ones((1, self.labels)), np.zeros(self.labels)
        if self.settings.classifier != "logistic":
            part = np.random.default_rng(self.seed).permutation(len(gold)) % _CALIBRATION_PARTS
            seen, held = np.flatnonzero(part), np.flatnonzero(part == 0)
            if len(held):
                scale, matrix, offset = self._fitted(counts[seen], gold[seen], own)
                scores = self._distances(counts[held], scale, matrix, offset)
                weights, bias = mixture.fit_mixture(scores[:, None], gold[held])
        scale, matrix, offset = self._fitted(counts, gold, own)
        model = {
            "scale": scale,
            "matrix": matrix,
            "offset": offset,
            "calibration.weights": weights,
            "calibration.bias": bias,
        }
        write_vocabulary(folder / "linear" / "vocabulary.json", names)
        with replacing(folder / "linear" / "model.safetensors") as temporary:
            save_file({n: v.astype(np.float32) for n, v in model.items()}, temporary)

    def load_export(self, folder: Path) -> None:
        """Go on with what `fit` wrote."""
        self._places = read_vocabulary(folder / "linear" / "vocabulary.json")
        file = folder / "linear" / "model.safetensors"
        try:
            self._model = load_file(file)
            shape = self._model["matrix"].shape
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: not readable ({reason}): run it again") from None
        if shape != (len(self._places), self.labels):
            raise InputError(
                f"{file}: a matrix of {shape}, expected {(len(self._places), self.labels)}: it "
                "belongs to another run"
            )

    def score_batches(self, texts: Sequence[str]) -> list[TextBatch]:
        """Batches in the order of the texts."""
        return text_batches(texts)

    def scores(self, batch: TextBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        model = self._model
        distances = self._distances(
            self._counts(batch.texts), model["scale"], model["matrix"], model["offset"]
        )
        calibration = model["calibration.weights"], model["calibration.bias"]
        return torch.from_numpy(mixture.mix(distances[:, None], *calibration))

    def notes(self) -> dict[str, int]:
        """Nothing to tell."""
        return {}

    def _counts(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """[texts, features] float64, how often each text has each."""
        starts, found = encode(self.features, texts, self._places)
        shape = (len(texts), len(self._places))
        counts = sparse.csr_matrix((np.ones(len(found)), found, starts), shape=shape)
        counts.sum_duplicates()
        return counts

    def _values(self, counts: sparse.csr_matrix, scale: np.ndarray) -> sparse.csr_matrix:
        """What the weights are multiplied with."""
        if self.settings.classifier == "nb_svm":
            return (counts > 0).astype(np.float64)
        values = counts.copy()
        values.data = 1 + np.log(values.data)
        return normalize(values @ sparse.diags(scale.astype(np.float64)))

    def _distances(
        self, counts: sparse.csr_matrix, scale: np.ndarray, matrix: np.ndarray, offset: np.ndarray
    ) -> np.ndarray:
        """[texts, labels] float64."""
        return np.asarray(self._values(counts, scale) @ matrix.astype(np.float64)) + offset

    def _fitted(
        self, counts: sparse.csr_matrix, gold: np.ndarray, own: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[features] scale, [features, labels] matrix, [labels] offset, all float64."""
        scale = own
        if self.settings.classifier != "nb_svm":
            texts = np.bincount(counts.indices, minlength=counts.shape[1])
            # As scikit-learn smooths it: as if one more text had every feature.
            scale = own * (1 + np.log((1 + counts.shape[0]) / (1 + texts)))
            # What none of these texts has is unknown, as it is in texts to come: left in, it would
            # make the distances that are calibrated on shorter than those.
            scale[texts == 0] = 0
        values = self._values(counts, scale)
        if self.settings.classifier == "logistic":
            return scale, *_logistic(values, gold, self.labels, self.settings)
        ratios = np.ones((counts.shape[1], self.labels))
        if self.settings.classifier == "nb_svm":
            ratios = own[:, None] * _log_count_ratios(values, gold, self.labels)
        return scale, *_machines(values, ratios, gold, self.settings, self.seed)


def _labelled(train: pa.Table | None) -> tuple[list[str], np.ndarray]:
    """Texts and labels of the examples that have one."""
    if train is None:
        raise InputError("data: baselines.linear needs the split 'train'")
    train = train.filter(train["label"].is_valid())
    gold = train["label"].to_numpy()
    if len(np.unique(gold)) < 2:
        raise InputError(
            f"data: the train split has {len(np.unique(gold))} different labels; expected at least "
            "two to tell apart"
        )
    return train["text"].to_pylist(), gold


def _kind_weights(names: Sequence[str], weights: dict[Any, float]) -> np.ndarray:
    """[features] float64, what each counts by its kind."""
    return np.array([weights[name.partition(":")[0]] for name in names])


def _log_count_ratios(present: sparse.csr_matrix, gold: np.ndarray, labels: int) -> np.ndarray:
    """[features, labels] how much more often a feature is in a label's texts than in the others',
    in logarithms, each count one higher (Wang & Manning 2012, equation 2)."""
    with_label = np.asarray(present.T @ np.eye(labels)[gold]) + 1.0
    without = np.asarray(present.sum(axis=0)).T + 2.0 - with_label
    return np.log(with_label / with_label.sum(axis=0)) - np.log(without / without.sum(axis=0))


def _machines(
    values: sparse.csr_matrix,
    ratios: np.ndarray,
    gold: np.ndarray,
    settings: LinearSettings,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset of a support vector machine for each label against the rest."""
    labels = ratios.shape[1]

    def fit(label: int) -> tuple[np.ndarray, float]:
        own = gold == label
        if not own.any():
            return np.zeros(len(ratios)), -1.0
        machine = LinearSVC(
            C=settings.strength, max_iter=settings.max_iterations, random_state=seed
        )
        machine.fit(values @ sparse.diags(ratios[:, label]), own)
        return machine.coef_[0] * ratios[:, label], float(machine.intercept_[0])

    # One after the other: liblinear has one source of random numbers for all threads.
    fitted = [fit(label) for label in range(labels)]
    return np.stack([one for one, _ in fitted], axis=1), np.array([offset for _, offset in fitted])


def _logistic(
    values: sparse.csr_matrix, gold: np.ndarray, labels: int, settings: LinearSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset of multinomial logistic regression."""
    model = LogisticRegression(C=settings.strength, max_iter=settings.max_iterations)
    model.fit(values, gold)
    matrix, offset = np.zeros((values.shape[1], labels)), np.full(labels, _NEVER)
    # For two labels scikit-learn keeps the log-odds of the second.
    two = len(model.classes_) == 2
    matrix[:, model.classes_] = (
        np.vstack([-model.coef_, model.coef_]).T / 2 if two else (model.coef_.T)
    )
    offset[model.classes_] = (
        np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
    )
    return matrix, offset
