"""Load a causal language model and its tokenizer, refusing whatever does not fit together."""

import hashlib
import inspect
import pickle
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

import prompting.pangu  # noqa: F401  registers PanGu with the Auto classes
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.pretrained import unsharded
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
    with _readable_errors(path):
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
    with _readable_errors(path):
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


def fingerprint(path: str, config: PretrainedConfig) -> dict[str, str]:
    """`path` and the SHA-256 of a model's weights; of a hub model, its commit."""
    folder = Path(path)
    if not folder.is_dir():
        return {"path": path, "sha256": str(getattr(config, "_commit_hash", None))}
    total = hashlib.sha256()
    kinds = (".safetensors", ".bin")
    for file in sorted(file for file in folder.iterdir() if file.suffix in kinds):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return {"path": path, "sha256": total.hexdigest()}


def quiet() -> None:
    """Let transformers speak of errors only: loading and saving are told by the launcher."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def required_path(path: str | None) -> str:
    """`model.path`, which most methods can't do without."""
    if path is None:
        raise InputError("model.path: required by this method, not given")
    return path


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
    with _readable_errors(path), unsharded():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, info = loaded
    problems = [
        f"{name}: shape {tuple(seen)} in the checkpoint, {tuple(expected)} by config.json"
        for name, seen, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{name}: not in the checkpoint" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: unknown to the model" for name in sorted(info["unexpected_keys"])]
    problems += info["error_msgs"]
    problems += _misfit(model)
    if problems:
        more = f"\nmodel.path {path}: and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("\n".join(f"model.path {path}: {p}" for p in problems[:5]) + more)
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


class _readable_errors:
    """Turn what transformers raises for a bad folder into one line, and keep it quiet meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        if Path(self.path).is_absolute() and not Path(self.path).is_dir():
            raise InputError(f"model.path {self.path}: no such folder")
        quiet()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (SafetensorError, EOFError, pickle.UnpicklingError)):
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise InputError(
                f"model.path {self.path}: a weight file is truncated, corrupt or holds more than "
                f"tensors ({reason or 'it is empty'}): copy or convert it again"
            ) from error
        # Whatever the files hold, and transformers raises nearly everything for it.
        if isinstance(error, Exception) and not isinstance(error, InputError):
            text = " ".join(str(error).split())[:500]
            if not isinstance(error, (OSError, ValueError, ImportError)):
                text = f"not readable: {type(error).__name__}: {text}"
            raise InputError(f"model.path {self.path}: {text}") from error
