"""Fine-tuning of T5, mT5 and ByT5, which answer with a label's word.

A label's score is the log-probability of its word's tokens, the end of the text among them. All
words are given to the decoder together; nothing is generated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from transformers import (
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune import checkpoints, method, tokenization
from finetune.examples import Examples, TextBatch
from finetune.method import Finetuned, Network
from finetune.settings import Seq2seqSettings
from finetune.tokenization import load_tokenizer
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.throughput import transformer_flops
from prompting.labels import LabelTrie

TRAINS, CLASSIFIES = True, True
_KINDS = ("t5", "mt5", "umt5")


def trains_model(config: Any) -> bool:
    """Its weights, or LoRA's updates in it are."""
    return True


def prepare(config: Any, dataset: Any) -> Any:
    """Fix what depends on the data; see `method.prepare`."""
    prepared = method.prepare(config, dataset)
    _check(config, dataset.labels)
    return prepared


def build(config: Any, labels: Sequence[str]) -> "Seq2seq":
    """The method, its model loaded and its label words encoded."""
    return _build(config, labels, checkpoints.source(config), checkpoints.load)


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    return method.footprint(config, dataset, ranks, prepare, _build)


def _build(config: Any, labels: Sequence[str], path: str, load: checkpoints.Loader) -> "Seq2seq":
    model_config = _t5_config(path)
    model, _ = load(path, AutoModelForSeq2SeqLM, config, config.run.seed)
    if getattr(model.config, "decoder_start_token_id", None) is None:
        # Old config files lack it; T5 starts with padding.
        model.config.decoder_start_token_id = model.config.pad_token_id
    tokenizer = load_tokenizer(path, model_config)
    words = _label_words(config, labels, tokenizer)
    network = Seq2seqNetwork(model, words, config.finetune.trains)
    return Seq2seq(config, labels, tokenizer, network, set())


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer, label words and settings; show one example with its ids."""
    config = method.prepare(config, dataset)
    model = _check(config, dataset.labels)
    tokenizer, lines = method.read_texts(config, dataset)
    words = _label_words(config, dataset.labels, tokenizer).words
    named = zip(dataset.labels, words, strict=True)
    return [
        *lines,
        *(f"label {label}: ids {[*ids]}" for label, ids in named),
        f"objective: {config.seq2seq.objective}, {model.num_parameters():,} parameters",
    ]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return method.describe(config)


class Seq2seq(Finetuned):
    """See `Finetuned`; the logits are the log-probabilities of the label words."""

    task = "SEQ_2_SEQ_LM"

    def __init__(
        self,
        config: Any,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        network: "Seq2seqNetwork",
        head_names: set[str],
    ) -> None:
        super().__init__(config, labels, tokenizer, network, head_names)
        self.objective = config.seq2seq.objective
        self.word_lengths = network.trie.lengths.long()
        self.fed = network.words.numel()

    def loss(self, batch: TextBatch) -> Tensor:
        """See `Finetuned.loss`; or the sum of the cross-entropies of the right word's tokens."""
        if self.objective == "classification":
            return super().loss(batch)
        assert batch.targets is not None and batch.counts is not None
        right = batch.targets.argmax(dim=1)
        scores = self._logits(batch, right)
        return -(scores * batch.counts.to(scores.device)).sum()

    def flops(self, lengths: Any) -> float:
        """Model FLOPs of a training step on examples of these lengths."""
        trained, network = self.settings.trains == "all", self._network()
        assert isinstance(network, Seq2seqNetwork)
        words, rows = len(network.trie.words), len(lengths)
        decoded, predicted = network.words.numel(), 1 + len(network.trie.fed)
        if self.objective == "language_modelling":
            decoded, predicted = decoded // words, decoded // words
        own = int(lengths.sum()) - rows * self._beside()
        return (
            transformer_flops(weights=network.sizes[0], tokens=own, trained=trained)
            + transformer_flops(weights=network.sizes[1], tokens=rows * decoded, trained=trained)
            + transformer_flops(weights=network.sizes[2], tokens=rows * predicted, trained=trained)
        )

    def _examples(self, tokens: tokenization.Tokens, names: list[str], targets: Any) -> Examples:
        counts = targets @ self.class_weights.numpy()
        # The mean is over the answers' tokens, as transformers' is.
        lengths: Any = 1
        if self.objective == "language_modelling":
            lengths = targets @ self.word_lengths.numpy()
        return Examples(
            tokens, names, targets, counts, pad=self.pad, fed=self._beside(), predicted=lengths
        )

    def _beside(self) -> int:
        """Tokens decoded for each example in training."""
        words = len(self.word_lengths)
        return self.fed // words if self.objective == "language_modelling" else self.fed


class Seq2seqNetwork(Network):
    """[rows, labels] log-probabilities of the label words, each after the text alone."""

    words: Tensor
    """[labels, longest] int64, what the decoder is given of each word."""
    targets: Tensor
    """[labels, longest] int64, what follows each of these, padded."""
    contexts: Tensor
    """[contexts] int64, where in `words` each context of the trie is computed."""

    def __init__(self, model: PreTrainedModel, trie: LabelTrie, trains: str) -> None:
        super().__init__(model, None, trains)
        self.trie = trie
        config: Any = model.config
        longest = max(map(len, trie.words))
        fill = config.pad_token_id
        targets = torch.tensor([[*word, *[fill] * (longest - len(word))] for word in trie.words])
        words = padded(targets[:, :-1], (1, 0), value=config.decoder_start_token_id)
        contexts = []
        for path in [(), *trie.fed]:
            first = next(i for i, word in enumerate(trie.words) if word[: len(path)] == path)
            contexts.append(first * longest + len(path))
        for name, buffer in (
            ("targets", targets),
            ("words", words),
            ("contexts", torch.tensor(contexts)),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.sizes = _sizes(model)

    def forward(
        self, ids: Tensor, mask: Tensor | None, lengths: Tensor, right: Tensor | None = None
    ) -> Tensor:
        """See `Finetuned`; given `right` [rows], the label of each, only of that one: [rows]."""
        states = self.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        lengths_of = self.trie.lengths.to(ids.device)
        if right is not None:
            targets = self.targets[right]
            log_probs = self._logits(self._decoded(self.words[right], states, mask)).log_softmax(2)
            own = log_probs.take_along_dim(targets[:, :, None], dim=2)[:, :, 0]
            places = torch.arange(targets.shape[1], device=ids.device)
            return (own * (places < lengths_of[right][:, None])).sum(dim=1)
        count = len(self.words)
        states = states.repeat_interleave(count, dim=0)
        mask = None if mask is None else mask.repeat_interleave(count, dim=0)
        decoded = self._decoded(self.words.repeat(len(ids), 1), states, mask)
        logits = self._logits(decoded.reshape(len(ids), -1, decoded.shape[2])[:, self.contexts])
        sources, tokens = (list(column) for column in zip(*self.trie.edges, strict=True))
        chosen = logits[:, sources, tokens] - logits.logsumexp(dim=2)[:, sources]
        return chosen @ self.trie.steps.T.to(chosen.device)

    def _decoded(self, words: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        outputs = self.model.decoder(
            input_ids=words,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        decoded: Tensor = outputs.last_hidden_state
        return decoded

    def _logits(self, decoded: Tensor) -> Tensor:
        config: Any = self.model.config
        if getattr(config, "scale_decoder_outputs", False):
            decoded = decoded * config.d_model**-0.5
        logits: Tensor = self.model.lm_head(decoded)
        return logits.float()


def _check(config: Any, labels: Sequence[str]) -> PreTrainedModel:
    path, settings = config.model.path, config.finetune
    model_config = _t5_config(path)
    if config.model.precision == "fp16":
        raise InputError(
            f"model.precision: fp16, in which {model_config.model_type} overflows: use bf16 or fp32"
        )
    if settings.trains == "head" or settings.multi_label:
        wrong = "trains: head" if settings.trains == "head" else "multi_label: true"
        raise InputError(
            f"finetune.{wrong}, but {model_config.model_type} answers with words and has no head "
            "for labels: leave it out"
        )
    seq2seq: Seq2seqSettings = config.seq2seq
    plain = not (settings.soft_targets or settings.label_smoothing or settings.levels)
    if seq2seq.objective == "language_modelling" and not plain:
        raise InputError(
            "seq2seq.objective: language_modelling learns one word a text: use classification, or "
            "leave soft_targets, label_smoothing and levels out"
        )
    _label_words(config, labels, load_tokenizer(path, model_config))
    return checkpoints.check(path, AutoModelForSeq2SeqLM)


def _t5_config(path: str) -> PretrainedConfig:
    config = checkpoints.read_config(path)
    if config.model_type not in _KINDS:
        raise InputError(
            f"model.path {path}: expected one of {', '.join(_KINDS)}, seen {config.model_type}: "
            "use method finetune.encoder or finetune.decoder"
        )
    return config


def _label_words(
    config: Any, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> LabelTrie:
    """The labels' words as ids, each with the end of the text.

    Raises:
        InputError: a name is no label, a word has an unknown id, or two have the same ids.
    """
    given: dict[str, str] = config.seq2seq.label_words
    for name in given:
        if name not in labels:
            raise InputError(
                f"seq2seq.label_words: {name!r} is no label; the labels are {', '.join(labels)}"
            )
    names = [given.get(label, label) for label in labels]
    encoded = tokenization.encode(tokenizer, names, 10**6)
    words = [tuple(encoded[row].tolist()) for row in range(len(names))]
    for row, word in enumerate(words):
        advice = "give another one in seq2seq.label_words, as in {动画: animation}"
        if tokenizer.unk_token_id in word:
            raise InputError(
                f"seq2seq.label_words: the tokenizer does not know {names[row]!r}, ids {[*word]}: "
                f"{advice}"
            )
        if word in words[:row]:
            raise InputError(
                f"seq2seq.label_words: {names[words.index(word)]!r} and {names[row]!r} have the "
                f"same ids {[*word]}: {advice}"
            )
    return LabelTrie(tuple(words), tuple(range(len(words))))


def _sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Weights that a token is multiplied with in the encoder, the decoder and the output layer."""
    own: Any = model
    encoder, decoder = map(checkpoints.multiplied_weights, (own.encoder, own.decoder))
    return encoder, decoder, own.config.d_model * own.config.vocab_size
