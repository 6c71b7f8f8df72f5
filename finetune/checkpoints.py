"""Pretrained models that get a new head: loaded, checked against their files, and saved."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as sharding

from launcher.distributed import full_shape
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.pretrained import assign, readable_errors, refuse, skeleton, unsharded

Loader = Callable[..., tuple[PreTrainedModel, set[str]]]
"""`load`, or `describe` in its place."""
HEAD_FILE = "head.safetensors"
"""Beside the weights: a head that transformers has no class for."""


def read_config(path: str) -> PretrainedConfig:
    """A checkpoint's `config.json`."""
    with readable_errors(path):
        return AutoConfig.from_pretrained(path)


def source(config: Any) -> str:
    """Where the method's model is built from: what the run has exported, else `model.path`."""
    exported = config.run_dir / "model"
    return str(exported) if exported.is_dir() else config.model.path


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of the labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def check(path: str, kind: Any, **changed: Any) -> PreTrainedModel:
    """Compare a checkpoint's names and shapes with its config, without reading its weights.

    Gives the model without its weights.

    Args:
        kind: the class of transformers to load it with.
        changed: what is changed in its config.

    Raises:
        InputError: a missing, truncated or corrupt file, a missing weight outside of the head, a
            shape that the config does not expect, or layers that the config does not know.
    """
    model, info = skeleton(path, kind, **changed)
    refuse(path, _problems(model, info))
    return model


def load(
    path: str, kind: Any, config: Any, seed: int, **changed: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model in evaluation mode, and the names of the weights that the checkpoint lacks.

    These are drawn from `seed`: normal with the config's `initializer_range`, biases 0. Under
    ZeRO 3 the model is sharded once it is loaded: transformers' own way, which shards first, can't
    see that an output layer differs from the embedding, as ByT5's and mT5's does, and makes them
    one.

    Raises:
        InputError: see `check`.
    """
    attention = config.model.attention
    with readable_errors(path), unsharded():
        loaded: Any = kind.from_pretrained(
            path,
            dtype=DTYPES[config.model.precision],
            attn_implementation="sdpa" if attention == "auto" else attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **changed,
        )
    model, info = loaded
    refuse(path, _problems(model, info))
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if _other_labels(path, changed):
        new |= {name for name in head_names(model) if "pooler" not in name}
    draw(model, new, seed)
    if sharding.is_deepspeed_zero3_enabled():
        _shard(model)
    return model.eval(), new


def describe(
    path: str, kind: Any, config: Any, seed: int, **changed: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The same model on the device `meta`, by its config and its files' heads alone."""
    attention = config.model.attention
    model, _ = skeleton(
        path,
        kind,
        dtype=DTYPES[config.model.precision],
        attn_implementation="sdpa" if attention == "auto" else attention,
        **changed,
    )
    return model.eval(), set()


def draw(module: nn.Module, names: set[str], seed: int, std: float | None = None) -> None:
    """Give the parameters `names` their first values."""
    if std is None:
        std = float(getattr(module.config, "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    values = {}
    for name in sorted(names & parameters.keys()):
        shape = full_shape(parameters[name])
        if len(shape) > 1:
            values[name] = torch.randn(shape, generator=generator) * std
        else:
            values[name] = torch.full(shape, float(not name.endswith("bias")))
    assign(module, values, "model.path")


def head_names(model: PreTrainedModel) -> set[str]:
    """Parameters that classify: all outside of the base model, and its pooler."""
    base = f"{model.base_model_prefix}."
    return {
        name
        for name, _ in model.named_parameters()
        if model.base_model is not model and (not name.startswith(base) or ".pooler." in name)
    }


def save(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a folder that transformers reads; it appears whole or not at all.

    Args:
        state: every weight of `model`.
        head: weights of a head that is not part of it, for `HEAD_FILE`.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with readable_errors(""):
            model.save_pretrained(partial, state_dict=dict(state), save_original_format=False)
            tokenizer.save_pretrained(partial)
        if head:
            contiguous = {name: value.contiguous() for name, value in head.items()}
            save_file(contiguous, partial / HEAD_FILE)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def completed(
    model: PreTrainedModel, trained: Mapping[str, Tensor], path: str
) -> Mapping[str, Tensor]:
    """`trained` and, from the checkpoint at `path`, the weights of `model` that were frozen."""
    names = [name for name, _ in model.named_parameters()]
    if trained.keys() >= set(names):
        return trained
    with readable_errors(path), unsharded():
        whole: Any = type(model).from_pretrained(
            path, dtype=model.dtype, config=model.config, ignore_mismatched_sizes=True
        )
    frozen = dict(whole.named_parameters())
    return {name: trained[name] if name in trained else frozen[name].data for name in names}


def read_back(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `save` was given as `state` and `head`."""
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not any(file.name != HEAD_FILE for file in files):
        raise InputError(f"{folder}: no weights of a trained model here")
    with readable_errors(str(folder)):
        for file in files:
            (head if file.name == HEAD_FILE else state).update(load_file(file))
    return state, head


def multiplied_weights(model: nn.Module) -> int:
    """Weights that each token is multiplied with: of the layers, as often as they are applied."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    config: Any = model.config
    count = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            continue
        size = torch.Size(full_shape(parameter)).numel()
        # ALBERT's layers share their weights.
        shared = "albert_layer_groups" in name
        count += size * (config.num_hidden_layers // config.num_hidden_groups if shared else 1)
    return count


def _shard(model: nn.Module) -> None:
    import deepspeed

    with deepspeed.zero.Init(module=model, config_dict_or_path=sharding.deepspeed_config()):
        pass  # Entered: from now on linear layers keep no gathered weight for the backward pass.


def _problems(model: PreTrainedModel, info: dict[str, Any]) -> list[str]:
    """What of a checkpoint does not fit, heads left out."""
    head = head_names(model)
    problems = [
        f"{name}: shape {tuple(seen)} in the checkpoint, {tuple(expected)} by config.json"
        for name, seen, expected in sorted(info["mismatched_keys"])
        if name not in head
    ]
    problems += [
        f"{name}: not in the checkpoint"
        for name in sorted(info["missing_keys"])
        if name not in head
    ]
    # Other heads are no mistake; more layers than the config has are.
    base = model.base_model_prefix
    known = {_form(name, base) for name, _ in model.named_parameters() if name not in head}
    problems += [
        f"{name}: more layers in the checkpoint than by config.json"
        for name in sorted(info["unexpected_keys"])
        if "#" in _form(name, base) and _form(name, base) in known
    ]
    return problems + list(info["error_msgs"])


def _form(name: str, base: str) -> str:
    """A name with every layer's number alike, with or without the base model's prefix."""
    return re.sub(r"\d+", "#", name.removeprefix(f"{base}."))


def _other_labels(path: str, changed: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's head is for labels of other names."""
    stored = read_config(path).id2label or {}
    named = {*stored.values()} != {f"LABEL_{index}" for index in stored}
    return named and "id2label" in changed and changed["id2label"] != stored
