"""Low-rank updates of a frozen model (Hu et al. 2021), by PEFT, to compare soft prompts with."""

from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.errors import InputError
from prompting.settings import LoraSettings


def inject(settings: LoraSettings, model: PreTrainedModel, seed: int) -> None:
    """Put the updates into the model; they alone want a gradient."""
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(describe(settings, model), model)


def updates(model: nn.Module) -> dict[str, Any]:
    """The updates' parameters by their names in PEFT's files."""
    return {peft_name(name): p for name, p in model.named_parameters() if "lora_" in name}


def describe(settings: LoraSettings, model: PreTrainedModel) -> peft.LoraConfig:
    """PEFT's description of the updates.

    Raises:
        InputError: the model has no layers of these names.
    """
    known = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
    }
    # The query and value projections of PanGu and Llama kinds, and of GPT-2.
    names = settings.target_modules or sorted(known & {"q_proj", "v_proj", "c_attn"})
    if not names or set(names) - known:
        raise InputError(
            f"tuning.lora.target_modules: seen {names}, expected names of this model's layers: "
            f"{', '.join(sorted(known))}"
        )
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )


def peft_name(name: str) -> str:
    """PEFT's name in a file for a parameter of the model."""
    return "base_model.model." + name.replace(".default.", ".")
