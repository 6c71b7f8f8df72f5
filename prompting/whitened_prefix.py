"""Keys and values in every layer of a PanGu, learned in coordinates of the model's own queries.

The queries that a model makes share a large common part and leave other directions almost unused.
A gradient step on plain keys therefore makes them louder or softer for all texts alike, and the
prompt learns how frequent the labels are and little else. Where the queries are white, a step of
any direction counts as much, and keys tell texts apart from the start.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from launcher.errors import InputError
from prompting.pangu import PanguConfig, PanguForCausalLM

_SPREAD = 2.0
"""Standard deviation of a key's scores at the start, which makes it a detector of some texts."""
_RIDGE = 0.02
"""Added to the queries' moments, as a share of their mean: texts may leave directions unused."""


class WhitenedPrefix(nn.Module):
    """Learned coordinates of the keys and values, and how to read them.

    A key is its coordinates times the inverse root of the second moments of its head's queries
    (ZCA whitening, without taking their mean away); it starts at random. A value's coordinates are
    in units of the root mean square of its head's values; it starts at zero, so that nothing but
    attention is taken from what the model has read.
    """

    axes: Tensor
    """[layers, heads, head size, head size] float32, of the keys' coordinates."""
    scales: Tensor
    """[layers, heads] float32, of the values' coordinates."""

    def __init__(self, config: PretrainedConfig, vectors: int, seed: int) -> None:
        super().__init__()
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        size = config.hidden_size // heads
        generator = torch.Generator().manual_seed(seed)
        keys = _SPREAD * torch.randn(vectors, layers, heads, size, generator=generator)
        table = torch.stack([keys, torch.zeros_like(keys)], dim=2).flatten(1)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        """[vectors, layers x (key, value) x width] coordinates, in PEFT's order."""
        self.register_buffer("axes", torch.eye(size).repeat(layers, heads, 1, 1))
        self.register_buffer("scales", torch.ones(layers, heads))

    def forward(self, places: Tensor) -> Tensor:
        """[vectors, layers x (key, value) x width] float32, the keys and values themselves."""
        layers, heads, size, _ = self.axes.shape
        keys, values = self.embedding(places).unflatten(1, (layers, 2, heads, size)).unbind(2)
        keys = torch.einsum("vlhd,lhde->vlhe", keys, self.axes)
        return torch.stack([keys, values * self.scales[..., None]], dim=2).flatten(1)

    @torch.no_grad()
    def fit(self, states: Sequence["HeadStates"]) -> None:
        """Take the coordinates from what each layer's heads saw; see the class."""
        for layer, seen in enumerate(states):
            second, scale = seen.moments()
            mean = second.diagonal(dim1=1, dim2=2).mean(1)
            ridge = _RIDGE * mean[:, None, None] * torch.eye(second.shape[1])
            lengths, directions = torch.linalg.eigh(second + ridge)
            self.axes[layer].copy_(directions * lengths.rsqrt()[:, None] @ directions.mT)
            self.scales[layer].copy_(scale)


class HeadStates:
    """Sums over the queries and values of a layer's heads."""

    def __init__(self, heads: int, size: int) -> None:
        self._shape = (heads, size)
        self._queries, self._of_queries = torch.zeros(heads, size, size), 0
        self._values, self._of_values = torch.zeros(heads), 0

    def see_queries(self, projected: Tensor) -> None:
        """`projected`: [rows, tokens, width], in any float type."""
        queries = self._by_head(projected)
        self._queries += torch.einsum("nhd,nhe->hde", queries, queries)
        self._of_queries += len(queries)

    def see_values(self, projected: Tensor) -> None:
        """`projected`: [rows, tokens, width], in any float type."""
        values = self._by_head(projected)
        self._values += values.square().mean(2).sum(0)
        self._of_values += len(values)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Second moments [heads, size, size] of the queries; root mean square [heads] of the
        values."""
        return self._queries / self._of_queries, (self._values / self._of_values).sqrt()

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.detach().float().cpu().unflatten(-1, self._shape).flatten(0, -3)


@contextmanager
def watched(model: PreTrainedModel, common: int) -> Iterator[list[HeadStates]]:
    """Within it, passes of a PanGu add up what its heads see, one `HeadStates` a layer.

    What all texts begin with, the first `common` tokens, is left out: it would be counted again
    and again. The query layer asks at the last place alone."""
    assert isinstance(model, PanguForCausalLM)
    heads = model.config.num_attention_heads
    layers = [*model.model.layers, model.model.query_layer]
    states = [HeadStates(heads, model.config.hidden_size // heads) for _ in layers]
    hooks = []
    for layer, own in zip(layers, states, strict=True):
        begin = 0 if layer is model.model.query_layer else common
        for projection, see, first in (
            (layer.self_attn.q_proj, own.see_queries, begin),
            (layer.self_attn.v_proj, own.see_values, common),
        ):
            hooks.append(
                projection.register_forward_hook(
                    lambda _, __, out, see=see, first=first: see(out[:, first:])
                )
            )
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def check_model(config: PretrainedConfig) -> None:
    """Refuse models whose queries can't be watched."""
    if config.model_type != PanguConfig.model_type:
        raise InputError(
            f"tuning.init: whitened, but model.path is a {config.model_type}, expected a PanGu: "
            "choose text, labels, vocabulary or random"
        )
