"""Reads PanGu checkpoints as they are published, under this package's weight names.

Nothing is copied here: tensors are views of memory-mapped files, one mapping per model-parallel
rank, and `CheckpointFiles.open` maps them anew so that a caller decides how long pages stay.
"""

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from launcher.errors import InputError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a kind of checkpoint names its weights: the part of a name before .weight or .bias."""

    tables: Mapping[str, str]
    layer: re.Pattern[str]
    parts: Mapping[str, str]
    ignored: re.Pattern[str] = re.compile(r"(?!)")

    def rename(self, name: str, query_layer: int | None) -> str | None:
        """Our name; None for one that is not known. `query_layer`: its index, if it has one."""
        stem, _, kind = name.rpartition(".")
        if stem in self.tables:
            return f"{self.tables[stem]}.{kind}"
        match = self.layer.fullmatch(stem)
        if match is None or match["part"] not in self.parts:
            return None
        index = match["index"]
        is_query_layer = index is None or int(index) == query_layer
        place = "query_layer" if is_query_layer else f"layers.{int(index)}"
        return f"model.{place}.{self.parts[match['part']]}.{kind}"


MEGATRON = Layout(
    tables={
        "language_model.embedding.word_embeddings": "model.embed_tokens",
        "language_model.embedding.position_embeddings": "model.embed_positions",
        "language_model.topQueryEmbedding.top_query_embeddings": "model.embed_queries",
        "language_model.task_embedding.top_query_embeddings": "model.embed_queries",  # Evolution
        "language_model.transformer.final_layernorm": "model.final_layernorm",
    },
    layer=re.compile(
        r"language_model\.transformer\.(layers\.(?P<index>\d+)|topQueryLayer)\.(?P<part>.+)"
    ),
    parts={
        "input_layernorm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
)

PORT = Layout(
    tables={
        "transformer.wte": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.wqe": "model.embed_queries",
        "transformer.ln_f": "model.final_layernorm",
        "lm_head": "lm_head",
    },
    layer=re.compile(r"transformer\.h\.(?P<index>\d+)\.(?P<part>.+)"),
    parts={
        "ln_1": "input_layernorm",
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    ignored=re.compile(r".+\.attn\.(bias|masked_bias)"),  # the causal mask, kept as buffers
)

_PORT_FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
_SHARED_FIELDS = {
    *("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint found on disk: the files of each model-parallel rank, and what it says."""

    ranks: list[list[Path]]
    layout: Layout | None  # None: the names are ours already
    config: dict[str, Any]  # fields of PanguConfig told by the source, besides its shapes
    trust_pickle: bool
    whole: dict[Path, Any] = field(default_factory=dict)  # files that can't be mapped, read once

    def open(self) -> list[Tensors]:
        """The weights of each rank under our names, memory-mapped anew.

        Raises `InputError` for a broken file, an unknown weight, or Python objects not trusted.
        """
        return [
            self._renamed({name: t for path in files for name, t in self._weights(path)}, files)
            for files in self.ranks
        ]

    def recorded(self, name: str) -> Any:
        """A training argument kept in the first file, None if there is none."""
        if self.layout is not MEGATRON:
            return None
        return getattr(self._load(self.ranks[0][0]).get("args"), name, None)

    def iterations(self) -> list[Any]:
        """The training step at which each rank's files were saved, None where they don't say."""
        if self.layout is not MEGATRON:
            return [None for _ in self.ranks]
        return [self._load(files[0]).get("iteration") for files in self.ranks]

    def _renamed(self, weights: Tensors, files: list[Path]) -> Tensors:
        if self.layout is None:
            return weights
        last = self.config.get("num_hidden_layers", 0) - 1
        renamed: Tensors = {}
        for name, tensor in weights.items():
            if self.layout.ignored.fullmatch(name):
                continue
            ours = self.layout.rename(name, last)
            if ours is None:
                raise InputError(f"{files[0]}: {name}: not a weight of PanGu")
            if ours in renamed:
                raise InputError(f"{files[0]}: {name}: {ours} is there twice, expected once")
            renamed[ours] = tensor
        return renamed

    def _weights(self, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        state = self._load(path)
        if self.layout is not MEGATRON:
            return iter(state.items())
        for key in ("model", "module"):
            if isinstance(state.get(key), Mapping):
                return _flatten(state[key])
        raise InputError(f"{path}: seen the keys {sorted(state)}, expected 'model' or 'module'")

    def _load(self, path: Path) -> Mapping[str, Any]:
        if path in self.whole:
            return self.whole[path]
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if zipfile.is_zipfile(path):
            return _load_torch(path, self.trust_pickle, mmap=True)
        size = path.stat().st_size
        print(
            f"{path}: torch's format from before 1.6, which can't be memory-mapped: reading all "
            f"{size / 2**30:.1f} GiB into memory",
            file=sys.stderr,
        )
        return self.whole.setdefault(path, _load_torch(path, self.trust_pickle, mmap=False))


def find_checkpoint(folder: Path, trust_pickle: bool = False) -> CheckpointFiles:
    """What lies in `folder`: Megatron's tree, the Hugging Face port, or our own layout.

    Every torch file's checksums are verified (one pass over it), because a memory-mapped read
    would not notice a damaged one. Raises `InputError` if nothing is recognised or a file is
    missing or broken.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a PanGu checkpoint")
    if (folder / "config.json").is_file():
        found = _find_transformers(folder, trust_pickle)
    else:
        found = CheckpointFiles(_find_megatron(folder), MEGATRON, {}, trust_pickle)
    for path in (path for files in found.ranks for path in files):
        if not path.is_file():
            raise InputError(f"{path}: no such file, but the checkpoint needs it")
        if path.suffix != ".safetensors":
            _verify_torch(path)
    return found


def _find_megatron(folder: Path) -> list[list[Path]]:
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        said = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if said != "release" and not said.isdecimal():
            raise InputError(f"{tracker}: seen {said[:40]!r}, expected a number or 'release'")
        folder = folder / (said if said == "release" else f"iter_{int(said):07d}")
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, but {tracker.name} names it")
    ranks = sorted(path for path in folder.glob("mp_rank_*") if path.is_dir())
    if not ranks:
        raise InputError(
            f"{folder}: expected latest_checkpointed_iteration.txt or mp_rank_00 (Megatron), or "
            f"config.json (Hugging Face); seen {sorted(p.name for p in folder.iterdir())[:8]}"
        )
    for number, path in enumerate(ranks):
        if path.name != f"mp_rank_{number:02d}":
            raise InputError(f"{folder / f'mp_rank_{number:02d}'}: missing, but {path.name} exists")
    return [[_only_file(path)] for path in ranks]


def _only_file(rank: Path) -> Path:
    files = [path for path in rank.iterdir() if path.suffix in (".pt", ".pth")]
    if len(files) != 1:
        raise InputError(
            f"{rank}: expected one file, model_optim_rng.pt; seen {sorted(p.name for p in files)}"
        )
    return files[0]


def _find_transformers(folder: Path, trust_pickle: bool) -> CheckpointFiles:
    told = _read_json(folder / "config.json")
    if told.get("model_type") not in ("pangu", "gpt_pangu"):
        raise InputError(
            f"{folder / 'config.json'}: model_type: seen {told.get('model_type')!r}, "
            "expected 'pangu' or 'gpt_pangu'"
        )
    files = [_weight_files(folder)]
    if "num_layers" not in told:
        return CheckpointFiles(files, None, told, trust_pickle)
    config = {ours: told[theirs] for theirs, ours in _PORT_FIELDS.items() if theirs in told}
    config |= {n: value for n, value in told.items() if n in _SHARED_FIELDS and value is not None}
    return CheckpointFiles(files, PORT, config, trust_pickle)


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in sorted(set(_read_json(index)["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"{folder}: expected model.safetensors or pytorch_model.bin, seen neither")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value


def _load_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated ({error})") from error


def _verify_torch(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80":  # a bare pickle, which has no checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: damaged or truncated torch file ({error})") from error
    if damaged is not None:
        raise InputError(f"{path}: damaged torch file (wrong checksum in {damaged})")


def _load_torch(path: Path, trust_pickle: bool, mmap: bool) -> Mapping[str, Any]:
    try:
        state = torch.load(path, "cpu", mmap=mmap, weights_only=not trust_pickle)
    except ImportError as error:
        raise InputError(f"{path}: holds objects of a missing Python package ({error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
            objects = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))))
            raise InputError(
                f"{path}: holds Python objects besides tensors ({objects}), and reading those may "
                "run code; if you trust where the file comes from, add --trust-pickle"
            ) from error
        raise InputError(f"{path}: damaged torch file ({_first_line(error)})") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: seen a {type(state).__name__}, expected a dict of weights")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
