"""Low-rank updates of a model's own matrices (Hu et al. 2021), by PEFT."""

from collections.abc import Collection
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.config import LoraSettings
from launcher.errors import InputError


def inject(described: peft.LoraConfig, model: PreTrainedModel, seed: int) -> None:
    """Put the updates into the model, drawn from `seed`; they alone want a gradient."""
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(described, model)


def updates(model: nn.Module) -> dict[str, Any]:
    """The updates' parameters by their names in PEFT's files."""
    return {peft_name(name): p for name, p in model.named_parameters() if "lora_" in name}


def describe(
    settings: LoraSettings, model: PreTrainedModel, *, task: str, usual: Collection[str], key: str
) -> peft.LoraConfig:
    """PEFT's description of the updates.

    Args:
        task: what PEFT calls it.
        usual: names of the layers that are updated where the settings name none.
        key: of the config, what holds the settings.

    Raises:
        InputError: the model has no layers of these names.
    """
    known = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
    }
    names = settings.target_modules or sorted(known & {*usual})
    if not names or set(names) - known:
        raise InputError(
            f"{key}.target_modules: seen {names}, expected names of this model's layers: "
            f"{', '.join(sorted(known))}"
        )
    return peft.LoraConfig(
        task_type=peft.TaskType[task],
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )


def peft_name(name: str) -> str:
    """PEFT's name in a file for a parameter of the model."""
    return "base_model.model." + name.replace(".default.", ".")
