"""Discrete prompts: a frozen language model is asked in words and its answer is scored."""

import random
import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launcher.errors import InputError
from prompting import models, scorer
from prompting.cpu_linear import onednn_linear
from prompting.labels import LabelTrie, build_trie, label_words, prefix_pairs
from prompting.settings import DrawnDemonstrations, PromptSettings
from prompting.template import (
    EncodedPrompt,
    Prompt,
    build_prompt,
    draw_demonstrations,
    encode_pieces,
    encode_prompt,
)

TRAINS, CLASSIFIES = False, True


def prepare(config: Any, dataset: Any) -> Any:
    """Replace drawn demonstrations by the examples, so that the stored config suffices."""
    if config.model.attention.startswith("flash"):
        raise InputError(
            f"model.attention: {config.model.attention} can't apply the mask of a label trie: use "
            "auto, sdpa or eager"
        )
    drawn = config.prompt.demonstrations
    if not isinstance(drawn, DrawnDemonstrations):
        return config
    if "train" not in dataset.splits:
        raise InputError(
            "prompt.demonstrations: drawn from the train split, which the data does not have"
        )
    labelled = dataset.splits["train"].filter(dataset.splits["train"]["label"].is_valid())
    names = [dataset.labels[i] for i in labelled["label"].to_pylist()]
    shown = draw_demonstrations(labelled["text"].to_pylist(), names, drawn.count, drawn.seed)
    prompt = config.prompt.model_copy(update={"demonstrations": shown})
    return config.model_copy(update={"prompt": prompt})


def build(config: Any, labels: Sequence[str]) -> "Discrete":
    """The method, its model loaded and its prompt and labels encoded."""
    path = models.required_path(config.model.path)
    model_config = models.check_checkpoint(path)
    tokenizer = models.load_tokenizer(path, model_config)
    asked = Question(
        config.prompt, labels, tokenizer, models.max_positions(model_config), config.run.seed
    )
    model = models.load_model(path, config.model.precision, config.model.attention)
    return Discrete(asked, model, config.evaluation.micro_batch_tokens, config.parallel.zero == 3)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer, template and label words; show one example with its ids."""
    config = prepare(config, dataset)
    example = dataset.splits[config.data.evaluate[0]]["text"][0].as_py()
    path = models.required_path(config.model.path)
    model_config = models.check_checkpoint(path)
    tokenizer = models.load_tokenizer(path, model_config)
    limit = models.max_positions(model_config)
    asked = Question(config.prompt, dataset.labels, tokenizer, limit, config.run.seed)
    ids = [*asked.encoded.head, *asked.suffixes([example])[0]]
    lines = [
        f"model: {model_config.model_type}, {limit} positions, {len(tokenizer)} ids",
        "prompt:",
    ]
    lines += [f"  {line}" for line in asked.prompt.text_with(example).split("\n")]
    lines += [f"  ids {ids}", f"  of which common to all texts: {len(asked.encoded.head)}"]
    for word, word_ids in zip(asked.words, asked.trie.words, strict=True):
        lines.append(f"label word {word}: ids {list(word_ids)}")
    return lines + [f"warning: {warning}" for warning in asked.warnings]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return {"title": config.prompt.template.name, "prompt": config.prompt.template.question}


class Question:
    """The prompt and the labels as token ids: everything but the model."""

    def __init__(
        self,
        settings: PromptSettings,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_positions: int,
        seed: int,
    ) -> None:
        words = label_words(labels, settings.verbalizer)
        main_word = dict(zip(labels, (own[0] for own in words), strict=True))
        demonstrations = settings.demonstrations
        assert isinstance(demonstrations, list), "prepare() draws them"
        for shown in demonstrations:
            if shown.label not in main_word:
                raise InputError(
                    f"prompt.demonstrations: label {shown.label!r} of {shown.text!r} is not one of "
                    f"{', '.join(labels)}"
                )
        self.settings = settings
        self.tokenizer = tokenizer
        self.labels = list(labels)
        self.words = [word for own in words for word in own]
        self.owners = [label for label, own in enumerate(words) for _ in own]
        self.prompt: Prompt = build_prompt(
            settings.template,
            [main_word[label] for label in _ordered(settings.choice_order, labels, seed)],
            demonstrations,
            main_word,
        )
        self.encoded: EncodedPrompt = encode_prompt(self.prompt, tokenizer)
        encode = partial(encode_pieces, tokenizer)
        if not self.encoded.tail:
            raise InputError(
                f"prompt.template {settings.template.name!r}: nothing follows the text that leads "
                "to the label word: give answer some words, as in '答案:'"
            )
        ids = [encode([word + settings.label_suffix for word in own]) for own in words]
        self.trie: LabelTrie = build_trie(words, ids, tokenizer.unk_token_id)
        self.warnings = [
            f"the label word {self.words[short]!r} begins {self.words[long]!r}, so the sum of its "
            "tokens can never be the less likely; prompt.label_suffix can close each word"
            for short, long in prefix_pairs(self.trie)
            if settings.scoring != "generate"
        ]
        longest = max(map(len, self.trie.words))
        answer = settings.max_new_tokens if settings.scoring == "generate" else longest - 1
        if settings.scoring == "generate" and answer < longest:
            word = self.words[[*map(len, self.trie.words)].index(longest)]
            raise InputError(
                f"prompt.max_new_tokens: {answer}, but the label word {word!r} has {longest} "
                "tokens and could never be named: raise it"
            )
        self.room = max_positions - len(self.encoded.head) - len(self.encoded.tail) - answer
        """Tokens that a text may have."""
        if self.room < 1:
            raise InputError(
                f"prompt: {len(self.encoded.head) + len(self.encoded.tail)} tokens of prompt and "
                f"{answer} of answer leave no room for a text in the model's {max_positions} "
                "positions: use fewer demonstrations or a shorter template"
            )
        self.truncated = 0

    def suffixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text and what follows it; a text too long for the model loses its end."""
        encoded = encode_pieces(self.tokenizer, texts, first=not self.prompt.head)
        self.truncated += sum(len(ids) > self.room for ids in encoded)
        return [ids[: self.room] + self.encoded.tail for ids in encoded]


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
        generates = self.asked.settings.scoring == "generate"
        return list(
            scorer.length_batches(
                self.asked.suffixes(texts),
                tokens=self.micro_batch_tokens,
                fed=0 if generates else len(self.asked.trie.tokens),
                vocabulary=self.module.config.get_text_config().vocab_size,
            )
        )

    def scores(self, batch: scorer.ScoringBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        with torch.inference_mode(), onednn_linear(self.module):
            return self._scores(batch)

    def notes(self) -> dict[str, int]:
        """Texts cut to fit the model's positions."""
        return {"truncated_texts": self.asked.truncated}

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


def _ordered(order: str | list[str], labels: Sequence[str], seed: int) -> list[str]:
    if isinstance(order, list):
        if sorted(order) != sorted(labels):
            raise InputError(
                f"prompt.choice_order: expected each of {', '.join(labels)} once; seen "
                f"{', '.join(order)}"
            )
        return order
    ordered = list(labels)
    if order == "reversed":
        ordered.reverse()
    elif order == "shuffled":
        random.Random(seed).shuffle(ordered)
    return ordered
