"""The DeepSpeed engine around a method: what the hardware decides, scoring, and its parts."""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from launcher import predictions
from launcher.config import Config, deepspeed_config
from launcher.distributed import (
    World,
    gather_to_rank_0,
    local_world_size,
    max_over_ranks,
    on_rank_0,
)
from launcher.errors import InputError
from launcher.method import Classifier
from launcher.progress import Progress

_M_MMAP_THRESHOLD = -3  # as in GNU's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALL_CHECKPOINT = 2**25
"""Bytes; what freed weights of a smaller one leave unused is not worth the time to clear pages."""
_NEXT_TO_NOTHING = 0.1
"""Of a rank's memory: below it planning is not worth its seconds."""


def resolve(config: Config, world: World, module: ModuleType, dataset: Any) -> Config:
    """Replace what is `auto` by what this hardware calls for.

    Precision: bf16 where the hardware multiplies it fast (compute capability 8 and later), fp16
    on older GPUs, fp32 on CPUs, where bf16 is emulated and slower. ZeRO: see `_stage`.

    Raises:
        InputError: too little memory for every stage.
    """
    precision: str = config.model.precision
    if precision == "auto":
        precision = "fp32"
        if world.device.type == "cuda":
            precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    model = config.model.model_copy(update={"precision": precision})
    config = config.model_copy(update={"model": model})
    if config.parallel.zero != "auto":
        return config
    # Free memory is never the same twice; ranks that chose differently would wait for ever.
    stage = on_rank_0(world, lambda: _stage(config, world, module, dataset))
    parallel = config.parallel.model_copy(update={"zero": stage})
    return config.model_copy(update={"parallel": parallel})


def zero_3_loading(config: Config, *, trains: bool) -> Any:
    """Make transformers load checkpoints straight into ZeRO-3 shards, while the result is alive."""
    if config.parallel.zero != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    if not 0 < _weight_bytes(config.model.path) < _SMALL_CHECKPOINT:
        _return_large_blocks()
    return HfDeepSpeedConfig(derived_config(config, trains=trains))


def derived_config(config: Config, *, trains: bool) -> dict[str, Any]:
    """The DeepSpeed JSON of a resolved config."""
    stage = config.parallel.zero
    assert isinstance(stage, int)
    # Stages 1 and 2 shard the optimizer and the gradients, which scoring does not have.
    if not trains and stage < 3:
        stage = 0
    return deepspeed_config(config, precision=config.model.precision, stage=stage, trains=trains)


def place_for_scoring(config: Config, method: Any, world: World) -> Any:
    """Place the method's module on the device, sharded while the result is alive under ZeRO 3.

    The method keeps its own module: the engine's hooks on it gather the weights, and the engine
    itself would hide the model's attributes behind its own.
    """
    method.module.eval()
    if getattr(method, "replicated", None) is not None:
        method.replicated.to(world.device)
    if config.parallel.zero != 3:
        method.module.to(world.device)
        return None
    import deepspeed

    sharded, *_ = deepspeed.initialize(
        model=method.module, config=derived_config(config, trains=False)
    )
    _release_in_every_pass(sharded.optimizer)
    return sharded


def score_split(
    config: Config,
    method: Classifier,
    world: World,
    split: str,
    examples: pa.Table,
    label_names: Sequence[str],
    provenance: dict[str, Any],
) -> None:
    """Score a split chunk by chunk and write `predictions/<split>.parquet`.

    Each chunk is one part on disk when it is done, so that a stopped run goes on behind the last
    one and memory does not grow with the split.
    """
    folder, size = config.run_dir, config.evaluation.chunk_examples
    chunks = range(0, len(examples), size)
    done = on_rank_0(world, lambda: _finished(folder, split, len(chunks)))
    begun = min(done * size, len(examples))
    progress = Progress(f"scoring {split}", len(examples), "texts", rank=world.rank, done=begun)
    for part, start in list(enumerate(chunks))[done:]:
        chunk = examples.slice(start, size)
        texts = chunk["text"].to_pylist()
        scores = score_texts(config, method, world, texts, progress)
        write = partial(_write_part, folder, split, part, chunk, scores, label_names, provenance)
        on_rank_0(world, write)
        progress.done = start + len(chunk)
    on_rank_0(world, lambda: _merge(folder, split))
    progress.finish()


def score_texts(
    config: Config,
    method: Any,
    world: World,
    texts: list[str],
    progress: Progress | None = None,
) -> np.ndarray | None:
    """[texts, labels] float32 on rank 0, None elsewhere; each distinct text is scored once.

    Args:
        method: a `Classifier` whose module is in evaluation mode.
    """
    labels = len(config.data.labels or [])
    index: dict[str, int] = {}
    places = np.array([index.setdefault(text, len(index)) for text in texts])
    # Neighbours in length go to different ranks, so that all have about the same work; a rank
    # without a text of its own scores one along, which rank 0 does not read.
    distinct = sorted(index, key=lambda text: (len(text), text))
    own = distinct[world.rank :: world.size] or distinct[:1]
    batches = method.score_batches(own)
    scores = np.empty((len(own), labels), dtype=np.float32)
    # Sharded ranks gather weights together, so all of them must run the same number of passes.
    passes = len(batches)
    if config.parallel.zero == 3:
        passes = max_over_ranks(world, passes)
    share = len(texts) / len(distinct) * world.size
    for turn in range(passes):
        batch = batches[min(turn, len(batches) - 1)]
        result = method.scores(batch)
        if turn < len(batches):
            scores[batch.rows] = result.float().cpu().numpy()
            if progress is not None:
                progress.advance(0 if world.rank else round(len(batch.rows) * share))
    gathered = gather_to_rank_0(world, scores)
    if gathered is None:
        return None
    all_scores = np.empty((len(distinct), labels), dtype=np.float32)
    for rank, part in enumerate(gathered):
        rows = [index[text] for text in distinct[rank :: world.size]]
        all_scores[rows] = part[: len(rows)]
    return all_scores[places]


def check_scores(scores: np.ndarray, texts: Sequence[Any]) -> None:
    """Refuse scores [texts, labels] that are not numbers.

    Raises:
        InputError: naming the first such text.
    """
    if (wrong := np.isnan(scores).any(axis=1)).any():
        raise InputError(
            f"model.path: the model's scores of {str(texts[int(wrong.argmax())])!r} are not "
            "numbers: use model.precision=fp32, or other weights if it is so already"
        )


def _return_large_blocks() -> None:
    """Let the C library give blocks of a megabyte and more back to the system when they are freed.

    By itself GNU's keeps ever larger ones for their next use. Gathered weights of all sizes leave
    gaps between what lives longer: a rank on a CPU ends up holding several times what it uses.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_MMAP_THRESHOLD, 2**20)


def _release_in_every_pass(weights: Any) -> None:
    """Let DeepSpeed release a module's weights after each of its backward passes.

    Where a module has run twice, for the shared prefix and for the examples, it counts one pass
    too few, gathers the weights for the second one and holds the whole model from then on.
    """
    release = weights.post_sub_module_backward_function

    def release_and_expect(module: Any) -> None:
        release(module)
        module.ds_grads_remaining = int(module.applied_pre_backward_ref_cnt > 0)

    weights.post_sub_module_backward_function = release_and_expect


def _write_part(
    folder: Path,
    split: str,
    part: int,
    chunk: pa.Table,
    scores: np.ndarray | None,
    label_names: Sequence[str],
    provenance: dict[str, Any],
) -> None:
    assert scores is not None
    check_scores(scores, chunk["text"])
    named_none = np.isneginf(scores).all(axis=1)
    names_only = bool(np.isneginf(scores).any())
    predicted = np.where(named_none, -1, scores.argmax(axis=1)).astype(np.int32)
    table = predictions.make_table(
        ids=chunk["id"].to_pylist(),
        texts=chunk["text"].to_pylist(),
        labels=chunk["label"].to_pylist(),
        distributions=chunk["distribution"].to_pylist(),
        scores=None if names_only else scores,
        predicted=predicted,
        label_names=label_names,
        provenance=provenance,
    )
    predictions.write_part(folder, split, part, table)


def _finished(folder: Path, split: str, parts: int) -> int:
    whole = (folder / "predictions" / f"{split}.parquet").exists()
    return parts if whole else predictions.finished_parts(folder, split)


def _merge(folder: Path, split: str) -> None:
    if not (folder / "predictions" / f"{split}.parquet").exists():
        predictions.merge_parts(folder, split)


def _stage(config: Config, world: World, module: ModuleType, dataset: Any) -> int:
    """ZeRO stage 0 for one rank, and where whole weights, gradients and AdamW's moments take next
    to nothing of each rank's memory; else the planner's choice, or without one 0 if they take at
    most half of it, and 3.
    """
    if world.size == 1 or config.model.weights == "memory_mapped":
        return 0
    # Published weights are in half precision; AdamW adds 12 bytes to the 4 of weight and gradient.
    wanted = _weight_bytes(config.model.path) * (2 if config.model.precision == "fp32" else 1)
    wanted *= 8 if module.trains_model(config) else 1
    share = wanted / _memory_per_rank(world)
    if not hasattr(module, "footprint"):
        return 0 if share <= 0.5 else 3
    if 0 < share <= _NEXT_TO_NOTHING:
        return 0
    from launcher import machine, planner

    nodes = math.ceil(world.size / local_world_size())
    hardware = machine.found(config, world.device, world.size, nodes=nodes)
    return planner.stage(config, module, dataset, hardware)


def _weight_bytes(path: str | None) -> int:
    folder = Path(path or "")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if path else []
    return sum(file.stat().st_size for file in files)


def _memory_per_rank(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().available // local_world_size()
