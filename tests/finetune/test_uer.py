"""UER-py checkpoints: converted, they give the states that UER's own sums give."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
)

from finetune.__main__ import main

WIDTH, HEADS, INNER, ROWS, POSITIONS, LAYERS = 768, 12, 1024, 60, 16, 2
EMBEDDED = 128
Weights = dict[str, Tensor]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """UER's config and a vocabulary of 60 tokens."""
    settings = {"heads_num": HEADS, "layers_num": LAYERS, "dropout": 0.1, "hidden_act": "gelu"}
    (tmp_path / "uer.json").write_text(json.dumps(settings), encoding="utf-8")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E00 + 55))]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return {"config": tmp_path / "uer.json", "vocab": tmp_path / "vocab.txt"}


def linear(weights: Weights, name: str, states: Tensor) -> Tensor:
    return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, states: Tensor) -> Tensor:
    """UER's: the sample standard deviation, and the epsilon outside of the root."""
    centred = states - states.mean(-1, keepdim=True)
    scaled = centred / (states.std(-1, keepdim=True) + 1e-6)
    return weights[f"{name}.gamma"] * scaled + weights[f"{name}.beta"]


def usual_norm(weights: Weights, name: str, states: Tensor) -> Tensor:
    """transformers', with which nothing but rounding may differ."""
    gamma, beta = weights[f"{name}.gamma"], weights[f"{name}.beta"]
    return layer_norm(states, (states.shape[-1],), gamma, beta, eps=1e-12)


@pytest.fixture(params=["own", "usual"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """What may differ with UER's own normalisation, and with the usual one in its place."""
    if request.param == "own":
        return 1e-2
    monkeypatch.setitem(globals(), "norm", usual_norm)
    return 5e-5


def attention(weights: Weights, own: str, states: Tensor, *, causal: bool) -> Tensor:
    rows, length, width = states.shape
    query, key, value = (
        linear(weights, f"{own}.linear_layers.{part}", states)
        .view(rows, length, HEADS, width // HEADS)
        .transpose(1, 2)
        for part in range(3)
    )
    logits = query @ key.transpose(2, 3) / math.sqrt(width // HEADS)
    if causal:
        logits = logits + torch.full((length, length), -1e4).triu(1)
    mixed = (logits.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, width)
    return linear(weights, f"{own}.final_linear", mixed)


def forward(weights: Weights, ids: Tensor, *, causal: bool, act: Any = gelu) -> Tensor:
    """[rows, length, width] states as UER-py computes them."""
    states = weights["embedding.word.embedding.weight"][ids]
    states = states + weights["embedding.pos.embedding.weight"][: ids.shape[1]]
    if not causal:
        # Segments are numbered from 1: 0 is padding.
        states = states + weights["embedding.seg.embedding.weight"][1]
        states = norm(weights, "embedding.layer_norm", states)
    if "encoder.linear.weight" in weights:
        states = linear(weights, "encoder.linear", states)
    for layer in range(LAYERS):
        own = f"encoder.transformer.{layer}"
        if f"{own}.layer_norm_1.gamma" not in weights:
            own = "encoder.transformer"
        before = norm(weights, f"{own}.layer_norm_1", states) if causal else states
        states = states + attention(weights, f"{own}.self_attn", before, causal=causal)
        states = states if causal else norm(weights, f"{own}.layer_norm_1", states)
        before = norm(weights, f"{own}.layer_norm_2", states) if causal else states
        inner = act(linear(weights, f"{own}.feed_forward.linear_1", before))
        states = states + linear(weights, f"{own}.feed_forward.linear_2", inner)
        states = states if causal else norm(weights, f"{own}.layer_norm_2", states)
    return norm(weights, "encoder.layer_norm", states) if causal else states


def make(kind: str, *, labels: int = 0) -> Weights:
    """Random weights under UER's names."""
    generator = torch.Generator().manual_seed(len(kind) + labels)
    weights: Weights = {}

    def matrix(name: str, *shape: int, scale: float = 0.3) -> None:
        weights[name] = torch.randn(*shape, generator=generator) * scale

    def layer(name: str, outputs: int, inputs: int) -> None:
        matrix(f"{name}.weight", outputs, inputs, scale=1 / math.sqrt(inputs))
        matrix(f"{name}.bias", outputs, scale=0.1)

    def normal(name: str, width: int = WIDTH) -> None:
        matrix(f"{name}.gamma", width, scale=0.1)
        weights[f"{name}.gamma"] += 1
        matrix(f"{name}.beta", width, scale=0.1)

    embedded = EMBEDDED if kind == "albert" else WIDTH
    matrix("embedding.word.embedding.weight", ROWS, embedded)
    matrix("embedding.pos.embedding.weight", POSITIONS, embedded)
    if kind != "gpt2":
        matrix("embedding.seg.embedding.weight", 3, embedded)
        normal("embedding.layer_norm", embedded)
    if kind == "albert":
        layer("encoder.linear", WIDTH, EMBEDDED)
    names = [f"encoder.transformer.{i}" for i in range(LAYERS)]
    for own in ["encoder.transformer"] if kind == "albert" else names:
        for part in ("linear_layers.0", "linear_layers.1", "linear_layers.2", "final_linear"):
            layer(f"{own}.self_attn.{part}", WIDTH, WIDTH)
        layer(f"{own}.feed_forward.linear_1", INNER, WIDTH)
        layer(f"{own}.feed_forward.linear_2", WIDTH, INNER)
        normal(f"{own}.layer_norm_1")
        normal(f"{own}.layer_norm_2")
    words = weights["embedding.word.embedding.weight"]
    if kind == "gpt2":
        normal("encoder.layer_norm")
        weights["target.lm.output_layer.weight"] = words
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    elif labels:
        layer("output_layer_1", WIDTH, WIDTH)
        layer("output_layer_2", labels, WIDTH)
    else:
        layer("target.mlm.linear_1", embedded, WIDTH)
        normal("target.mlm.layer_norm", embedded)
        weights["target.mlm.linear_2.weight"] = words
        matrix("target.mlm.linear_2.bias", ROWS)
    return weights


def converted(weights: Weights, files: dict[str, Path], tmp_path: Path) -> Path:
    torch.save(weights, tmp_path / "model.bin")
    arguments = ["--config", str(files["config"]), "--vocab", str(files["vocab"])]
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), *arguments]) == 0
    return tmp_path / "out"


IDS = torch.tensor([[2, 7, 30, 9, 3], [2, 11, 12, 59, 3]])


@pytest.mark.parametrize("kind", ["bert", "albert"])
@torch.no_grad()
def test_encoders_predict_masked_tokens_alike(
    kind: str, files: dict[str, Path], tmp_path: Path, tolerance: float
) -> None:
    weights = make(kind)
    folder = converted(weights, files, tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    states = forward(weights, IDS, causal=False)
    found = model.base_model(IDS).last_hidden_state
    torch.testing.assert_close(found, states, rtol=0, atol=tolerance)
    inner = gelu(linear(weights, "target.mlm.linear_1", states))
    inner = norm(weights, "target.mlm.layer_norm", inner)
    expected = linear(weights, "target.mlm.linear_2", inner)
    assert different(model(IDS).logits, expected) < tolerance
    assert AutoTokenizer.from_pretrained(folder)("一丁").input_ids == [2, 5, 6, 3]


@pytest.mark.parametrize("kind", ["bert", "albert"])
@torch.no_grad()
def test_classifiers_classify_alike(
    kind: str, files: dict[str, Path], tmp_path: Path, tolerance: float
) -> None:
    weights = make(kind, labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(converted(weights, files, tmp_path))
    pooled = linear(weights, "output_layer_1", forward(weights, IDS, causal=False)[:, 0]).tanh()
    expected = linear(weights, "output_layer_2", pooled)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_gpt2_predicts_tokens_alike(
    files: dict[str, Path], tmp_path: Path, tolerance: float
) -> None:
    settings = json.loads(files["config"].read_text(encoding="utf-8"))
    files["config"].write_text(json.dumps({**settings, "hidden_act": "gelu_fast"}))
    weights = make("gpt2")
    model = GPT2LMHeadModel.from_pretrained(converted(weights, files, tmp_path))
    states = forward(weights, IDS, causal=True, act=partial(gelu, approximate="tanh"))
    expected = states @ weights["embedding.word.embedding.weight"].T
    assert different(model(IDS).logits, expected) < tolerance


def different(found: Tensor, expected: Tensor) -> float:
    """The largest difference beside the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_what_has_no_place_is_named(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = make("bert") | {"target.cls.surplus.weight": torch.ones(2)}
    torch.save(weights, tmp_path / "model.bin")
    arguments = ["--config", str(files["config"]), "--vocab", str(files["vocab"])]
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), *arguments]) == 2
    assert "have no place for: target.cls.surplus.weight" in capsys.readouterr().err
    files["vocab"].write_text("[PAD]\n", encoding="utf-8")
    torch.save(make("bert"), tmp_path / "model.bin")
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), *arguments]) == 2
    assert "1 tokens, but the checkpoint has 60" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
