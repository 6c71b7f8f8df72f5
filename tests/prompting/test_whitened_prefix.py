"""Prefix tuning in coordinates of the model's queries: what is measured and how it starts."""

from typing import Any

import pytest
import torch

from launcher.errors import InputError
from prompting import models, soft_prompt, whitened_prefix
from prompting.settings import TuningSettings
from prompting.template import encode_pieces
from prompting.whitened_prefix import HeadStates, WhitenedPrefix

FRONT = {"template": {"question": "{soft:7}弹幕: {text}", "choice": ""}}
WHITENED = {"kind": "prefix", "init": "whitened"}
TAIL = "\n答案:"


@pytest.fixture
def config(folders) -> Any:
    return models.check_checkpoint(str(folders["pangu"]))


def prompts(method, texts) -> list[list[int]]:
    before, *own, behind = encode_pieces(method.asked.tokenizer, ["弹幕: ", *texts, TAIL])
    return [[*before, *ids, *behind] for ids in own]


def seen(config, seed: int) -> tuple[list[torch.Tensor], list[HeadStates]]:
    """Queries [n, heads, size] of each layer, far from zero and from round, as heads saw them."""
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    generator = torch.Generator().manual_seed(seed)
    queries, states = [], []
    for _ in range(config.num_hidden_layers):
        mixed = torch.randn(heads, size, size, generator=generator)
        means = 3 * torch.randn(heads, size, generator=generator)
        drawn = torch.randn(500, heads, size, generator=generator)
        queries.append(torch.einsum("nhd,hde->nhe", drawn, mixed) + means)
        own = HeadStates(heads, size)
        for part in queries[-1].split(100):
            own.see_queries(part.flatten(1)[None])
            own.see_values(part.flatten(1)[None])
        states.append(own)
    return queries, states


def test_steps_change_scores_alike_in_all_directions(config, monkeypatch):
    """A key's scores with the queries, one coordinate at a time, are of size 1 and unrelated."""
    monkeypatch.setattr(whitened_prefix, "_RIDGE", 0.0)
    prefix = WhitenedPrefix(config, 3, seed=0)
    queries, states = seen(config, 1)
    prefix.fit(states)
    for layer, own in enumerate(queries):
        scores = torch.einsum("nhd,hed->nhe", own, prefix.axes[layer])
        moments = torch.einsum("nhd,nhe->hde", scores, scores) / len(own)
        torch.testing.assert_close(
            moments, torch.eye(own.shape[2]).expand_as(moments), atol=1e-3, rtol=0
        )


@torch.no_grad()
def test_what_heads_see_is_what_stands_behind_the_vectors(tune, texts):
    """Against each text by itself, through the model's own hidden states; without what all begin
    with."""
    method = tune("pangu", FRONT, tuning=WHITENED)
    model = method.module.model
    config = model.config
    shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    queries = [[] for _ in range(config.num_hidden_layers)]
    values = [[] for _ in range(config.num_hidden_layers)]
    common = len(encode_pieces(method.asked.tokenizer, ["弹幕: "])[0])
    for ids in prompts(method, texts):
        places = torch.arange(7, 7 + len(ids))[None]
        states = model(torch.tensor([ids]), position_ids=places, output_hidden_states=True)
        *hidden, last, _ = states.hidden_states
        for layer, block in enumerate(model.model.layers):
            normed = block.input_layernorm(hidden[layer])
            queries[layer].append(block.self_attn.q_proj(normed)[0, common:].unflatten(1, shape))
            values[layer].append(block.self_attn.v_proj(normed)[0, common:].unflatten(1, shape))
        attention = model.model.query_layer.self_attn
        # The query layer asks at the last place alone.
        asked = attention.q_proj(model.model.embed_queries(places[:, -1:]))
        queries[-1].append(asked[0].unflatten(1, shape))
        normed = model.model.query_layer.input_layernorm(last)
        values[-1].append(attention.v_proj(normed)[0, common:].unflatten(1, shape))
    for own, asked, held in zip(method._head_states(texts), queries, values, strict=True):
        second, size = own.moments()
        together = torch.cat(asked)
        expected = torch.einsum("nhd,nhe->hde", together, together) / len(together)
        torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)
        root = torch.cat(held).square().mean((0, 2)).sqrt()
        torch.testing.assert_close(size, root, atol=1e-5, rtol=1e-4)


def test_values_start_at_zero_and_keys_at_random(config, monkeypatch):
    """The scores of a key are 2 wide; another seed gives others."""
    monkeypatch.setattr(whitened_prefix, "_RIDGE", 0.0)
    queries, states = seen(config, 4)
    made = []
    for seed in range(2):
        prefix = WhitenedPrefix(config, 400, seed)
        prefix.fit(states)
        learned = soft_prompt.learned_prefix(prefix(torch.arange(400)), config)
        assert all(torch.equal(own, torch.zeros_like(own)) for own in learned.values)
        made.append(learned.keys)
        for key, own in zip(learned.keys, queries, strict=True):
            scores = torch.einsum("nhd,hmd->hnm", own, key[0]) / own.shape[2] ** 0.5
            assert (scores.square().mean((1, 2)).sqrt() - 2).abs().max() < 0.1
    assert all((one - other).abs().max() > 1 for one, other in zip(*made, strict=True))


def test_a_checkpoint_holds_the_coordinates(config):
    prefix, again = (WhitenedPrefix(config, 3, seed=seed) for seed in (0, 1))
    prefix.fit(seen(config, 3)[1])
    again.load_state_dict(prefix.state_dict())
    places = torch.arange(3)
    assert torch.equal(again(places), prefix(places))
    assert not torch.equal(WhitenedPrefix(config, 3, seed=0)(places), prefix(places))


def test_keys_and_values_alone_can_be_whitened(tune):
    with pytest.raises(
        ValueError, match=r"init 'whitened' starts keys and values, which kind prompt"
    ):
        TuningSettings(kind="prompt", init="whitened")
    with pytest.raises(
        ValueError, match=r"init 'whitened' can't be: what kind prefix learns comes"
    ):
        TuningSettings(kind="prefix", prefix_projection=True, init="whitened")
    with pytest.raises(
        InputError, match=r"^tuning.init: whitened, but model.path is a gpt2, expected"
    ):
        tune("gpt2", FRONT, tuning=WHITENED)
