"""The model against a plain re-implementation, and its parts against its own full forward pass."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.errors import InputError
from prompting.pangu import PanguConfig, PanguForCausalLM, modeling
from prompting.scorer import Prefix

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def reference_logits(model: PanguForCausalLM, ids, positions, seen) -> torch.Tensor:
    """The forward pass written out, one attention head at a time. `seen` [batch, query, key]."""
    w, config = model.state_dict(), model.config

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def layer(name, x, query_input=None):
        normed = norm(f"{name}.input_layernorm", x)
        q = linear(f"{name}.self_attn.q_proj", normed if query_input is None else query_input)
        k, v = (linear(f"{name}.self_attn.{part}_proj", normed) for part in "kv")
        size = config.hidden_size // config.num_attention_heads
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            heads.append(scores.masked_fill(~seen, -10000.0).softmax(-1) @ v[..., part])
        x = x + linear(f"{name}.self_attn.o_proj", torch.cat(heads, -1))
        inner = linear(f"{name}.mlp.up_proj", norm(f"{name}.post_attention_layernorm", x))
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return x + linear(f"{name}.mlp.down_proj", inner)

    x = w["model.embed_tokens.weight"][ids] + w["model.embed_positions.weight"][positions]
    for index in range(config.num_hidden_layers - 1):
        x = layer(f"model.layers.{index}", x)
    x = norm("model.final_layernorm", x)
    out = layer("model.query_layer", x, w["model.embed_queries.weight"][positions])
    return out @ w["model.embed_tokens.weight"].T


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def tree_mask(length: int) -> torch.Tensor:
    """Two branches after a common trunk: the second does not see the first. [1, query, key]"""
    seen = causal(length)
    seen[8:, 5:8] = False
    return seen[None]


TREE_POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]])


@pytest.fixture
def flash(monkeypatch):
    """Flash attention's contract in plain torch: last query at the last key, 2D padding masks."""

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        q, k = query.shape[2], key.shape[2]
        seen = torch.ones(q, k, dtype=torch.bool).tril(k - q)[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, -10000.0)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attend)


@pytest.fixture
def flex(monkeypatch):
    """Flex attention uncompiled: compilation takes minutes here and changes nothing in the mask."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda q, k, v, training, **kwargs: flex_attention(q, k, v, **kwargs),
    )
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs),
    )


@pytest.mark.parametrize(
    ("attention", "masking"),
    [
        *itertools.product(IMPLEMENTATIONS, ["causal", "padding"]),
        *itertools.product(["eager", "sdpa"], ["tree bool", "tree float"]),
    ],
)
def test_logits_equal_plain_reimplementation(make_model, flex, ids, attention, masking):
    model = make_model(attn_implementation=attention)
    positions = torch.arange(12)[None].expand(3, -1)
    seen, inputs = causal(12)[None].expand(3, -1, -1), {}
    valid = torch.ones(3, 12, dtype=torch.bool)
    if masking == "padding":
        valid[1, :4] = False  # left
        valid[2, 9:] = False  # right
        seen = seen & valid[:, None]
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        inputs = {"attention_mask": valid.long()}
    elif masking != "causal":
        seen, positions = tree_mask(12).expand(3, -1, -1), TREE_POSITIONS.expand(3, -1)
        mask = tree_mask(12)[None]
        if masking == "tree float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        inputs = {"attention_mask": mask, "position_ids": TREE_POSITIONS}
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    expected = reference_logits(model, ids, positions, seen)
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)
    assert expected[valid].std() > 1  # the weights are large enough for the comparison to mean it


KEPT = [
    1,
    5,
    torch.tensor([3]),
    torch.tensor([9, 2, -1, 4]),
    torch.tensor([[1, 5], [11, 0], [6, 6]]),
]


@pytest.mark.parametrize("attention", [*IMPLEMENTATIONS, "flash_attention_2"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_to_keep_equal_slices_of_all_logits(
    make_model, flash, flex, ids, attention, kept, padded
):
    model = make_model()
    model.config._attn_implementation_internal = attention
    mask = torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    inputs = {"attention_mask": mask} if padded else {}
    with torch.no_grad():
        every = model(ids, **inputs).logits
        some = model(ids, logits_to_keep=kept, **inputs).logits
    torch.testing.assert_close(some, _slices(every, kept), **TOLERANCE)


def _slices(logits: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    if isinstance(kept, int):
        return logits[:, -kept:]
    if kept.ndim == 1:
        return logits[:, kept]
    return torch.stack([row[index] for row, index in zip(logits, kept, strict=True)])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_logits_to_keep_after_a_cached_prefix(make_model, flash, ids, attention, kept):
    model = make_model()
    model.config._attn_implementation_internal = attention
    prefix = ids[:1, :6].expand(3, -1)
    with torch.no_grad():
        every = model(torch.cat([prefix, ids], 1)).logits[:, 6:]
        cache = model(prefix, use_cache=True, logits_to_keep=1).cache
        some = model(ids, cache=cache, logits_to_keep=kept).logits
    torch.testing.assert_close(some, _slices(every, kept), **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tree_mask_after_a_cached_prefix(make_model, ids, attention):
    model = make_model(attn_implementation=attention)
    mask, kept = tree_mask(12)[None], torch.tensor([7, 11])
    with torch.no_grad():
        every = model(ids, attention_mask=mask, position_ids=TREE_POSITIONS).logits
        cache = model(ids[:, :5], use_cache=True).cache
        some = model(
            ids[:, 5:],
            attention_mask=mask[:, :, 5:],
            position_ids=TREE_POSITIONS[:, 5:],
            cache=cache,
            logits_to_keep=kept - 5,
        ).logits
    torch.testing.assert_close(some, every[:, kept], **TOLERANCE)


def test_each_branch_of_a_tree_equals_its_sequence_alone(make_model, ids):
    model = make_model()
    with torch.no_grad():
        tree = model(ids, attention_mask=tree_mask(12)[None], position_ids=TREE_POSITIONS).logits
        second = model(torch.cat([ids[:, :5], ids[:, 8:]], 1)).logits
    torch.testing.assert_close(tree[:, 8:], second[:, 5:], **TOLERANCE)


def test_one_token_at_a_time_equals_all_at_once(make_model, ids):
    model = make_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        every = model(ids).logits
        steps = [model(ids[:, i : i + 1], cache=cache, logits_to_keep=1).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), every, **TOLERANCE)
    assert len(cache.layers) == model.config.num_hidden_layers


def test_query_layer_is_computed_only_where_logits_are_kept(make_model, ids):
    model = make_model()
    seen = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = getattr(model.model.query_layer.self_attn, name)
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape}))
    model.model.query_layer.mlp.register_forward_hook(
        lambda _m, _i, out: seen.update(mlp=out.shape)
    )
    model(ids, logits_to_keep=torch.tensor([2, 7]))
    assert {name: shape[1] for name, shape in seen.items()} == {
        "q_proj": 2, "k_proj": 12, "v_proj": 12, "o_proj": 2, "mlp": 2,
    }  # fmt: skip


def test_hidden_states_are_those_between_the_layers(make_model, ids):
    model = make_model()
    states = model(ids, output_hidden_states=True, logits_to_keep=2).hidden_states
    assert [s.shape[1] for s in states] == [12] * 5 + [2]
    torch.testing.assert_close(states[4], model.model.final_layernorm(states[3]))
    torch.testing.assert_close(model.lm_head(states[5]), model(ids).logits[:, -2:], **TOLERANCE)


def test_loss_is_mean_cross_entropy_of_the_next_label(make_model, ids):
    model = make_model()
    labels = ids.clone()
    labels[:, :4] = -100
    log_probabilities = model(ids).logits.log_softmax(-1)
    picked = [log_probabilities[b, t - 1, labels[b, t]] for b in range(3) for t in range(4, 12)]
    expected = -torch.stack(picked).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    kept = torch.arange(3, 11)
    torch.testing.assert_close(model(ids, labels=labels, logits_to_keep=kept).loss, expected)


def test_gradient_checkpointing_gives_the_same_gradients(make_model, ids):
    fields = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    gradients = []
    for checkpointed in (False, True):
        model = make_model(**fields).train()
        if checkpointed:
            model.activation_checkpointing_enable()
            calls: list[int] = []
            again = model.model.query_layer.input_layernorm
            again.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert len(calls) == 2  # forward and recomputation


def test_dropout_is_at_the_four_places(make_model, ids):
    plain = make_model().model(ids).last_hidden_state
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.testing.assert_close(make_model(**off).train().model(ids).last_hidden_state, plain)
    for name in off:
        dropped = make_model(**off | {name: 0.5}).train().model(ids).last_hidden_state
        assert not torch.allclose(dropped, plain), name
    # With everything dropped at the residual, only final_layernorm of the embeddings is left.
    model = make_model(**off | {"resid_pdrop": 1.0}).train()
    embedded = model.model.embed_tokens(ids) + model.model.embed_positions(torch.arange(12))
    expected = model.model.final_layernorm(embedded)
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_left_padded_equals_each_row_alone(make_model, ids, attention):
    model = make_model(attn_implementation=attention, eos_token_id=None)
    lengths, new = [12, 7, 3], 6
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    batch = ids.masked_fill(mask == 0, 6)
    out = model.generate(batch, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 12 - length :]
        for _ in range(new):
            with torch.no_grad():
                following = model(alone, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            alone = torch.cat([alone, following], 1)
        assert out[row, 12:].tolist() == alone[0, length:].tolist()


def test_saved_model_loads_through_the_auto_classes(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PanguConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, PanguForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_prompt_tuning_by_peft_equals_prepended_embeddings(make_model, ids):
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config).eval()
    mask = torch.ones_like(ids)
    logits = tuned(input_ids=ids, attention_mask=mask, logits_to_keep=3).logits
    prompt = tuned.get_prompt(3)
    embeds = torch.cat([prompt, model.model.embed_tokens(ids)], 1)
    torch.testing.assert_close(logits, model(inputs_embeds=embeds).logits[:, -3:], **TOLERANCE)
    logits.sum().backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


def test_initial_weights():
    torch.manual_seed(0)
    config = PanguConfig(
        vocab_size=3000, hidden_size=256, num_hidden_layers=8, num_attention_heads=4
    )
    weights = PanguForCausalLM(config).state_dict()
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "layernorm" in name:
            assert (weight == 1).all(), name
        else:
            output = "o_proj" in name or "down_proj" in name
            expected = 0.02 / math.sqrt(16) if output else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name
            assert weight.mean().item() == pytest.approx(0, abs=expected / 30), name


def _full_size_shapes() -> dict[str, list[int]]:
    with torch.device("meta"):
        model = PanguForCausalLM(PanguConfig())
    return {name: list(p.shape) for name, p in model.named_parameters()}


def test_default_configuration_is_the_2_6b_model():
    shapes = _full_size_shapes()
    assert len(shapes) == 517
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_625_295_360


def test_full_size_shapes_are_those_of_the_published_files(reference_data: Path):
    published = json.loads(
        (reference_data / "golden/pangu/keys_2_6B_megatron_mp1.json").read_text()
    )
    assert sorted(_full_size_shapes().values()) == sorted(published.values())


def test_wrong_inputs_are_refused(make_model, ids):
    model = make_model()
    with pytest.raises(InputError, match="seen 41 positions, expected at most 40"):
        model(torch.ones(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="seen 5 columns, expected 12"):
        model(ids, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(3, 12, 32))
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, logits_to_keep=torch.ones(3, 12, dtype=torch.bool))
    for attention in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attention
        with pytest.raises(InputError, match=f"seen {attention}.*use sdpa"):
            model(ids, attention_mask=tree_mask(12)[None], position_ids=TREE_POSITIONS)


def test_left_padding_may_exceed_the_positions(make_model):
    model = make_model()
    ids = torch.full((1, 45), 11)
    mask = (torch.arange(45) >= 10).long()[None]
    alone = model(ids[:, 10:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 10:], alone, **TOLERANCE)


def test_head_size_must_divide():
    with pytest.raises(Exception, match="not a multiple of num_attention_heads"):
        PanguConfig(hidden_size=30, num_attention_heads=4)


@pytest.mark.parametrize("rows_differ", [False, True])
def test_states_that_all_rows_share_are_attended_to_without_a_copy(
    make_model, ids, monkeypatch, rows_differ
):
    """Logits and gradients are those of a cache that holds them once for each row."""
    model, rows, tokens, common = make_model(), len(ids), 5, 6
    states = [torch.randn(2, 1, 4, common, 8, generator=torch.manual_seed(n)) for n in range(4)]
    seen = torch.cat([torch.ones(tokens, common, dtype=torch.bool), causal(tokens)], dim=1)
    seen = seen.expand(rows, 1, -1, -1).clone()
    if rows_differ:
        seen[1, :, :, 2], seen[2, :, 3:, 0] = False, False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = mask if rows_differ else mask[:1]
    calls = []
    real = modeling.shared_attention
    monkeypatch.setattr(
        modeling, "shared_attention", lambda *args: calls.append(args) or real(*args)
    )
    results = {}
    for shared in (True, False):
        leaves = [state.clone().requires_grad_() for state in states]
        prefix = Prefix(common, [leaf[0] for leaf in leaves], [leaf[1] for leaf in leaves])
        logits = model(
            ids[:, :tokens],
            attention_mask=mask,
            position_ids=torch.arange(common, common + tokens)[None],
            cache=prefix.cache() if shared else prefix.growing_cache(rows),
            use_cache=True,
            logits_to_keep=torch.tensor([2, 4]),
        ).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
        results[shared] = [logits, *(leaf.grad for leaf in leaves)]
        assert len(calls) == 4
    for got, expected in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)
