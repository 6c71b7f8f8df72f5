"""Weights from memory-mapped files straight to where a rank keeps them, never a whole copy first.

transformers reads the names; the values stay in the mapped files until a rank takes its part:

- a replicated model: each weight in turn, cast, onto the rank's device;
- under ZeRO 3: the rank's slice of each weight; nothing is sent between ranks;
- memory-mapped: none. A module's weights are read and cast while it computes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.integrations import deepspeed as sharding

from launcher.distributed import local_world_size
from launcher.errors import InputError
from launcher.pretrained import unsharded

GIB = 2**30


def load_weights(
    path: str, skeleton: PreTrainedModel, *, memory_mapped: bool, **options: Any
) -> PreTrainedModel:
    """The model of a checked folder, with the weights that `from_pretrained` would give it.

    Sharded if a ZeRO-3 configuration is alive (`transformers.integrations.HfDeepSpeedConfig`).

    Args:
        skeleton: the same model on the device `meta`, whose dtypes the weights get.
        memory_mapped: leave them in the files, see `_map`.
        options: for `from_pretrained`.

    Raises:
        InputError: too little memory, with what is needed and what there is; or `memory_mapped`
            together with ZeRO 3 or a GPU.
    """
    config = sharding.deepspeed_config() if sharding.is_deepspeed_zero3_enabled() else None
    device = _device()
    if memory_mapped and (config or device.type != "cpu"):
        raise InputError(
            "model.weights: memory_mapped is for one copy on a CPU, seen "
            f"{'parallel.zero 3' if config else 'a GPU'}: leave it out"
        )
    if not memory_mapped:
        ranks = dist.get_world_size() if config else 1
        offloaded = bool(config and "offload_param" in config.get("zero_optimization", {}))
        _check_memory(path, skeleton, ranks, device, offloaded)
    with unsharded(), _uncast():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    dtypes = {name: weight.dtype for name, weight in skeleton.named_parameters()}
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if memory_mapped:
        _map(model, dtypes)
    elif config:
        _shard(model, dtypes, config)
    else:
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(device, dtypes[name])
    return model


def _uncast() -> Any:
    """Let `from_pretrained` leave weights as they are stored: views of the mapped files.

    A cast would copy each of them; here only the part that is kept is cast.
    """

    def view(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        return tensor[...]

    return mock.patch.object(core_model_loading, "_materialize_copy", view)


def _shard(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], config: Any) -> None:
    """Turn the weights into ZeRO-3 parameters that hold this rank's slice.

    What `deepspeed.zero.Init` does to a module's new weights, but for its broadcast of rank 0's.
    """
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=config)
    with init:
        pass  # From now on linear layers keep no gathered weight for the backward pass.
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight: Any
    for name, weight in model.named_parameters():
        stored = weight.data.reshape(-1)
        # On a CPU, memory that is never written takes no room.
        weight.data = torch.empty(weight.shape, dtype=dtypes[name], device=init.local_device)
        init._convert_to_deepspeed_param(weight)
        size = -(-len(stored) // ranks)
        own = slice(rank * size, (rank + 1) * size)
        weight.data.view(-1)[own].copy_(stored[own])
        weight.partition()


def _map(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Freeze the weights in their files and cast them for as long as their module computes.

    In between a parameter is a single number repeated, which says shape, dtype and device; that it
    is not a number gives away who uses one without calling its module. The casts are tensors of
    their own, so that a backward pass finds them as they were.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        stored: Any = weight
        stored.mapped = weight.data
        weight.data = torch.full((), torch.nan, dtype=dtypes[name]).expand(weight.shape)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            kept = dict(module._parameters)
            module.register_forward_pre_hook(_reader(kept), prepend=True)
            module.register_forward_hook(_returner(kept), always_call=True)


def _reader(kept: dict[str, Any]) -> Any:
    def read(module: nn.Module, inputs: Any) -> None:
        for name, weight in kept.items():
            if weight is not None:
                # A few rows of a large table are wanted; the returner casts them.
                dtype = weight.mapped.dtype if type(module) is nn.Embedding else weight.dtype
                module._parameters[name] = weight.mapped.to(dtype)

    return read


def _returner(kept: dict[str, Any]) -> Any:
    def give_back(module: nn.Module, inputs: Any, output: Any) -> Any:
        module._parameters.update(kept)
        if type(module) is nn.Embedding and output is not None:
            return output.to(kept["weight"].dtype)
        return output

    return give_back


def _check_memory(
    path: str, skeleton: PreTrainedModel, ranks: int, device: torch.device, offloaded: bool
) -> None:
    """Refuse to begin where this machine's ranks can't hold their parts."""
    sizes = [weight.nbytes for weight in skeleton.parameters()]
    # Beside its part a rank holds the weight that it is about to cut, or gather.
    needed = sum(sizes) // ranks + (max(sizes) if ranks > 1 else 0)
    if device.type == "cuda" and not offloaded:
        place, free, holders = "GPU", torch.cuda.mem_get_info(device)[0], 1
    else:
        place, free = "machine", available_memory()
        holders = local_world_size() if dist.is_initialized() else 1
    if needed * holders > free:
        dtype = str(skeleton.dtype).removeprefix("torch.")
        raise InputError(
            f"model.path {path}: {sum(sizes) / GIB:.1f} GiB of weights in {dtype}, "
            f"{needed / GIB:.1f} GiB a rank; {needed * holders / GIB:.1f} GiB are needed by "
            f"{holders} rank{'s' * (holders > 1)} on this {place} and {free / GIB:.1f} are free: "
            "use "
            + ("more ranks" if ranks > 1 else "parallel.zero=3 and more ranks")
            + (", or on one CPU model.weights=memory_mapped" if device.type == "cpu" else "")
        )


def available_memory() -> int:
    """Bytes that this machine, or the control group that this process is in, can still give."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # Cached files count as used, and go when their room is needed.
    return min(free, limit - used + int(counts.get("file", 0)))


def _device() -> torch.device:
    """Where a run computes; outside of one, the CPU."""
    if dist.is_available() and dist.is_initialized() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
