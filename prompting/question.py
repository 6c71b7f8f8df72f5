"""A prompt and its labels as token ids: everything that is asked of a model but the model."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from launcher import pretrained
from launcher.errors import InputError
from prompting import models, scorer
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


def read_question(config: Any, labels: Sequence[str]) -> tuple["Question", PretrainedConfig]:
    """The question of a prepared config, and the config of its model, whose files are checked."""
    path = pretrained.required_path(config.model.path)
    model_config = models.check_checkpoint(path)
    tokenizer = models.load_tokenizer(path, model_config)
    limit = models.max_positions(model_config)
    vocabulary = model_config.get_text_config().vocab_size
    asked = Question(config.prompt, labels, tokenizer, limit, config.run.seed, vocabulary)
    return asked, model_config


class Question:
    """The prompt and the labels as token ids.

    Args:
        vocabulary: rows of the model's embedding; ids from there on are the prompt's soft vectors.
    """

    def __init__(
        self,
        settings: PromptSettings,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_positions: int,
        seed: int,
        vocabulary: int = 0,
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
        self.encoded: EncodedPrompt = encode_prompt(self.prompt, tokenizer, vocabulary)
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
            soft = sum(span.length for span in self.prompt.spans)
            raise InputError(
                f"prompt: {len(self.encoded.head) + len(self.encoded.tail)} tokens of prompt"
                f"{f' ({soft} of them soft)' if soft else ''} and {answer} of answer leave no room "
                f"for a text in the model's {max_positions} positions: use "
                f"{'fewer soft vectors' if soft else 'fewer demonstrations'} or a shorter template"
            )
        self.truncated: set[str] = set()
        """Texts that did not fit."""

    def suffixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text and what follows it; a text too long for the model loses its end."""
        encoded = encode_pieces(self.tokenizer, texts, first=not self.prompt.head)
        pairs = zip(texts, encoded, strict=True)
        self.truncated.update(text for text, ids in pairs if len(ids) > self.room)
        return [ids[: self.room] + self.encoded.tail for ids in encoded]

    def batches(
        self, texts: Sequence[str], *, tokens: int, vocabulary: int
    ) -> list[scorer.ScoringBatch]:
        """The texts' prompts in batches of equal length; see `scorer.length_batches`."""
        fed = 0 if self.settings.scoring == "generate" else len(self.trie.tokens)
        suffixes = self.suffixes(texts)
        return [*scorer.length_batches(suffixes, tokens=tokens, fed=fed, vocabulary=vocabulary)]

    def lines(self, text: str) -> list[str]:
        """The prompt with `text` and everything's ids, for a reader."""
        ids = [*self.encoded.head, *self.suffixes([text])[0]]
        lines = ["prompt:", *(f"  {line}" for line in self.prompt.text_with(text).split("\n"))]
        lines += [f"  ids {ids}", f"  of which common to all texts: {len(self.encoded.head)}"]
        for word, word_ids in zip(self.words, self.trie.words, strict=True):
            lines.append(f"label word {word}: ids {list(word_ids)}")
        return lines + [f"warning: {warning}" for warning in self.warnings]


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
