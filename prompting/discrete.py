"""Discrete prompts: a frozen language model is asked in words and its answer is scored."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from launcher.cpu_linear import onednn_linear
from launcher.errors import InputError
from launcher.footprint import Footprint
from prompting import models, question, scorer
from prompting.question import Question

TRAINS, CLASSIFIES = False, True


def trains_model(config: Any) -> bool:
    """Nothing is trained."""
    return False


def prepare(config: Any, dataset: Any) -> Any:
    """Fix what depends on the data; see `question.prepare`."""
    if config.prompt.template.soft_spans:
        raise InputError(
            f"prompt.template {config.prompt.template.name!r}: it has soft spans, which "
            "prompting.discrete can't fill; use method prompting.tuning"
        )
    return question.prepare(config, dataset)


def build(config: Any, labels: Sequence[str]) -> "Discrete":
    """The method, its model loaded and its prompt and labels encoded."""
    asked, _ = question.read_question(config, labels)
    model = models.load_model(
        config.model.path,
        config.model.precision,
        config.model.attention,
        memory_mapped=config.model.weights == "memory_mapped",
    )
    return Discrete(asked, model, config.evaluation.micro_batch_tokens, config.parallel.zero == 3)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer, template and label words; show one example with its ids."""
    config = prepare(config, dataset)
    example = dataset.splits[config.data.evaluate[0]]["text"][0].as_py()
    asked, model_config = question.read_question(config, dataset.labels)
    return [*models.lines(model_config, asked.tokenizer), *asked.lines(example)]


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    from prompting.footprint import of_discrete  # it builds this module's method

    return of_discrete(config, dataset, ranks)


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return {"title": config.prompt.template.name, "prompt": config.prompt.template.question}


class Discrete:
    """A frozen model that is asked; see `launcher.method.Classifier`."""

    def __init__(
        self, asked: Question, model: PreTrainedModel, micro_batch_tokens: int, lockstep: bool
    ) -> None:
        self.module = model
        self.asked = asked
        self.micro_batch_tokens = micro_batch_tokens
        self.lockstep = lockstep
        self._prefix: scorer.Prefix | None = None
        self._empty: Tensor | None = None

    def score_batches(self, texts: Sequence[str]) -> list[scorer.ScoringBatch]:
        """Batches of equal length, the longest first so that memory peaks at once."""
        vocabulary = self.module.config.get_text_config().vocab_size
        return self.asked.batches(texts, tokens=self.micro_batch_tokens, vocabulary=vocabulary)

    def scores(self, batch: scorer.ScoringBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        with torch.inference_mode(), onednn_linear(self.module):
            return self._scores(batch)

    def notes(self) -> dict[str, int]:
        """Texts cut to fit the model's positions."""
        return {"truncated_texts": len(self.asked.truncated)}

    def _scores(self, batch: scorer.ScoringBatch) -> Tensor:
        asked, model = self.asked, self.module
        scoring = asked.settings.scoring
        if self._prefix is None:
            self._prefix = scorer.compute_prefix(model, asked.encoded.head)
            if scoring == "pmi":
                nothing = torch.tensor([asked.encoded.tail])
                self._empty = scorer.score_words(model, self._prefix, nothing, asked.trie)
        if scoring == "generate":
            return self._named(batch)
        words = scorer.score_words(model, self._prefix, batch.ids, asked.trie)
        return scorer.label_scores(words, asked.trie, scoring, self._empty)

    def _named(self, batch: scorer.ScoringBatch) -> Tensor:
        """0 for the label named first in the greedy output, the longest where several begin."""
        assert self._prefix is not None
        outputs = scorer.generate(
            self.module,
            self._prefix,
            batch.ids,
            new_tokens=self.asked.settings.max_new_tokens,
            lockstep=self.lockstep,
        )
        scores = torch.full((len(outputs), len(self.asked.labels)), -torch.inf)
        for row, ids in enumerate(outputs):
            output = _plain(str(self.asked.tokenizer.decode(ids)))
            named = zip(map(_plain, self.asked.words), self.asked.owners, strict=True)
            found = [(output.find(w), -len(w), owner) for w, owner in named if w in output]
            if found:
                scores[row, min(found)[2]] = 0.0
        return scores


def _plain(text: str) -> str:
    """Without spaces and width variants, which tokenizers add or remove when they decode."""
    return "".join(unicodedata.normalize("NFKC", text).split())
