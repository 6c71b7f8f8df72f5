"""Low-rank updates of a model's own matrices (Hu et al. 2021), by PEFT, with a trained head."""

from collections.abc import Collection, Mapping
from pathlib import Path

import peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from finetune.checkpoints import HEAD_FILE
from launcher import lora
from launcher.config import LoraSettings
from launcher.errors import InputError
from launcher.files import replacing, write_json
from launcher.pretrained import readable_errors

_WEIGHTS = "adapter_model.safetensors"
_BASE = "base.json"
# Query and value projections by what the families call them.
_USUAL = {"query", "value", "q_proj", "v_proj", "c_attn", "q", "v", "query_proj", "value_proj"}


def inject(settings: LoraSettings, model: PreTrainedModel, seed: int, task: str) -> None:
    """Put the updates into the model; they alone want a gradient."""
    lora.inject(_describe(settings, model, task), model, seed)


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    settings: LoraSettings,
    model: PreTrainedModel,
    task: str,
    base: dict[str, str],
) -> None:
    """Write `folder` in PEFT's format.

    Args:
        state: the trained parameters by their names in `model`: updates, and the head's.
        head: weights of a head that is no part of `model`, for a file that PEFT does not read.
        base: the model's fingerprint.
    """
    described = _describe(settings, model, task)
    described.base_model_name_or_path, described.inference_mode = base["path"], True
    own = [name for name in state if "lora_" not in name]
    described.modules_to_save = sorted({_module(name) for name in own}) or None
    folder.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(str(folder))
    if head:
        with replacing(folder / HEAD_FILE) as temporary:
            save_file({name: value.contiguous() for name, value in head.items()}, temporary)
    write_json(folder / _BASE, base)
    with replacing(folder / _WEIGHTS) as temporary:
        save_file(
            {lora.peft_name(name): value.contiguous() for name, value in state.items()}, temporary
        )


def read_back(
    folder: Path, names: Collection[str], base: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `save` was given as `state`, for the parameters `names`, and as `head`.

    Raises:
        InputError: it is incomplete, or was trained on another model than `base`.
    """
    with readable_errors(str(folder)):
        stored = load_file(folder / _WEIGHTS)
        head = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
        trained_on = (folder / _BASE).read_text(encoding="utf-8")
    if base["sha256"] not in trained_on:
        raise InputError(
            f"{folder}: was trained on other weights than those in {base['path']} now: use the "
            "model of the run"
        )
    wanted = {lora.peft_name(name): name for name in names}
    if stored.keys() != wanted.keys():
        differing = sorted(stored.keys() ^ wanted.keys())
        raise InputError(f"{folder}: not of this model, differing in {differing[0]}")
    return {wanted[name]: value for name, value in stored.items()}, head


def _describe(settings: LoraSettings, model: PreTrainedModel, task: str) -> peft.LoraConfig:
    return lora.describe(settings, model, task=task, usual=_USUAL, key="finetune.lora")


def _module(name: str) -> str:
    """The name by which PEFT finds the module that is saved whole: the pooler, or the head."""
    parts = name.split(".")
    return "pooler" if "pooler" in parts else parts[0]
