"""Fine-tunes by the launcher: the same however the model is held, and what they leave behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from data_prep.dataset import Dataset

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="session")
def encoder(sample: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has seen nothing, with a vocabulary of single characters and no pooler."""
    folder = tmp_path_factory.mktemp("models")
    texts = [text for split in sample.splits.values() for text in split["text"].to_pylist()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(texts).lower()})]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokens), **SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ByT5 whose output layer is not its embedding."""
    folder = tmp_path_factory.mktemp("byt5")
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=1,
                 feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
                 decoder_start_token_id=0)
    )  # fmt: skip
    model.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def arguments(data: Path, runs: Path) -> Callable[..., list[str]]:
    """`arguments(method, folder, *overrides)` of a run of 10 steps."""

    def make(method: str, folder: Path, *overrides: str) -> list[str]:
        values = {
            "method": f"finetune.{method}",
            "run": {"name": "unnamed", "dir": str(runs), "seed": 5},
            "data": {"path": str(data)},
            "model": {"path": str(folder)},
            "train": {"epochs": 2, "global_batch": 70, "micro_batch_tokens": 256, "lr": 2e-3,
                      "keep": "last"},
        }  # fmt: skip
        file = runs / f"finetune_{method}.yaml"
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        return ["--config", str(file), *overrides]

    return make


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


LEVELS = "finetune.levels.half.grouping={one: [动画, 影视], other: [音乐舞蹈, 知识, 生活]}"
WAYS: dict[str, tuple[str, list[str]]] = {
    "all": ("encoder", ["finetune.layer_decay=0.7", LEVELS]),
    "lora": (
        "encoder",
        ["finetune.trains=lora", "encoder.pooling=mean", "train.lr=2e-2", "train.epochs=1"],
    ),
    "words": ("seq2seq", ["train.micro_batch_tokens=4096", "train.epochs=1"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_sharded_ranks_train_as_one(
    way: str, start: Any, arguments: Any, encoder: Path, byt5: Path, runs: Path,
    predictions_of: Any, sample: Dataset, tmp_path: Path,
) -> None:  # fmt: skip
    method, overrides = WAYS[way]
    folder = byt5 if method == "seq2seq" else encoder
    own = arguments(method, folder, *overrides)
    whole, sharded = f"fine-{way}-0", f"fine-{way}-3"
    texts = sample.splits["dev"]["text"].to_pylist()[:5]
    (tmp_path / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    one = start(
        commands=[
            ("launcher.run", [*own, f"run.name={whole}", "parallel.zero=0"]),
            ("launcher.predict", [str(runs / whole), str(tmp_path / "texts")]),
        ]
    )
    two = start([*own, f"run.name={sharded}", "parallel.zero=3"], ranks=2)
    assert one.wait().codes == [1], one.err  # of several commands: 1 if none was refused
    assert two.wait().codes == [0, 0], two.err
    lines = log_of(runs / whole)
    for line, other in zip(lines, log_of(runs / sharded), strict=True):
        name = "loss" if "loss" in line else "dev_loss"
        assert line[name] == pytest.approx(other[name], abs=1e-4)
    losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
    assert losses[-1] < losses[0]
    first, second = (predictions_of(name).scores for name in (whole, sharded))
    np.testing.assert_allclose(first, second, rtol=0, atol=2e-3)

    stored = predictions_of(whole)
    answers = [json.loads(line) for line in one.out.splitlines() if line.startswith('{"text"')]
    rows = [stored.texts.tolist().index(text) for text in texts]
    for answer, row in zip(answers, rows, strict=True):
        expected = dict(zip(stored.label_names, stored.scores[row].tolist(), strict=True))
        assert answer["scores"] == pytest.approx(expected, abs=1e-5)
    if way == "all":
        weights = load_file(runs / whole / "model" / "model.safetensors")
        for name, value in load_file(runs / sharded / "model" / "model.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, msg=name)
        metrics = json.loads((runs / whole / "metrics.json").read_text(encoding="utf-8"))
        half = metrics["splits"]["dev"]["levels"]["half"]
        assert half["labels"] == ["one", "other"]
        assert half["acc@1"]["value"] >= metrics["splits"]["dev"]["acc@1"]["value"]


def test_a_finished_run_needs_nothing_but_its_folder(runs: Path) -> None:
    """Tokens are shared by all runs beside each other: one file for each tokenizer."""
    kept = [*(runs / ".tokens").iterdir()]
    assert {file.suffix for file in kept} == {".safetensors"}
    assert len(kept) == 2
