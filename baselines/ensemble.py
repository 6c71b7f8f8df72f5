"""Several finished runs as one classifier: their log-probabilities weighted and added up.

A member answers for a text from its stored predictions where they have it, and is loaded for others
only, so that large models need not be there to combine what they have said.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from baselines import mixture
from baselines.features import TextBatch, text_batches
from baselines.settings import EnsembleSettings, FittedWeights
from launcher import run_folder
from launcher.distributed import World
from launcher.errors import InputError
from launcher.method import method_module
from launcher.predictions import Predictions, prediction_files, read_predictions

TRAINS, CLASSIFIES = False, True


def trains_model(config: Any) -> bool:
    """The members are left as they are."""
    return False


def prepare(config: Any, dataset: Any) -> Any:
    """Check the members, and fit or read the weights.

    Raises:
        InputError: a member is missing or does not fit, or the weights would be fitted on what is
            evaluated.
    """
    settings: EnsembleSettings = config.ensemble
    if config.parallel.zero == 3:
        raise InputError(
            "parallel.zero: 3 shards a network, which baselines.ensemble has not: leave it out"
        )
    if not settings.members:
        raise InputError("ensemble.members: required, not given: the folders of finished runs")
    fitted = None
    for folder in settings.members:
        _check_member(Path(folder), dataset.labels)
    if settings.fit_on is not None:
        runs = [Path(folder) for folder in settings.fit_members or settings.members]
        for run in runs:
            _check_member(run, dataset.labels)
        evaluated = {split: dataset.splits[split] for split in config.data.evaluate}
        fitted = _fit(runs, settings.fit_on, evaluated)
    settings = settings.model_copy(update={"fitted": fitted})
    return config.model_copy(update={"ensemble": settings})


def build(config: Any, labels: Sequence[str]) -> "Ensemble":
    """The method; a member is loaded when a text needs it."""
    return Ensemble(config.ensemble, labels)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate the members; show the weights."""
    settings: EnsembleSettings = prepare(config, dataset).ensemble
    weights, bias = _weights(settings, len(dataset.labels))
    lines = [
        f"member: {folder}, weights {' '.join(f'{weight:.2f}' for weight in row)}"
        for folder, row in zip(settings.members, weights, strict=True)
    ]
    return [*lines, f"bias: {' '.join(f'{one:.2f}' for one in bias)}"]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    names = [Path(folder).name for folder in config.ensemble.members]
    return {"title": f"ensemble of {', '.join(names)}", "prompt": ""}


class Ensemble:
    """A log-linear mixture of finished runs; see `launcher.method.Classifier`."""

    def __init__(self, settings: EnsembleSettings, labels: Sequence[str]) -> None:
        self.module = nn.Module()
        # Tells the device that the members are to be on.
        self.module.register_buffer("place", torch.zeros(0))
        self.weights, self.bias = _weights(settings, len(labels))
        self.members = [Member(Path(folder), labels) for folder in settings.members]

    def score_batches(self, texts: Sequence[str]) -> list[TextBatch]:
        """Batches in the order of the texts."""
        return text_batches(texts)

    def scores(self, batch: TextBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        place: Any = self.module.place
        each = [member.scores(batch.texts, place.device) for member in self.members]
        return torch.from_numpy(mixture.mix(np.stack(each, axis=1), self.weights, self.bias))

    def notes(self) -> dict[str, int]:
        """Texts that a member had not predicted yet."""
        return {
            f"texts scored anew by {member.folder.name}": member.scored_anew
            for member in self.members
        }


class Member:
    """A finished run that is asked for scores."""

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.folder, self.labels = folder, list(labels)
        self.scored_anew = 0
        self._method: Any = None

    def scores(self, texts: list[str], device: torch.device) -> np.ndarray:
        """[texts, labels] float32 log-probabilities, stored ones where there are any.

        Raises:
            InputError: the run, or its model, is gone; or it only names a category.
        """
        scores = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        new = []
        for row, text in enumerate(texts):
            if (known := self._stored.get(text)) is None:
                new.append(row)
            else:
                scores[row] = known
        if new:
            from launcher.predict import open_run, scores_of

            if self._method is None:
                self._method = open_run(self.folder, World(0, 1, device))[1]
            self.scored_anew += len(new)
            scores[new] = scores_of(self._method, [texts[row] for row in new], len(self.labels))
        return scores

    @cached_property
    def _stored(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for file in prediction_files(self.folder).values():
            predictions = read_predictions(file)
            found |= zip(predictions.texts, _scores(predictions, self.folder), strict=True)
        return found


def _check_member(folder: Path, labels: Sequence[str]) -> None:
    member = run_folder.read_config(folder)
    if not method_module(member).CLASSIFIES:
        raise InputError(f"ensemble.members: {folder}: a run of {member.method} scores no labels")
    if list(member.data.labels or []) != list(labels):
        raise InputError(
            f"ensemble.members: {folder}: its labels are {', '.join(member.data.labels or [])}; "
            f"expected {', '.join(labels)}"
        )
    for file in prediction_files(folder).values():
        _scores(read_predictions(file), folder)


def _fit(runs: Sequence[Path], split: str, evaluated: Mapping[str, pa.Table]) -> FittedWeights:
    """The weights under which the gold labels of a split are most likely."""
    every = [_predictions(run, split) for run in runs]
    first = every[0]
    for run, one in zip(runs, every, strict=True):
        if not all(
            np.array_equal(getattr(one, field), getattr(first, field))
            for field in ("ids", "texts", "labels", "distributions")
        ):
            raise InputError(
                f"ensemble.fit_on: {run} and {runs[0]} have predicted other examples of {split}: "
                "run them on the same data"
            )
    fitted_on = {*zip(first.ids, first.texts, strict=True)}
    for name, table in evaluated.items():
        pairs = zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
        if both := sum(pair in fitted_on for pair in pairs):
            raise InputError(
                f"ensemble.fit_on: {both:,} examples of {name}, which is evaluated, are among "
                "those to fit the weights on: leave it out of data.evaluate, or hold out a "
                "part of the train split and give fit_members"
            )
    known = (first.labels >= 0) | (first.distributions.max(axis=1) > 0)
    if not known.any():
        raise InputError(f"ensemble.fit_on: no example of {split} has a label")
    gold = np.where(first.labels >= 0, first.labels, first.distributions.argmax(axis=1))
    scores = np.stack([_scores(one, run) for run, one in zip(runs, every, strict=True)], axis=1)
    weights, bias = mixture.fit_mixture(scores[known], gold[known])
    return FittedWeights(weights=weights.round(6).tolist(), bias=bias.round(6).tolist())


def _predictions(run: Path, split: str) -> Predictions:
    files = prediction_files(run)
    if split not in files:
        raise InputError(
            f"ensemble.fit_on: {run} has no predictions of {split}, only of {', '.join(files)}"
        )
    return read_predictions(files[split])


def _weights(settings: EnsembleSettings, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """[members, labels] weights and [labels] bias."""
    if settings.fitted is not None:
        return np.array(settings.fitted.weights), np.array(settings.fitted.bias)
    members = len(settings.members)
    given = settings.weights or [1 / members] * members
    return np.tile(np.array(given)[:, None], labels), np.zeros(labels)


def _scores(predictions: Predictions, folder: Path) -> np.ndarray:
    if predictions.scores is None or not np.isfinite(predictions.scores).all():
        raise InputError(
            f"ensemble.members: {folder} only names categories; a member must give every label a "
            "log-probability"
        )
    return predictions.scores
