"""Keys and values in every layer of a PanGu that start without a say, and learn fast.

A prefix of random keys and values writes noise over what the model has read before it learns
anything, and a gradient step moves keys in the wrong coordinates: all queries share a large common
part, so almost every step makes a key louder or softer for all texts alike, and hardly any makes it
tell them apart.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from launcher.errors import InputError
from prompting.pangu import PanguConfig, PanguForCausalLM

_LOUDNESS = -4.0
"""What keys score on average with the queries; the sum over many of them is still heard."""
_SPREAD = 2.0
"""Standard deviation of these scores: each key starts as a sharp detector of something else."""
_RIDGE = 0.02
"""Added to the queries' moments, as a share of their mean: texts may leave directions unused."""


class QuietPrefix(nn.Module):
    """Learned coordinates of the keys and values, in PEFT's order, and how to read them.

    A key's coordinates are measured by the queries that the model makes of real texts: as one over
    the root of their second moments, so that a step of any direction changes the scores of texts
    alike. Keys start at random behind a common offset that quiets them for every text; values start
    at zero, and a step of theirs is as large beside the model's own values in every head.
    """

    axes: Tensor
    """[layers, heads, head size, head size] float32, of the keys' coordinates."""
    offsets: Tensor
    """[layers, heads, head size] float32, added to every key."""
    scales: Tensor
    """[layers, heads] float32, of the values' coordinates."""

    def __init__(self, config: PretrainedConfig, vectors: int, seed: int) -> None:
        super().__init__()
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        size = config.hidden_size // heads
        drawn = torch.randn(
            vectors, layers, heads, size, generator=torch.Generator().manual_seed(seed)
        )
        table = torch.stack([_SPREAD * drawn, torch.zeros_like(drawn)], dim=2)
        self.embedding = nn.Embedding.from_pretrained(table.flatten(1), freeze=False)
        """[vectors, layers x (key, value) x width] coordinates."""
        self.register_buffer("axes", torch.eye(size).repeat(layers, heads, 1, 1))
        self.register_buffer("offsets", torch.zeros(layers, heads, size))
        self.register_buffer("scales", torch.ones(layers, heads))

    def forward(self, places: Tensor) -> Tensor:
        """[vectors, layers x (key, value) x width] float32, the keys and values themselves."""
        layers, heads, size = self.offsets.shape
        keys, values = self.embedding(places).unflatten(1, (layers, 2, heads, size)).unbind(2)
        keys = torch.einsum("vlhd,lhde->vlhe", keys, self.axes) + self.offsets
        return torch.stack([keys, values * self.scales[..., None]], dim=2).flatten(1)

    @torch.no_grad()
    def fit(self, states: Sequence["HeadStates"]) -> None:
        """Take the coordinates from what the layers' heads saw; see the class."""
        for layer, seen in enumerate(states):
            second, mean, values = seen.moments()
            size = mean.shape[1]
            spread = second.diagonal(dim1=1, dim2=2).mean(1)
            second = second + _RIDGE * spread[:, None, None] * torch.eye(size)
            lengths, directions = torch.linalg.eigh(second)
            roots = directions * lengths.rsqrt()[:, None, :]
            self.axes[layer].copy_(roots @ directions.mT)
            # The key whose scores come closest to a constant, in the least squares.
            loud = torch.linalg.solve(second, mean[..., None])[..., 0]
            self.offsets[layer].copy_(_LOUDNESS * math.sqrt(size) * loud)
            self.scales[layer].copy_(values)


class HeadStates:
    """Sums over the queries and values of a layer's heads."""

    def __init__(self, heads: int, size: int) -> None:
        self._shape = (heads, size)
        self._second, self._first = torch.zeros(heads, size, size), torch.zeros(heads, size)
        self._values, self._queries, self._keys = torch.zeros(heads), 0, 0

    def see_queries(self, projected: Tensor) -> None:
        """`projected`: [rows, tokens, width], in any float type."""
        queries = projected.detach().float().cpu().unflatten(-1, self._shape).flatten(0, -3)
        self._second += torch.einsum("nhd,nhe->hde", queries, queries)
        self._first += queries.sum(0)
        self._queries += len(queries)

    def see_values(self, projected: Tensor) -> None:
        """`projected`: [rows, tokens, width], in any float type."""
        values = projected.detach().float().cpu().unflatten(-1, self._shape).flatten(0, -3)
        self._values += values.square().mean(2).sum(0)
        self._keys += len(values)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments [heads, size, size] and mean [heads, size] of the queries; root mean
        square [heads] of the values."""
        queries = max(1, self._queries)
        return (
            self._second / queries,
            self._first / queries,
            (self._values / max(1, self._keys)).sqrt(),
        )


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[HeadStates]]:
    """Within it, passes of a PanGu add up what its heads see, one `HeadStates` a layer."""
    assert isinstance(model, PanguForCausalLM)
    config = model.config
    heads = config.num_attention_heads
    layers = [*model.model.layers, model.model.query_layer]
    states = [HeadStates(heads, config.hidden_size // heads) for _ in layers]
    hooks = []
    for layer, own in zip(layers, states, strict=True):
        attention = layer.self_attn
        hooks += [
            attention.q_proj.register_forward_hook(
                lambda _, __, out, own=own: own.see_queries(out)
            ),
            attention.v_proj.register_forward_hook(lambda _, __, out, own=own: own.see_values(out)),
        ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def check_model(config: PretrainedConfig) -> None:
    """Refuse models whose queries can't be watched."""
    if config.model_type != PanguConfig.model_type:
        raise InputError(
            f"tuning.init: quiet, but model.path is a {config.model_type}, expected a PanGu: "
            "choose text, labels, vocabulary or random"
        )
