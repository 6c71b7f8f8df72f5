"""What the prompting methods' steps need, for the planner; see `launcher.footprint`.

A model folder needs its config and its vocabulary for that, not its weights.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import prompting.pangu  # noqa: F401  registers PanGu with the Auto classes
from launcher import footprint
from launcher.engine import DTYPES
from launcher.footprint import Footprint
from launcher.pretrained import readable_errors, recompute_layers, required_path
from prompting import models, question, soft_prompt
from prompting.discrete import Discrete
from prompting.pangu import PanguTokenizer, train_vocabulary
from prompting.pretrain import Pretraining, nano
from prompting.question import Question
from prompting.tuning import Tuning

_VOCABULARY_TEXTS = 20_000


def of_discrete(config: Any, dataset: Any, ranks: int) -> Footprint:
    """Scoring of the first split to evaluate."""
    model = _model(config)
    asked = _question(question.prepare(config, dataset), dataset, model)
    method = Discrete(asked, model, config.evaluation.micro_batch_tokens, lockstep=False)
    table = dataset.splits[config.data.evaluate[0]]
    return footprint.of_scoring(config, method, table, ranks, prefix=_prefix_bytes(model, asked))


def of_tuning(config: Any, dataset: Any, ranks: int) -> Footprint:
    """A step on the train split, or scoring in between where that needs more memory."""
    model = _model(config, config.tuning.dropout)
    config = question.prepare(config, dataset)
    template = config.prompt.template
    if config.tuning.kind != "lora":
        tokenizer = models.load_tokenizer(config.model.path, model.config)
        template = soft_prompt.soften(template, tokenizer, config.tuning.length)
    prompt = config.prompt.model_copy(update={"template": template})
    config = config.model_copy(update={"prompt": prompt})
    asked = _question(config, dataset, model)
    with torch.random.fork_rng():
        method = Tuning(config, asked, model, {})
    method.module.to("meta")
    return footprint.of_training(
        config,
        method,
        dataset.splits["train"],
        ranks,
        scored=dataset.splits.get("dev"),
        prefix=_prefix_bytes(model, asked),
    )


def of_pretrain(config: Any, dataset: Any, ranks: int) -> Footprint:
    """A step on the train split. Where a vocabulary is still to be trained, one of some texts."""
    settings, train = config.pretrain, dataset.splits["train"]
    tokenizer: Any
    model: Any
    if settings.shape is None:
        model = _model(config)
        tokenizer = models.load_tokenizer(config.model.path, model.config)
    else:
        tokenizer = _vocabulary(settings.shape, train, dataset.labels)
        with torch.device("meta"):
            model = nano(settings, len(tokenizer), 0)
            torch.nn.Module.to(model, dtype=DTYPES[config.model.precision])
    if config.parallel.activation_checkpointing:
        recompute_layers(model)
    method = Pretraining(settings, dataset.labels, model, tokenizer, config.run.seed)
    return footprint.of_training(config, method, train, ranks)


def _model(config: Any, dropout: float | None = None) -> PreTrainedModel:
    """The model of a folder or hub id by its config alone, on the device `meta`."""
    path = required_path(config.model.path)
    attention = config.model.attention.replace("auto", "sdpa")
    dtype = DTYPES[config.model.precision]
    with readable_errors(path), torch.device("meta"):
        described = AutoConfig.from_pretrained(path)
        if dropout is not None:
            for name in models.DROPOUTS:
                if hasattr(described.get_text_config(), name):
                    setattr(described.get_text_config(), name, dropout)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            described, dtype=dtype, attn_implementation=attention
        )
    return model


def _question(config: Any, dataset: Any, model: PreTrainedModel) -> Question:
    tokenizer = models.load_tokenizer(config.model.path, model.config)
    limit = models.max_positions(model.config)
    vocabulary = model.config.get_text_config().vocab_size
    return Question(config.prompt, dataset.labels, tokenizer, limit, config.run.seed, vocabulary)


def _prefix_bytes(model: Any, asked: Question) -> int:
    """Keys and values of the shared prefix in all layers."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = size * (getattr(text, "num_key_value_heads", None) or heads)
    return int(2 * text.num_hidden_layers * len(asked.encoded.head) * width * model.dtype.itemsize)


def _vocabulary(shape: Any, train: Any, labels: list[str]) -> PanguTokenizer:
    if shape.vocabulary is not None:
        return PanguTokenizer(shape.vocabulary)
    texts = train["text"].slice(0, _VOCABULARY_TEXTS).to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.model"
        train_vocabulary([*texts, *labels], path, shape.vocabulary_size)
        return PanguTokenizer(path)
