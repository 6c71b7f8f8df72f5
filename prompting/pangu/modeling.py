"""PanGu as a native transformers model.

A GPT-2-like pre-LN stack, then one **query layer**: its queries come from a table of positions
instead of the hidden states, so position n asks for token n + 1. Nothing follows the query layer
but the tied head, hence both are computed only where logits are asked for (`logits_to_keep`).
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from launcher.errors import InputError
from prompting.pangu.configuration import PanguConfig

AttentionMask = torch.Tensor | BlockMask | None


class PanguAttention(nn.Module):
    """Multi-head attention whose queries may come from elsewhere than its keys and values."""

    is_causal = True

    def __init__(self, config: PanguConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj.writes_residual = True  # type: ignore[assignment]

    def forward(
        self,
        queries: torch.Tensor,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`queries` [batch or 1, queries, hidden], `hidden_states` [batch, keys, hidden]."""
        key, value = (
            self._heads(self.k_proj(hidden_states)),
            self._heads(self.v_proj(hidden_states)),
        )
        query = self._heads(self.q_proj(queries)).expand(key.shape[0], -1, -1, -1)
        dropout = self.config.attn_pdrop if self.training else 0.0
        shared = self._shared(cache, attention_mask, query)
        if shared is not None:
            assert isinstance(attention_mask, torch.Tensor)
            output = shared_attention(query, key, value, shared, attention_mask, dropout)
            return self.o_proj(output.flatten(-2)), None
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=dropout,
        )
        return self.o_proj(output.flatten(-2)), weights

    def _shared(
        self, cache: Cache | None, mask: AttentionMask, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values that all rows share, where it is better not to copy them to each.

        A row's copies are of two times the head's width, its scores, held three times, of its
        queries. In half precision sdpa, which keeps scores in float32, is more exact."""
        if cache is None or self.layer_idx >= len(cache.layers):
            return None
        few = 3 * query.shape[2] < 2 * self.head_dim and query.dtype == torch.float32
        added = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.is_floating_point()
        if not few or not added or self.config._attn_implementation != "sdpa":
            return None
        return getattr(cache.layers[self.layer_idx], "shared", None)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class PanguMLP(nn.Module):
    def __init__(self, config: PanguConfig):
        super().__init__()
        assert config.intermediate_size is not None  # PanguConfig fills it in
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.writes_residual = True  # type: ignore[assignment]
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class PanguLayer(GradientCheckpointingLayer):
    """A pre-LN layer; given `queries` it is the query layer, computed at `rows` only."""

    def __init__(self, config: PanguConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PanguAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PanguMLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        queries: torch.Tensor | None = None,
        attention_mask: AttentionMask = None,
        rows: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            normed if queries is None else queries, normed, attention_mask, cache
        )
        hidden_states = _take(hidden_states, rows) + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class PanguPreTrainedModel(PreTrainedModel):
    config: PanguConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PanguLayer"]  # noqa: RUF012 (the base class's own spelling)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"attentions": PanguAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); what writes to the residual is divided by sqrt(2 layers)."""
        super()._init_weights(module)
        # Marked on the Linear itself: transformers never asks for modules without weights of their
        # own when a model lives outside its package.
        if isinstance(module, nn.Linear) and hasattr(module, "writes_residual"):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)


class PanguModel(PanguPreTrainedModel):
    def __init__(self, config: PanguConfig):
        super().__init__(config)
        last = config.num_hidden_layers - 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_queries = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(PanguLayer(config, index) for index in range(last))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_layer = PanguLayer(config, last)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """States [batch, kept, hidden] after the query layer, at the positions `logits_to_keep`.

        `attention_mask`: None (causal), [batch, past + tokens] with 0 for padding, or a whole mask
        [batch or 1, 1, tokens, past + tokens] that is taken as it is (added when floating, True =
        seen when boolean). `position_ids` [batch or 1, tokens] only say where a token stands, not
        what it sees; by default they count the tokens that are not padding.

        `logits_to_keep`: int n for the last n positions, 0 for all; or positions, [kept] for all
        rows or [batch, kept].

        `output_hidden_states`: the embeddings, then the states after each ordinary layer, after
        `final_layernorm`, and after the query layer: `num_hidden_layers + 2` tensors.

        Raises `InputError` for more positions than the model has, and for a 4D mask under flash or
        flex attention, which cannot apply one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, inputs_embeds.device)
        self._check(attention_mask, position_ids, past, length)

        # Without position_ids: the mask alone says what is seen, whatever the positions.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache)
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        collected: tuple[torch.Tensor, ...] | None
        collected = (hidden_states,) if output_hidden_states else None
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, cache=cache)
            collected = collected and (*collected, hidden_states)
        hidden_states = self.final_layernorm(hidden_states)
        collected = collected and (*collected, hidden_states)

        kept = kept_positions(logits_to_keep, length, inputs_embeds.device)
        rows, among_rows = kept, None
        if kept is not None and is_flash_attention_requested(self.config):
            # Flash attention lines the last query up with the last key and knows no other masks.
            first = int(kept.min())
            rows, among_rows = torch.arange(first, length, device=kept.device)[None], kept - first
        elif kept is not None:
            mask = _mask_rows(mask, kept, past, length)
        hidden_states = self.query_layer(
            hidden_states,
            self.embed_queries(_take(position_ids, rows)),
            attention_mask=mask,
            rows=rows,
            cache=cache,
        )
        hidden_states = _take(hidden_states, among_rows)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=cache if use_cache else None,
            hidden_states=collected and (*collected, hidden_states),
        )

    def _check(self, attention_mask, position_ids: torch.Tensor, past: int, length: int) -> None:
        limit = self.config.max_position_embeddings
        # Left padding may make a sequence longer than its positions; look only when it might be.
        if past + length > limit and int(position_ids.max()) >= limit:
            raise InputError(
                f"input: seen {int(position_ids.max()) + 1} positions, expected at most "
                f"{limit} (max_position_embeddings): shorten the prompt or the text"
            )
        if not isinstance(attention_mask, torch.Tensor):
            return
        if attention_mask.ndim == 2 and attention_mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask: seen {attention_mask.shape[1]} columns, expected {past + length} "
                f"({past} in the cache and {length} tokens)"
            )
        attention = self.config._attn_implementation
        if attention_mask.ndim == 4 and attention not in ("eager", "sdpa"):
            raise InputError(
                f"model.attention: seen {attention}, which cannot apply a mask given for each pair "
                "of tokens; use sdpa"
            )


class PanguForCausalLM(PanguPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PanguConfig):
        super().__init__(config)
        self.model = PanguModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept, vocabulary]; the arguments are those of `PanguModel.forward`.

        `labels` [batch, tokens]: the ids themselves, -100 where nothing is to be learnt. The loss
        is the mean cross-entropy of the next label, over the kept positions only.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            kept = kept_positions(logits_to_keep, labels.shape[1], labels.device)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=_take(following, kept).contiguous(),
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with the softmax in fp32, [batch, heads, tokens, head_dim] in."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


def shared_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention to states that all rows share, and to each row's own behind them.

    The queries of all rows are multiplied with the shared states in one product (Juravsky et al.
    2024, Hydragen, section 3), instead of each row's with a copy of them.

    Args:
        query: [rows, heads, queries, head_dim]; key, value: [rows, heads, tokens, head_dim].
        shared: keys and values [1, heads, shared, head_dim].
        mask: [1 or rows, 1, queries, shared + tokens], added to the scores.

    Returns:
        [rows, queries, heads, head_dim].
    """
    rows, _, queries, width = query.shape
    query = query * width**-0.5
    common = shared[0].shape[2]
    together = query.transpose(0, 1).flatten(1, 2)  # [heads, rows * queries, head_dim]
    before = (together @ shared[0][0].mT).unflatten(1, (rows, queries)).transpose(0, 1)
    scores = torch.cat([before, query @ key.mT], dim=3) + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    on_shared = weights[..., :common].transpose(0, 1).flatten(1, 2)
    output = (on_shared @ shared[1][0]).unflatten(1, (rows, queries)).permute(1, 2, 0, 3)
    return output + (weights[..., common:] @ value).transpose(1, 2)


def kept_positions(
    logits_to_keep: int | torch.Tensor, length: int, device: torch.device
) -> torch.Tensor | None:
    """Positions [1 or batch, kept] meant by `logits_to_keep`; None for all of `length`."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep == 0 or logits_to_keep >= length:
            return None
        return torch.arange(length - logits_to_keep, length, device=device)[None]
    if logits_to_keep.dtype == torch.bool or logits_to_keep.ndim not in (1, 2):
        raise ValueError(
            f"logits_to_keep: seen {logits_to_keep.dtype} with {logits_to_keep.ndim} dimensions, "
            "expected an int, or positions as integers [kept] or [batch, kept]"
        )
    kept = logits_to_keep.to(device).reshape(-1, logits_to_keep.shape[-1])
    return torch.where(kept < 0, kept + length, kept)


def _take(states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """`states` [batch or 1, tokens, ...] at `rows` [batch or 1, kept]."""
    if rows is None:
        return states
    return torch.take_along_dim(states, rows[(...,) + (None,) * (states.ndim - 2)], dim=1)


def _mask_rows(mask: AttentionMask, rows: torch.Tensor, past: int, length: int) -> AttentionMask:
    """The mask of all tokens, narrowed to the queries at `rows` [batch or 1, kept]."""
    if mask is None:
        # sdpa takes no mask for a plain causal one, but would line the first query up with the
        # first key.
        keys = torch.arange(past + length, device=rows.device)
        return (keys <= past + rows[..., None])[:, None]
    if isinstance(mask, BlockMask):
        rows = rows.expand(mask.shape[0], -1).contiguous()

        def at_rows(batch, head, query, key):
            return mask.mask_mod(batch, head, rows[batch, query], key)

        return create_block_mask(
            at_rows, mask.shape[0], None, rows.shape[1], mask.shape[-1], device=str(rows.device)
        )
    return torch.take_along_dim(mask, rows[:, None, :, None], dim=2)


def _positions(
    attention_mask: torch.Tensor | BlockMask | None, past: int, length: int, device: torch.device
) -> torch.Tensor:
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted[:, -length:].to(device)
    return torch.arange(past, past + length, device=device)[None]
