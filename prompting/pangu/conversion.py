"""Published PanGu checkpoints into a folder that `PanguForCausalLM.from_pretrained` reads.

Sources: Megatron folders (any model-parallel size, PanGu-alpha or Evolution), the folder of the
public Hugging Face port, and our own layout. Tensors stream from memory-mapped files one output
shard at a time, so host memory stays near the size of a shard.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from launcher.errors import InputError
from prompting.pangu.checkpoint import CheckpointFiles, Tensors, find_checkpoint
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.modeling import PanguForCausalLM
from prompting.pangu.tokenization import PanguTokenizer

DTYPES = {
    "keep": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_EMBED = "model.embed_tokens.weight"
_HEADS = {1024: 16, 2560: 32, 5120: 40}  # by hidden size: PanGu-alpha 350M, 2.6B, 13B


def convert(
    source: Path,
    destination: Path,
    *,
    vocabulary: Path | None = None,
    dtype: str = "keep",
    heads: int | None = None,
    vocab_size: int | None = None,
    max_shard_size: int | str = "1GB",
    trust_pickle: bool = False,
) -> PanguConfig:
    """Write config, sharded safetensors and the tokenizer into the new folder `destination`.

    The folder appears only when it is complete. `vocabulary`: a sentencepiece model; by default
    `vocab.model` in `source`, if there. `dtype`: a key of `DTYPES`. `heads` and `vocab_size` say
    what Megatron files don't: the heads of a size that was never published, and how many rows of
    the padded word embedding are real (40000 if not given). `trust_pickle` allows files that hold
    Python objects, which run code when read.

    Raises `InputError`, with one line, for whatever is wrong with the source or the destination.
    """
    if destination.exists():
        raise InputError(f"{destination}: already exists, expected a new folder")
    files = find_checkpoint(source, trust_pickle)
    ranks = files.open()
    _check_ranks(files, ranks)
    config = _derive_config(files, ranks, heads, vocab_size)
    _check_shapes(source, ranks, config)
    plan = _output_tensors(ranks, config, DTYPES[dtype])
    config.dtype = plan[_EMBED].dtype
    del ranks  # and with it the mappings

    tokenizer = _tokenizer(source, vocabulary, config)
    _check_space(destination, plan)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        config.save_pretrained(partial)
        _write_shards(files, plan, partial, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return config


def _check_ranks(files: CheckpointFiles, ranks: Sequence[Tensors]) -> None:
    """Refuse ranks that are not parts of one model, saved at one moment."""
    first, *others = files.iterations()
    for paths, iteration in zip(files.ranks[1:], others, strict=True):
        if iteration != first:
            raise InputError(
                f"{paths[0]}: of iteration {iteration}, expected {first} as in {files.ranks[0][0]}"
            )
    for paths, weights in zip(files.ranks[1:], ranks[1:], strict=True):
        for name in ranks[0].keys() ^ weights.keys():
            lacking, other = (paths, files.ranks[0])[:: 1 if name in ranks[0] else -1]
            raise InputError(f"{lacking[0]}: lacks {name}, which {other[0]} has")
        for name, tensor in weights.items():
            if tensor.shape != ranks[0][name].shape:
                raise InputError(
                    f"{paths[0]}: {name}: seen {list(tensor.shape)}, expected "
                    f"{list(ranks[0][name].shape)} as in {files.ranks[0][0]}"
                )
            # What is not split every rank holds alike, up to what its own sums have rounded.
            if _split_dim(name) is None and _differ(tensor, ranks[0][name]):
                raise InputError(
                    f"{paths[0]}: {name}: other values than in {files.ranks[0][0]}, expected the "
                    "same: they are parts of different models"
                )
    query = ranks[0].get("model.query_layer.self_attn.q_proj.weight")
    if query is not None and query.shape[0] * len(ranks) != query.shape[1]:
        raise InputError(
            f"{files.ranks[-1][0].parent}: is the last of {len(ranks)} model-parallel parts, but "
            f"by the shapes {query.shape[1] / query.shape[0]:g} make up the model: "
            "get the missing mp_rank folders"
        )


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() > 0.05 * other.abs().max() + 1e-3)


def _derive_config(
    files: CheckpointFiles, ranks: Sequence[Tensors], heads: int | None, vocab_size: int | None
) -> PanguConfig:
    first = ranks[0]
    for name in (_EMBED, "model.embed_positions.weight", "model.query_layer.mlp.up_proj.weight"):
        if name not in first:
            raise InputError(f"{files.ranks[0][0]}: lacks {name}, so it is no PanGu checkpoint")
    layers = [int(m[1]) for name in first if (m := re.match(r"model\.layers\.(\d+)\.", name))]
    seen = {
        "vocab_size": 40000,
        "hidden_size": first[_EMBED].shape[1],
        "num_hidden_layers": max(layers, default=-1) + 2,
        "intermediate_size": first["model.query_layer.mlp.up_proj.weight"].shape[0] * len(ranks),
        "max_position_embeddings": first["model.embed_positions.weight"].shape[0],
    }
    told = seen | files.config
    if vocab_size is not None:
        told["vocab_size"] = vocab_size
    told["num_attention_heads"] = _heads(files, heads, told["hidden_size"])
    try:
        return PanguConfig(**told | {"architectures": ["PanguForCausalLM"]})
    except Exception as error:  # transformers' validation wraps ours in an error type of its own
        raise InputError(f"{files.ranks[0][0]}: {' '.join(str(error).split())}") from error


def _heads(files: CheckpointFiles, given: int | None, hidden_size: int) -> int:
    recorded = files.config.get("num_attention_heads") or files.recorded("num_attention_heads")
    if given and recorded and given != recorded:
        raise InputError(f"--heads: seen {given}, but the checkpoint says {recorded}")
    heads = given or recorded or _HEADS.get(hidden_size)
    if heads is None:
        raise InputError(
            f"--heads: not given, and the number of heads can't be seen in {files.ranks[0][0]} "
            f"(hidden size {hidden_size}); say how many the model was trained with"
        )
    return heads


def _check_shapes(source: Path, ranks: Sequence[Tensors], config: PanguConfig) -> None:
    with torch.device("meta"):
        expected = {n: list(t.shape) for n, t in PanguForCausalLM(config).state_dict().items()}
    seen = {name: list(_joined_shape(name, ranks)) for name in ranks[0]}
    if seen[_EMBED][0] < config.vocab_size:
        raise InputError(
            f"{source}: word embedding: seen {seen[_EMBED][0]} rows, expected at least "
            f"{config.vocab_size}; for another vocabulary say --vocab-size"
        )
    seen[_EMBED][0] = config.vocab_size
    seen.setdefault("lm_head.weight", expected["lm_head.weight"])
    seen["lm_head.weight"][0] = config.vocab_size
    for name in expected.keys() ^ seen.keys():
        verb = "lacks" if name in expected else "has, besides the weights of PanGu,"
        raise InputError(f"{source}: {verb} {name}")
    for name, shape in expected.items():
        if seen[name] != shape:
            raise InputError(f"{source}: {name}: seen {seen[name]}, expected {shape}")
    head = ranks[0].get("lm_head.weight")
    if head is not None and not torch.equal(head, ranks[0][_EMBED]):
        raise InputError(f"{source}: lm_head: differs from the word embedding, expected the same")


def _output_tensors(
    ranks: Sequence[Tensors], config: PanguConfig, dtype: torch.dtype | None
) -> Tensors:
    """Shape and dtype of what will be written, as meta tensors."""
    plan = {}
    for name, tensor in ranks[0].items():
        shape = _joined_shape(name, ranks)
        if name == _EMBED:
            shape = torch.Size((config.vocab_size, *shape[1:]))
        if name != "lm_head.weight":  # tied
            plan[name] = torch.empty(shape, dtype=dtype or tensor.dtype, device="meta")
    return plan


def _split_dim(name: str) -> int | None:
    """The dimension along which model-parallel ranks hold contiguous equal parts."""
    if re.search(r"(embed_tokens\.weight|(q|k|v|up)_proj\.(weight|bias))$", name):
        return 0
    return 1 if re.search(r"(o|down)_proj\.weight$", name) else None


def _joined_shape(name: str, ranks: Sequence[Tensors]) -> torch.Size:
    shape = list(ranks[0][name].shape)
    dim = _split_dim(name)
    if dim is not None:
        shape[dim] *= len(ranks)
    return torch.Size(shape)


def _join(name: str, ranks: Sequence[Tensors], like: torch.Tensor) -> torch.Tensor:
    dim = _split_dim(name)
    whole = ranks[0][name]
    if dim is not None and len(ranks) > 1:
        whole = torch.cat([weights[name] for weights in ranks], dim)
    whole = whole[: like.shape[0]].to(like.dtype).contiguous()
    if not torch.stack(whole.aminmax()).isfinite().all():  # without isfinite's full-size copies
        raise InputError(f"{name}: holds values that are not finite in {like.dtype}")
    return whole


def _write_shards(
    files: CheckpointFiles, plan: Tensors, folder: Path, max_shard_size: int | str
) -> None:
    try:
        split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size: {error}") from error
    for number, (filename, names) in enumerate(split.filename_to_tensors.items(), 1):
        print(f"shard {number} of {len(split.filename_to_tensors)}: {filename}", file=sys.stderr)
        ranks = files.open()
        shard = {name: _join(name, ranks, plan[name]) for name in names}
        del ranks
        save_file(shard, folder / filename, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / filename)  # save_file makes it private
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tokenizer(source: Path, vocabulary: Path | None, config: PanguConfig) -> PanguTokenizer | None:
    beside = source / "vocab.model"
    if vocabulary is None and not beside.is_file():
        print(f"no tokenizer: {beside} does not exist and --vocab is not given", file=sys.stderr)
        return None
    tokenizer = PanguTokenizer(vocabulary or beside)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{tokenizer.vocab_file}: seen {len(tokenizer)} pieces, expected at most "
            f"{config.vocab_size}, the rows of the word embedding"
        )
    return tokenizer


def _check_space(destination: Path, plan: Tensors) -> None:
    needed = sum(tensor.nbytes for tensor in plan.values()) + 2**24  # and the small files
    existing = next(path for path in destination.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{destination}: needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free"
        )
