"""A PanGu checkpoint of any size with random weights, in Megatron's layout, written as a stream.

The writer holds one tensor at a time: a file of torch is a zip archive whose pickle comes first, so
the pickle is made of tensors that have no memory, and each tensor's bytes are drawn when it is its
turn.
"""

import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prompting.pangu.configuration import PanguConfig

ITERATION = 1000


def write_megatron(folder: Path, config: PanguConfig, *, parts: int = 1, seed: int = 0) -> int:
    """Write `folder` as `parts` model-parallel ranks would have saved it, in float16.

    Normal weights of standard deviation 0.02 (residual outputs by the depth, as in training), norms
    near 1. The same seed gives the same model whatever `parts`.

    Returns:
        The number of parameters.
    """
    tensors = [*megatron_tensors(config)]
    writers = []
    for rank in range(parts):
        file = folder / f"iter_{ITERATION:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        writers.append(_begin(file, tensors, parts))
    generator = torch.Generator().manual_seed(seed)
    for number, (name, shape, dim) in enumerate(tensors):
        whole = _draw(name, shape, config, generator)
        for writer, part in zip(writers, _split(whole, dim, parts), strict=True):
            _add(writer, f"data/{number}", part.contiguous().view(torch.uint8).numpy().data)
    for writer in writers:
        writer.close()
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    return sum(shape.numel() for _, shape, _ in tensors)


def megatron_tensors(config: PanguConfig) -> Iterator[tuple[str, torch.Size, int | None]]:
    """Name (below `language_model/`), shape and split dimension of every tensor, in file order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    assert inner is not None
    positions = torch.Size((config.max_position_embeddings, hidden))
    words = torch.Size((config.vocab_size, hidden))
    yield "embedding/word_embeddings/weight", words, 0
    yield "embedding/position_embeddings/weight", positions, None
    layers = [f"layers.{layer}" for layer in range(config.num_hidden_layers - 1)]
    for layer in [*layers, "topQueryLayer"]:
        for part, rows, columns, dim in (
            ("attention.query", hidden, hidden, 0),
            ("attention.key", hidden, hidden, 0),
            ("attention.value", hidden, hidden, 0),
            ("attention.dense", hidden, hidden, 1),
            ("mlp.dense_h_to_4h", inner, hidden, 0),
            ("mlp.dense_4h_to_h", hidden, inner, 1),
        ):
            yield f"transformer/{layer}.{part}.weight", torch.Size((rows, columns)), dim
            yield f"transformer/{layer}.{part}.bias", torch.Size((rows,)), 0 if dim == 0 else None
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                yield f"transformer/{layer}.{norm}.{kind}", torch.Size((hidden,)), None
    for kind in ("weight", "bias"):
        yield f"transformer/final_layernorm.{kind}", torch.Size((hidden,)), None
    yield "topQueryEmbedding/top_query_embeddings/weight", positions, None


def _begin(
    file: Path, tensors: list[tuple[str, torch.Size, int | None]], parts: int
) -> zipfile.ZipFile:
    """A file of torch up to its tensors' bytes: the pickle that says what follows."""
    tree: dict[str, Any] = {}
    for name, shape, dim in tensors:
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        own = [size // (parts if axis == dim else 1) for axis, size in enumerate(shape)]
        # Never written to, so that no memory is behind it.
        place[last] = torch.empty(own, dtype=torch.float16)
    state = {"model": {"language_model": tree}, "iteration": ITERATION}
    writer = zipfile.ZipFile(file, "w")
    with tempfile.NamedTemporaryFile() as described:
        with torch.serialization.skip_data():
            torch.save(state, described.name)
        with zipfile.ZipFile(described.name) as made:
            for path in made.namelist():
                name = path.partition("/")[2]
                if not name.startswith(("data/", ".data/")):
                    _add(writer, name, memoryview(made.read(path)))
    return writer


def _add(writer: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """One record; its bytes begin where torch wants them, at a multiple of 64."""
    record = zipfile.ZipInfo(f"model_optim_rng/{name}")
    assert writer.fp is not None
    begin = writer.fp.tell() + 30 + len(record.filename) + 4
    filler = -begin % 64
    record.extra = struct.pack("<HH", 0x4246, filler) + b"Z" * filler
    writer.writestr(record, content.cast("B"))  # type: ignore[arg-type]


def _draw(name: str, shape: torch.Size, config: PanguConfig, generator: torch.Generator) -> Tensor:
    std = 0.02
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    centre = 1.0 if "layernorm.weight" in name else 0.0
    return torch.empty(shape).normal_(centre, std, generator=generator).half()


def _split(whole: Tensor, dim: int | None, parts: int) -> list[Tensor]:
    return [whole] * parts if dim is None else list(whole.chunk(parts, dim))
