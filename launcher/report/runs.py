"""Runs as a report needs them: what was asked, what was answered, and which of them compare."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launcher.errors import InputError
from launcher.metrics import summarise
from launcher.predictions import Predictions, prediction_files, read_predictions

SYNTHETIC = "Synthetic data: figures show that the tool works, not how good a method is."


@dataclass(frozen=True, eq=False)
class Examples:
    """The n examples with a gold label of one split, in the order of their ids; L labels."""

    split: str
    labels: tuple[str, ...]
    ids: np.ndarray  # [n] str
    texts: np.ndarray  # [n] str
    gold: np.ndarray  # [n] label
    shares: np.ndarray  # [n, L] float32

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spread(self) -> bool:
        """Whether some gold distribution has more than one label."""
        return bool(((self.shares > 0).sum(axis=1) > 1).any())

    @cached_property
    def place(self) -> np.ndarray:
        """[n, L] int: place of each label among the gold shares from 0; L where its share is 0."""
        labels = self.shares.shape[1]
        order = np.argsort(-self.shares, axis=1, kind="stable")
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(labels)[None, :], axis=1)
        return np.where(self.shares > 0, place, labels)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a run said to the n examples."""

    examples: Examples
    predicted: np.ndarray  # [n] label, -1 for an output that named none
    probabilities: np.ndarray | None  # [n, L] float32; None where the run has no scores

    def right(self, k: int = 1) -> np.ndarray:
        """[n] bool: right by the study's Acc@k (see `launcher.metrics.compute`)."""
        rows = np.arange(len(self.predicted))
        place = self.examples.place[rows, np.maximum(self.predicted, 0)]
        # `place` is the number of labels where the share is 0, which k must not reach.
        limit = min(k, len(self.examples.labels))
        return (self.predicted >= 0) & (place < limit)

    def margins(self) -> np.ndarray | None:
        """[n] probability of the predicted label minus that of the gold label."""
        if self.probabilities is None:
            return None
        rows = np.arange(len(self.predicted))
        own = self.probabilities[rows, np.maximum(self.predicted, 0)]
        return own - self.probabilities[rows, self.examples.gold]


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    folder: Path
    title: str
    prompt: str | None
    method: str | None
    synthetic: bool
    config: dict[str, Any]  # empty where the folder has no config.yaml
    environment: dict[str, Any]
    metrics: dict[str, Any]  # the content of metrics.json
    answers: dict[str, Answers]  # by split

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.absolute().name

    @property
    def seed(self) -> int | None:
        return (self.config.get("run") or {}).get("seed")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that answered the same examples; `differs` says in what from those of the first."""

    examples: Examples
    runs: list[Run]
    differs: str | None

    @property
    def split(self) -> str:
        return self.examples.split

    @property
    def folder_names(self) -> list[str]:
        """Name of each run's folder, or its path where names are not different."""
        names = [run.name for run in self.runs]
        return names if len(set(names)) == len(names) else [str(run.folder) for run in self.runs]

    @property
    def names(self) -> list[str]:
        """How lists of runs call them: by title where each has its own, else by folder."""
        titles = [run.title for run in self.runs]
        return titles if len(set(titles)) == len(titles) else self.folder_names

    def answers(self) -> list[Answers]:
        """Of each run."""
        return [run.answers[self.split] for run in self.runs]


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs, each once.

    Raises:
        InputError: one is missing, unfinished, without predictions or unreadable.
    """
    known: dict[str, Examples] = {}
    return [_read_run(folder, known) for folder in dict.fromkeys(run_dirs)]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs that can be compared together; others in a group of their own for each split."""
    members: dict[int, tuple[Examples, list[Run]]] = {}
    for run in runs:
        for answers in run.answers.values():
            examples = answers.examples
            members.setdefault(id(examples), (examples, []))[1].append(run)
    (first, _), *_ = members.values()
    return [
        Group(examples, inside, _difference(first, examples))
        for examples, inside in members.values()
    ]


def is_synthetic(runs: Sequence[Run]) -> bool:
    return any(run.synthetic for run in runs)


def _difference(first: Examples, other: Examples) -> str | None:
    if first is other:
        return None
    if first.split != other.split:
        return "split"
    # With other labels the gold labels differ anyway.
    return "labels" if first.labels != other.labels else "examples or gold labels"


def _read_run(folder: Path, known: dict[str, Examples]) -> Run:
    files = prediction_files(folder)
    predictions = {split: read_predictions(path) for split, path in files.items()}
    metrics = summarise(predictions)
    config = read_mapping(folder / "config.yaml", yaml.safe_load)
    row = read_mapping(folder / "report_row.json", json.loads)
    prompt = config.get("prompt") or {}
    template = prompt.get("template")
    question = template if isinstance(template, dict) else prompt
    return Run(
        folder=folder,
        title=str(row.get("title") or folder.absolute().name),
        prompt=row.get("prompt") or question.get("question"),
        method=row.get("method") or config.get("method"),
        synthetic=any(given.get("synthetic") is True for given in (row, metrics["provenance"])),
        config=config,
        environment=read_mapping(folder / "environment.json", json.loads),
        metrics=metrics,
        answers={split: _answers(split, one, known) for split, one in predictions.items()},
    )


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file, {} where there is no file."""
    if not path.exists():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected keys and values, seen {type(value).__name__}")
    return value


def _answers(split: str, one: Predictions, known: dict[str, Examples]) -> Answers:
    labelled = (one.labels >= 0) | (one.distributions.max(axis=1, initial=0) > 0)
    order = np.flatnonzero(labelled)
    order = order[one.ids[order].argsort(kind="stable")]
    shares = one.distributions[order]
    labels = one.labels[order]
    gold = np.where(labels >= 0, labels, shares.argmax(axis=1))
    examples = Examples(
        split, tuple(one.label_names), one.ids[order], one.texts[order], gold, shares
    )
    # Runs on the same examples share them: ten runs take little more memory than one.
    examples = known.setdefault(_digest(examples), examples)
    probabilities = None
    if one.scores is not None:
        scores = one.scores[order]
        probabilities = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Answers(examples, one.predicted[order], probabilities)


def _digest(examples: Examples) -> str:
    texts = [examples.split, *examples.labels, *examples.ids, *examples.texts]
    digest = hashlib.sha256(json.dumps(texts).encode())
    digest.update(examples.gold.astype(np.int32).tobytes() + examples.shares.tobytes())
    return digest.hexdigest()
