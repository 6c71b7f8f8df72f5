"""UER-py checkpoints of BERT, RoBERTa, ALBERT and GPT-2 as folders that transformers reads.

UER's LayerNorm divides by the sample standard deviation plus 1e-6, transformers' by the root of the
variance plus an epsilon: the same weights give states that differ by some 1e-3, not more.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from launcher.errors import InputError
from launcher.pretrained import quiet

_ACTIVATIONS = {"gelu": "gelu", "gelu_fast": "gelu_new", "relu": "relu"}
_OUTPUTS = ("cls.predictions.decoder.weight", "predictions.decoder.weight", "lm_head.weight")
# Patterns of UER's names and what they become; `\1` is the layer's number.
_Rules = list[tuple[str, str]]


def _layer(source: str, target: str, parts: dict[str, str]) -> _Rules:
    return [(f"{source}{own}", f"{target}{other}") for own, other in parts.items()]


_BERT: _Rules = [
    (r"embedding\.word\.embedding", "bert.embeddings.word_embeddings"),
    (r"embedding\.pos\.embedding", "bert.embeddings.position_embeddings"),
    (r"embedding\.seg\.embedding", "bert.embeddings.token_type_embeddings"),
    (r"embedding\.layer_norm", "bert.embeddings.LayerNorm"),
    *_layer(
        r"encoder\.transformer\.(\d+)\.",
        r"bert.encoder.layer.\1.",
        {
            r"self_attn\.linear_layers\.0": "attention.self.query",
            r"self_attn\.linear_layers\.1": "attention.self.key",
            r"self_attn\.linear_layers\.2": "attention.self.value",
            r"self_attn\.final_linear": "attention.output.dense",
            "layer_norm_1": "attention.output.LayerNorm",
            r"feed_forward\.linear_1": "intermediate.dense",
            r"feed_forward\.linear_2": "output.dense",
            "layer_norm_2": "output.LayerNorm",
        },
    ),
    (r"target\.(?:sp\.)?linear_1|output_layer_1", "bert.pooler.dense"),
    (r"target\.(?:sp\.)?linear_2", "cls.seq_relationship"),
    (r"target\.mlm(?:\.|_)linear_1", "cls.predictions.transform.dense"),
    (r"target\.(?:mlm\.)?layer_norm", "cls.predictions.transform.LayerNorm"),
    (r"target\.mlm(?:\.|_)linear_2", "cls.predictions.decoder"),
    ("output_layer_2", "classifier"),
]
_ALBERT: _Rules = [
    (r"embedding\.word\.embedding", "albert.embeddings.word_embeddings"),
    (r"embedding\.pos\.embedding", "albert.embeddings.position_embeddings"),
    (r"embedding\.seg\.embedding", "albert.embeddings.token_type_embeddings"),
    (r"embedding\.layer_norm", "albert.embeddings.LayerNorm"),
    (r"encoder\.linear", "albert.encoder.embedding_hidden_mapping_in"),
    *_layer(
        r"encoder\.transformer\.",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.",
        {
            r"self_attn\.linear_layers\.0": "attention.query",
            r"self_attn\.linear_layers\.1": "attention.key",
            r"self_attn\.linear_layers\.2": "attention.value",
            r"self_attn\.final_linear": "attention.dense",
            "layer_norm_1": "attention.LayerNorm",
            r"feed_forward\.linear_1": "ffn",
            r"feed_forward\.linear_2": "ffn_output",
            "layer_norm_2": "full_layer_layer_norm",
        },
    ),
    (r"target\.sp\.linear_1|output_layer_1", "albert.pooler"),
    (r"target\.sp\.linear_2", "sop_classifier.classifier"),
    (r"target\.mlm\.linear_1", "predictions.dense"),
    (r"target\.mlm\.layer_norm", "predictions.LayerNorm"),
    (r"target\.mlm\.linear_2", "predictions.decoder"),
    ("output_layer_2", "classifier"),
]
_GPT2: _Rules = [
    (r"embedding\.word\.embedding", "transformer.wte"),
    (r"embedding\.pos\.embedding", "transformer.wpe"),
    *_layer(
        r"encoder\.transformer\.(\d+)\.",
        r"transformer.h.\1.",
        {
            r"self_attn\.linear_layers\.0": "attn.c_attn.q",
            r"self_attn\.linear_layers\.1": "attn.c_attn.k",
            r"self_attn\.linear_layers\.2": "attn.c_attn.v",
            r"self_attn\.final_linear": "attn.c_proj",
            "layer_norm_1": "ln_1",
            r"feed_forward\.linear_1": "mlp.c_fc",
            r"feed_forward\.linear_2": "mlp.c_proj",
            "layer_norm_2": "ln_2",
        },
    ),
    (r"encoder\.layer_norm", "transformer.ln_f"),
    (r"target\.lm\.output_layer", "lm_head"),
]


def convert(source: Path, folder: Path, config: Path, vocabulary: Path) -> str:
    """Write the checkpoint `source` as the new folder `folder`, which appears whole or not at all.

    Args:
        config: UER's JSON file for the model, for what weights don't tell: heads, dropout,
            activation.
        vocabulary: `vocab.txt`, one token a line.

    Returns:
        The name of the class that it is a checkpoint of.

    Raises:
        InputError: a file is missing or of another kind, or a weight has no place in the model.
    """
    if folder.exists():
        raise InputError(f"{folder}: already exists: choose another folder or remove it first")
    settings = _read_json(config)
    weights = _read_weights(source)
    make, rules = _kind(weights)
    state = _renamed(weights, rules, source)
    model = make(settings, state)
    rows = len(weights["embedding.word.embedding.weight"])
    lines = _read_text(vocabulary).splitlines()
    if len(lines) != rows:
        raise InputError(
            f"--vocab {vocabulary}: {len(lines)} tokens, but the checkpoint has {rows}: use the "
            "vocabulary it was trained with"
        )
    _fill(model, state, source)
    quiet()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        shutil.copy(vocabulary, partial / "vocab.txt")
        BertTokenizer.from_pretrained(partial).save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return type(model).__name__


def _kind(
    weights: dict[str, Tensor],
) -> tuple[Callable[[dict[str, Any], dict[str, Tensor]], PreTrainedModel], _Rules]:
    if "encoder.transformer.layer_norm_1.gamma" in weights:
        return _albert, _ALBERT
    # Layers normalised before they compute need one more normalisation at their end.
    if "encoder.layer_norm.gamma" in weights:
        return _gpt2, _GPT2
    return _bert, _BERT


def _renamed(weights: dict[str, Tensor], rules: _Rules, source: Path) -> dict[str, Tensor]:
    state, unknown = {}, []
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        matches = [
            re.sub(pattern, target, stem)
            for pattern, target in rules
            if re.fullmatch(pattern, stem)
        ]
        if not matches:
            unknown.append(name)
            continue
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        # UER's first segment is padding's, whose state nothing looks at.
        state[f"{matches[0]}.{kind}"] = value[1:] if ".seg." in name else value
    if unknown:
        raise InputError(
            f"{source}: weights that BERT, ALBERT and GPT-2 have no place for: "
            f"{', '.join(unknown[:5])}{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}"
        )
    return state


def _bert(settings: dict[str, Any], state: dict[str, Tensor]) -> PreTrainedModel:
    words = state["bert.embeddings.word_embeddings.weight"]
    rows, width = words.shape
    config = BertConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=_layers(state, r"bert\.encoder\.layer\.(\d+)\."),
        num_attention_heads=_heads(settings),
        intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.weight"]),
        hidden_act=_activation(settings),
        hidden_dropout_prob=_dropout(settings),
        attention_probs_dropout_prob=_dropout(settings),
        max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["bert.embeddings.token_type_embeddings.weight"]),
        pad_token_id=0,
        tie_word_embeddings=_tied(state, words),
    )
    config.num_labels = len(state.get("classifier.weight", ())) or 2
    if "classifier.weight" in state:
        return BertForSequenceClassification(config)
    return (BertForPreTraining if "bert.pooler.dense.weight" in state else BertForMaskedLM)(config)


def _albert(settings: dict[str, Any], state: dict[str, Tensor]) -> PreTrainedModel:
    words = state["albert.embeddings.word_embeddings.weight"]
    rows, embedded = words.shape
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    inner, width = state[f"{layer}ffn.weight"].shape
    config = AlbertConfig(
        vocab_size=rows,
        embedding_size=embedded,
        hidden_size=width,
        num_hidden_layers=int(_setting(settings, "layers_num")),
        num_attention_heads=_heads(settings),
        intermediate_size=inner,
        hidden_act=_activation(settings),
        hidden_dropout_prob=_dropout(settings),
        attention_probs_dropout_prob=_dropout(settings),
        classifier_dropout_prob=_dropout(settings),
        max_position_embeddings=len(state["albert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["albert.embeddings.token_type_embeddings.weight"]),
        pad_token_id=0,
        tie_word_embeddings=_tied(state, words),
    )
    config.num_labels = len(state.get("classifier.weight", ())) or 2
    if "classifier.weight" in state:
        return AlbertForSequenceClassification(config)
    pretrained = AlbertForPreTraining if "albert.pooler.weight" in state else AlbertForMaskedLM
    return pretrained(config)


def _gpt2(settings: dict[str, Any], state: dict[str, Tensor]) -> PreTrainedModel:
    words = state["transformer.wte.weight"]
    rows, width = words.shape
    layers = _layers(state, r"transformer\.h\.(\d+)\.")
    inner = len(state["transformer.h.0.mlp.c_fc.weight"])
    for layer in range(layers):
        own = f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{own}attn.c_attn.{part}.{kind}") for part in "qkv"]
            state[f"{own}attn.c_attn.{kind}"] = torch.cat(parts)
        # transformers keeps these matrices the other way round.
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            state[f"{own}{name}.weight"] = state[f"{own}{name}.weight"].t().contiguous()
    dropout = _dropout(settings)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=rows,
            n_embd=width,
            n_layer=layers,
            n_head=_heads(settings),
            n_inner=inner,
            n_positions=len(state["transformer.wpe.weight"]),
            activation_function=_activation(settings),
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            tie_word_embeddings=_tied(state, words),
            pad_token_id=0,
            bos_token_id=101,
            eos_token_id=102,
        )
    )


def _fill(model: PreTrainedModel, state: dict[str, Tensor], source: Path) -> None:
    """Every weight of the model from `state`, which must have no others."""
    # One bias stands under two names, and an output layer that is the embedding need not be stored.
    for name in ("cls.predictions", "predictions"):
        if f"{name}.decoder.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.decoder.bias"]
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{source}: {' '.join(str(error).split())[:300]}") from None
    problems = [f"{name} is missing" for name in sorted({*missing} - {*_OUTPUTS})]
    problems += [f"{name} is not expected" for name in unexpected]
    if problems:
        raise InputError(f"{source}: as {type(model).__name__}: {'; '.join(problems[:5])}")


def _tied(state: dict[str, Tensor], embedding: Tensor) -> bool:
    """Whether the output layer is the embedding: UER has it both ways."""
    return all(torch.equal(state[name], embedding) for name in _OUTPUTS if name in state)


def _layers(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _heads(settings: dict[str, Any]) -> int:
    return int(_setting(settings, "heads_num"))


def _dropout(settings: dict[str, Any]) -> float:
    return float(settings.get("dropout", 0.1))


def _activation(settings: dict[str, Any]) -> str:
    name = settings.get("hidden_act", "gelu")
    if name not in _ACTIVATIONS:
        raise InputError(
            f"--config: hidden_act is {name!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _setting(settings: dict[str, Any], name: str) -> Any:
    if name not in settings:
        raise InputError(f"--config: no {name}, which the weights do not tell: add it")
    return settings[name]


def _read_weights(source: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: not a file of tensors: {reason}") from None
    mask = re.compile(r".*\.attn\.(?:masked_)?bias")
    weights = {name: value for name, value in loaded.items() if not mask.fullmatch(name)}
    if "embedding.word.embedding.weight" not in weights:
        raise InputError(
            f"{source}: no embedding.word.embedding.weight, so no UER checkpoint; it begins with "
            f"{next(iter(weights), 'nothing')}"
        )
    return weights


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_read_text(file)))
    except ValueError:
        raise InputError(f"--config {file}: not a JSON object") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable: {' '.join(str(error).split())}") from None
