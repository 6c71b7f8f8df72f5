"""Small PanGu models with weights large enough that every mistake shows in the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prompting.pangu import PanguConfig, PanguForCausalLM

VOCAB, POSITIONS = 50, 40


def _make(seed: int = 0, **fields) -> PanguForCausalLM:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "attn_implementation": "sdpa",
    }
    generator = torch.Generator().manual_seed(seed)
    model = PanguForCausalLM(PanguConfig(**shape | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("layernorm.weight")
            parameter.normal_(float(is_scale), 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PanguForCausalLM]:
    """`make_model(seed, **config fields)`: a random model in eval mode."""
    return _make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Token ids [3, 12]."""
    return torch.randint(10, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
