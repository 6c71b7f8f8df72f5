"""Every kind of checkpoint, converted, against numbers of the reference implementation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from prompting.pangu import PanguForCausalLM
from prompting.pangu.conversion import convert

TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 0}
FULL_PRECISION = [
    "megatron_mp1",
    "megatron_mp1_padded256",
    "megatron_mp1_release",
    "megatron_mp2",
    "megatron_mp2_padded256_trainstate",
    "evolution_mp1",
    "hf_imone_style",
]
EVERY = [*FULL_PRECISION, "megatron_mp1_fp16"]


@pytest.fixture(scope="module")
def golden(reference_data: Path) -> dict[str, torch.Tensor]:
    return torch.load(reference_data / "golden/pangu/golden.pt", weights_only=True)


@pytest.fixture(scope="module")
def load(reference_data: Path, tmp_path_factory) -> Callable[..., PanguForCausalLM]:
    """`load(folder name, attention, config fields)`: the converted checkpoint, in fp32."""
    converted: dict[str, Path] = {}

    def load(name: str, attention: str = "sdpa", **fields) -> PanguForCausalLM:
        if name not in converted:
            converted[name] = tmp_path_factory.mktemp("converted") / name
            convert(
                reference_data / "golden/pangu" / name,
                converted[name],
                vocab_size=200,
                heads=4,
                trust_pickle=name.endswith("trainstate"),
            )
        return AutoModelForCausalLM.from_pretrained(
            converted[name], dtype=torch.float32, attn_implementation=attention, **fields
        ).eval()

    return load


def close_where_valid(logits, expected, golden) -> None:
    for row, length in enumerate(golden["B_lens"].tolist()):
        torch.testing.assert_close(logits[row, :length], expected[row, :length], **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EVERY)
def test_logits(load, golden, name, attention):
    suffix = "_fp16weights" if name.endswith("fp16") else ""
    model = load(name, attention)
    with torch.no_grad():
        a, b = model(golden["A_ids"]).logits, model(golden["B_ids"]).logits
        padded = model(golden["B_ids"], attention_mask=(golden["B_ids"] != 6).long()).logits
    torch.testing.assert_close(a, golden[f"A_logits{suffix}"], **TOLERANCE)
    close_where_valid(b, golden[f"B_logits{suffix}"], golden)
    close_where_valid(padded, golden[f"B_logits{suffix}"], golden)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_full_length_eod_resets_and_left_padding(load, golden, attention):
    model = load("megatron_mp1", attention)
    ids, seen = golden["C_ids"], ~golden["C_mask_reset"]
    additive = torch.zeros(seen.shape).masked_fill(~seen, -10000.0)
    positions = golden["C_pos_reset"]
    with torch.no_grad():
        found = {
            "D_logits": model(golden["D_ids"]),
            "C_logits_noreset": model(ids),
            "C_logits_reset_mask": model(ids, attention_mask=seen),
            "C_logits_reset_both": model(ids, attention_mask=additive, position_ids=positions),
        }
        left = model(golden["L_ids"], attention_mask=golden["L_mask"]).logits
    for name, output in found.items():
        torch.testing.assert_close(output.logits, golden[name], **TOLERANCE)
    valid = golden["L_mask"].bool()
    torch.testing.assert_close(left[valid], golden["L_logits_hf"][valid], **TOLERANCE)


@pytest.mark.parametrize("name", FULL_PRECISION)
def test_hidden_states_and_cache(load, golden, name):
    model = load(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        states = model(golden["A_ids"], cache=cache, output_hidden_states=True).hidden_states
    expected = [golden[f"A_hidden_after_layer{index}"] for index in range(3)]
    expected += [golden["A_after_final_layernorm"], golden["A_after_top_query_layer"]]
    for state, reference in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(state, reference, **TOLERANCE)
    keys = golden["A_top_present_k"].permute(1, 2, 0, 3)  # from [tokens, batch, heads, size]
    torch.testing.assert_close(vars(cache.layers[-1])["keys"], keys, **TOLERANCE)


def test_incremental_decoding(load, golden):
    model = load("megatron_mp1")
    cache = DynamicCache(config=model.config)
    steps = [slice(0, 7), slice(7, 8), slice(8, 13), slice(13, 16)]
    with torch.no_grad():
        parts = [model(golden["A_ids"][:, step], cache=cache).logits for step in steps]
    torch.testing.assert_close(torch.cat(parts, 1), golden["A_logits"], **TOLERANCE)


def test_loss_and_gradients(load, golden):
    model = load("megatron_mp1")
    loss = model(golden["A_ids"], labels=golden["A_ids"]).loss
    torch.testing.assert_close(loss, golden["A_loss"], **TOLERANCE)
    loss.backward()
    inner = model.model
    found = {
        "embedding.word_embeddings": inner.embed_tokens,
        "embedding.position_embeddings": inner.embed_positions,
        "topQueryEmbedding.top_query_embeddings": inner.embed_queries,
        "transformer.topQueryLayer.attention.query": inner.query_layer.self_attn.q_proj,
        "transformer.layers.0.mlp.dense_h_to_4h": inner.layers[0].mlp.up_proj,
        "transformer.final_layernorm": inner.final_layernorm,
    }
    assert sum(name.startswith("A_grad/") for name in golden) == len(found)
    for name, module in found.items():
        expected = golden[f"A_grad/language_model.{name}.weight"]
        torch.testing.assert_close(module.weight.grad, expected, **TOLERANCE)


@pytest.mark.parametrize("name", FULL_PRECISION)
def test_greedy_continuation(load, golden, name):
    out = load(name).generate(golden["A_ids"], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out.tolist() == golden["A_greedy8"].tolist()


def test_tanh_gelu(load, golden):
    model = load("megatron_mp1", hidden_act="gelu_new")
    with torch.no_grad():
        logits = model(golden["A_ids"]).logits
        b = model(golden["B_ids"]).logits
    torch.testing.assert_close(logits, golden["A_logits_tanh_gelu"], **TOLERANCE)
    close_where_valid(b, golden["B_logits_tanh_gelu"], golden)
    assert (logits - golden["A_logits"]).abs().max() > 1e-3  # the two variants do differ
