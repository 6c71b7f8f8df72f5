"""Load a causal language model and its tokenizer, refusing whatever does not fit together."""

import inspect
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import prompting.pangu  # noqa: F401  registers PanGu with the Auto classes
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.pretrained import readable_errors, refuse, skeleton
from prompting import loading

# What dropout is called in the configs of causal language models.
DROPOUTS = [
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("attention_dropout", "hidden_dropout", "activation_dropout", "dropout"),
]


def load_model(
    path: str,
    precision: str,
    attention: str,
    dropout: float | None = None,
    *,
    memory_mapped: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode, its checkpoint checked first; see `loading.load_weights`.

    Args:
        path: local folder or hub id.
        precision: `fp32`, `bf16` or `fp16`.
        attention: an attention implementation of transformers; `auto` is `sdpa`.
        dropout: share dropped in training, in place of what the checkpoint's config says.
        memory_mapped: leave the weights in their files, for a CPU.

    Raises:
        InputError: see `check_checkpoint` and `loading.load_weights`; or a dropout for a model
            that has none.
    """
    dtype = DTYPES[precision]
    skeleton = _checked(path, dtype=dtype)
    config = skeleton.config.get_text_config()
    named = [name for name in DROPOUTS if hasattr(config, name)]
    if dropout and not named:
        raise InputError(
            f"tuning.dropout: {dropout}, but {config.model_type} models have no dropout: set it to "
            "0"
        )
    changed = {} if dropout is None else dict.fromkeys(named, dropout)
    options = {"dtype": dtype, "attn_implementation": _attention(attention), **changed}
    with readable_errors(path):
        model = loading.load_weights(path, skeleton, memory_mapped=memory_mapped, **options)
    return model.eval()


def check_checkpoint(path: str) -> PretrainedConfig:
    """Compare a checkpoint's names and shapes with its config, without reading its weights.

    Raises:
        InputError: a missing, truncated or corrupt file, a missing shard or weight, a shape that
            the config does not expect, or a model that is not scored exactly (see `_misfit`).
    """
    return _checked(path).config


def load_tokenizer(path: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, refused when its size and the model's disagree.

    A folder with a `vocab.txt` and no word of its tokenizer's class is a BERT vocabulary (Chinese
    GPT-2 has one); the Auto classes would give it an empty GPT-2 tokenizer without a word.
    """
    folder = Path(path)
    files = [
        file for name in ("vocab.*", "*.model", "tokenizer.json") for file in folder.glob(name)
    ]
    if folder.is_dir() and not files:
        raise InputError(
            f"model.path {path}: no vocabulary beside the weights, expected vocab.model (PanGu), "
            "tokenizer.json, tokenizer.model, vocab.json or vocab.txt"
        )
    named = folder / "tokenizer_config.json"
    only_vocabulary = (folder / "vocab.txt").exists() and not (
        named.exists() and "tokenizer_class" in named.read_text(encoding="utf-8")
    )
    with readable_errors(path):
        kind: Any = BertTokenizer if only_vocabulary else AutoTokenizer
        tokenizer = kind.from_pretrained(path)
    size = config.get_text_config().vocab_size
    # Embeddings are often padded to a round number above the vocabulary, never below it.
    if not 0.8 * size <= len(tokenizer) <= size:
        raise InputError(
            f"model.path {path}: the tokenizer has {len(tokenizer)} ids and the model {size}; "
            "expected as many or slightly fewer: use the tokenizer the model was trained with"
        )
    return tokenizer


def max_positions(config: PretrainedConfig) -> int:
    """Positions that the model can take, each of them seeing all before it.

    The label trie's mask is the same in every layer, so a sliding window limits like a position.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((int(limit) for limit in limits if limit), default=2**31)


def lines(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model is, for a reader."""
    return [
        f"model: {config.model_type}, {max_positions(config)} positions, {len(tokenizer)} ids",
    ]


def _attention(attention: str) -> str:
    return "sdpa" if attention == "auto" else attention


def _checked(path: str, **options: Any) -> PreTrainedModel:
    """The model on the device `meta`; see `check_checkpoint`."""
    model, info = skeleton(path, AutoModelForCausalLM, **options)
    problems = [
        f"{name}: shape {tuple(seen)} in the checkpoint, {tuple(expected)} by config.json"
        for name, seen, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{name}: not in the checkpoint" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: unknown to the model" for name in sorted(info["unexpected_keys"])]
    problems += info["error_msgs"]
    problems += _misfit(model)
    refuse(path, problems)
    return model


def _misfit(model: PreTrainedModel) -> list[str]:
    """Why a shared prefix and a token trie can't be exact with this architecture."""
    config: Any = model.config.get_text_config()
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:
        return [f"{config.model_type} is an encoder, expected a causal language model"]
    layers = set(getattr(config, "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    if layers or "position_ids" not in inspect.signature(model.forward).parameters:
        seen = ", ".join(sorted(layers)) or "no position_ids"
        return [
            f"{config.model_type} has {seen}, expected attention with given positions in every "
            "layer, as GPT-2, Llama, Qwen and PanGu have: use another model"
        ]
    return []
