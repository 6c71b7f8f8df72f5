"""Load a causal language model and its tokenizer, refusing whatever does not fit together."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

import prompting.pangu  # noqa: F401  registers PanGu with the Auto classes
from launcher.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(path: str, precision: str, attention: str) -> PreTrainedModel:
    """The model in evaluation mode, its checkpoint checked first.

    Args:
        path: local folder or hub id.
        precision: `fp32`, `bf16` or `fp16`.
        attention: an attention implementation of transformers; `auto` is `sdpa`.
    """
    check_checkpoint(path)
    with _readable_errors(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[precision], attn_implementation=_attention(attention)
        )
    return model.eval()


def check_checkpoint(path: str) -> PretrainedConfig:
    """Compare a checkpoint's names and shapes with its config, without reading its weights.

    Raises:
        InputError: a missing, truncated or corrupt file, a missing shard or weight, a shape that
            the config does not expect.
    """
    with _readable_errors(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    problems = [
        f"{name}: shape {tuple(seen)} in the checkpoint, {tuple(expected)} by config.json"
        for name, seen, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{name}: not in the checkpoint" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: unknown to the model" for name in sorted(info["unexpected_keys"])]
    problems += info["error_msgs"]
    if problems:
        more = f"\nmodel.path {path}: and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("\n".join(f"model.path {path}: {p}" for p in problems[:5]) + more)
    return model.config


def load_tokenizer(path: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, refused when its size and the model's disagree.

    A folder with a `vocab.txt` and no word of its tokenizer's class is a BERT vocabulary (Chinese
    GPT-2 has one); the Auto classes would give it an empty GPT-2 tokenizer without a word.
    """
    folder = Path(path)
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
    """Positions that the model can take."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else 2**31


def _attention(attention: str) -> str:
    return "sdpa" if attention == "auto" else attention


class _readable_errors:
    """Turn what transformers raises for a bad folder into one line, and keep it quiet meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        if Path(self.path).is_absolute() and not Path(self.path).is_dir():
            raise InputError(f"model.path {self.path}: no such folder")
        quiet()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SafetensorError):
            raise InputError(
                f"model.path {self.path}: a weight file is truncated or corrupt "
                f"({' '.join(str(error).split())}): copy or convert it again"
            ) from None
        if isinstance(error, (OSError, ValueError, RuntimeError, KeyError)):
            text = " ".join(str(error).split())
            raise InputError(f"model.path {self.path}: {text[:500]}") from None
