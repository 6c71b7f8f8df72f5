"""Texts as token ids: the right tokenizer for a model, and each text tokenized once.

Which tokenizer a folder needs can't be left to the Auto classes alone: for an ALBERT or GPT-2 with
a Chinese `vocab.txt`, or a ByT5 without files, they give one of a handful of tokens, without an
error, and the model never sees the text.
"""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from launcher.errors import InputError
from launcher.files import writing
from launcher.pretrained import readable_errors

_BYT5_IDS = 384
_UNLIMITED = 512
"""Tokens of a text for models whose positions have no end."""
_MOST_UNKNOWN = 0.2
# What a saved tokenizer says of where it was loaded from and how it was last used.
_PASSING = ("is_local", "local_files_only", "name_or_path", "truncation", "padding")


@dataclass(frozen=True)
class Tokens:
    """The ids of many texts, one after the other."""

    ids: np.ndarray
    """[tokens] int32."""
    starts: np.ndarray
    """[texts + 1] int64, where each text begins, and the end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[texts] int64."""
        return np.diff(self.starts)


def load_tokenizer(path: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or hub id, chosen from its files.

    Raises:
        InputError: there is none, or its size and the model's disagree.
    """
    size = config.get_text_config().vocab_size
    if config.model_type == "t5" and size == _BYT5_IDS:
        return ByT5Tokenizer()
    with readable_errors(path):
        kind: Any = BertTokenizer if _is_bare_vocabulary(path) else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(path)
    # Embeddings are often padded to a round number above the vocabulary, never below it.
    if not 0.8 * size <= len(tokenizer) <= size:
        raise InputError(
            f"model.path {path}: the tokenizer ({type(tokenizer).__name__}) has {len(tokenizer)} "
            f"ids and the model {size}; expected as many or slightly fewer: use the tokenizer the "
            "model was trained with"
        )
    return tokenizer


def longest_text(config: PretrainedConfig, max_tokens: int | None) -> int:
    """Tokens that a text may have, special ones included.

    Raises:
        InputError: `max_tokens` is more than the model's positions.
    """
    text: Any = config.get_text_config()
    # T5's positions are relative.
    positions = getattr(text, "max_position_embeddings", None)
    if positions and "roberta" in config.model_type:
        # The first positions are those of padding, in RoBERTa's own models.
        positions -= text.pad_token_id + 1
    if positions and max_tokens and max_tokens > positions:
        raise InputError(
            f"finetune.max_tokens: {max_tokens}, but the model has {positions} positions: lower it"
        )
    return max_tokens or positions or _UNLIMITED


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> Tokens:
    """The ids of each text with the special ones around it; what is too long loses its end."""
    if not texts:
        return Tokens(np.empty(0, np.int32), np.zeros(1, np.int64))
    encoded: list[list[int]] = tokenizer(
        list(texts),
        truncation=True,
        max_length=limit,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    # A causal model's tokenizer may find nothing in a text, and adds nothing.
    named = (tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    nothing = next(token for token in named if token is not None)
    encoded = [ids or [nothing] for ids in encoded]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(ids) for ids in encoded], out=starts[1:])
    flat = np.fromiter((token for ids in encoded for token in ids), np.int32, int(starts[-1]))
    return Tokens(flat, starts)


def truncated(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Tokens, limit: int
) -> set[str]:
    """Texts that lost their end."""
    full = [texts[row] for row in np.flatnonzero(tokens.lengths >= limit).tolist()]
    if not full:
        return set()
    whole = encode(tokenizer, full, 10**9)
    return {text for text, length in zip(full, whole.lengths, strict=True) if length > limit}


def encode_once(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int, folder: Path
) -> Tokens:
    """`encode`, kept in `folder` by the content of the tokenizer and the texts.

    Runs and ranks share it: a file appears whole, and whoever comes later reads it.
    """
    file = folder / f"{_digest(tokenizer, texts, limit)}.safetensors"
    try:
        stored = load_file(file)
        return Tokens(stored["ids"], stored["starts"])
    except FileNotFoundError:
        pass
    except (SafetensorError, KeyError):
        raise InputError(f"{file}: not readable: remove it, it is made again") from None
    tokens = encode(tokenizer, texts, limit)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Ranks and runs may write the same file at the same time.
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"ids": tokens.ids, "starts": tokens.starts}, temporary)
        os.replace(temporary, file)
    return tokens


def unknown_share(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> float:
    """Share of the unknown id among all that are not otherwise special."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return 0.0
    special = [token for token in tokenizer.all_special_ids if token != unknown]
    content = tokens.ids[~np.isin(tokens.ids, special)]
    return float((content == unknown).mean()) if len(content) else 1.0


def check_unknown(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Tokens, *, allowed: bool
) -> str:
    """A line that says how much of the texts the tokenizer knows.

    Raises:
        InputError: more than a fifth is unknown and it is not `allowed`.
    """
    share = unknown_share(tokenizer, tokens)
    if share > _MOST_UNKNOWN and not allowed:
        first = int(np.flatnonzero(tokens.ids == tokenizer.unk_token_id)[0])
        row = int(np.searchsorted(tokens.starts, first, side="right")) - 1
        raise InputError(
            f"model.path: its tokenizer ({type(tokenizer).__name__}) does not know {share:.0%} of "
            f"the training text's tokens, expected at most {_MOST_UNKNOWN:.0%}: {texts[row]!r} "
            f"becomes {tokens[row].tolist()}, where {tokenizer.unk_token_id} stands for whatever "
            "is unknown, so that different texts look alike. Use a model for this language; "
            "finetune.allow_unknown_tokens=true goes on nevertheless"
        )
    return f"tokens: {len(tokens.ids):,} in {len(tokens):,} texts, {share:.1%} of them unknown"


def _is_bare_vocabulary(path: str) -> bool:
    """Whether a model comes with a BERT vocabulary and without a word of its tokenizer's class."""
    if _file(path, "vocab.txt") is None or _file(path, "tokenizer.json") is not None:
        return False
    named = _file(path, "tokenizer_config.json")
    return named is None or "tokenizer_class" not in Path(named).read_text(encoding="utf-8")


def _file(path: str, name: str) -> str | None:
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _digest(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> str:
    total = hashlib.sha256()
    libraries = ("transformers", "tokenizers", "sentencepiece", "jieba")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    total.update(f"{type(tokenizer).__qualname__} {limit} {versions}".encode())
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            content = file.read_bytes()
            if file.suffix == ".json":
                settings = json.loads(content)
                kept = {key: settings[key] for key in sorted(settings) if key not in _PASSING}
                content = json.dumps(kept).encode()
            total.update(hashlib.sha256(content).digest())
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        total.update(b"%d:" % len(content) + content)
    return total.hexdigest()[:32]
