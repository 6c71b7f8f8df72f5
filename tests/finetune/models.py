"""Small pretrained models of every kind, and what tests do with a method."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from finetune.method import Finetuned

Shape = dict[str, Any]
LABELS = ["动画", "音乐舞蹈", "知识", "生活", "影视"]
TINY: Shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(vocabulary: int, **shape: Any) -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=vocabulary, num_hidden_layers=2, **shape))


def albert(vocabulary: int, **shape: Any) -> nn.Module:
    return AlbertForMaskedLM(
        AlbertConfig(vocab_size=vocabulary, num_hidden_layers=2, **shape, pad_token_id=0)
    )


def gpt2(vocabulary: int, **shape: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_layer=2, **shape))


def untied(model: Any) -> nn.Module:
    """A fresh T5 always shares its output layer; published ByT5 and mT5 do not."""
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(torch.randn_like(weight) * 0.05)
    return model


def byt5(vocabulary: int, **shape: Any) -> nn.Module:
    config = T5Config(
        vocab_size=384, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape
    )
    return untied(T5ForConditionalGeneration(config))


def mt5(vocabulary: int, **shape: Any) -> nn.Module:
    config = MT5Config(vocab_size=vocabulary, tie_word_embeddings=False, **shape)
    return untied(MT5ForConditionalGeneration(config))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "bert": bert, "albert": albert, "gpt2": gpt2, "byt5": byt5, "mt5": mt5
}  # fmt: skip
T5_TINY: Shape = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "dropout_rate": 0.0,
}  # fmt: skip
SHAPES: dict[str, Shape] = {
    "bert": {**TINY, **NO_DROPOUT},
    "albert": {**TINY, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    "gpt2": {
        "n_embd": 32, "n_head": 4, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0
    },
    "byt5": T5_TINY,
}  # fmt: skip


def write_model(
    kind: str, folder: Path, vocabulary: Path | None, shape: Shape, scale: float = 1.0
) -> Path:
    """A checkpoint with random weights, its matrices `scale` times as large as usual."""
    rows = 384
    if vocabulary is not None:
        shutil.copy(vocabulary, folder / "vocab.txt")
        rows = len(vocabulary.read_text(encoding="utf-8").splitlines())
    torch.manual_seed(0)
    model: Any = KINDS[kind](rows, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    return folder


def score(method: Finetuned, texts: Sequence[str]) -> np.ndarray:
    """[texts, labels] log-probabilities."""
    method.module.eval()
    found = np.full((len(texts), len(method.labels)), np.nan, dtype=np.float32)
    for batch in method.score_batches(texts):
        found[batch.rows] = method.scores(batch).numpy()
    return found


def train(method: Finetuned, table: Any, steps: int = 3, lr: float = 1e-3) -> list[float]:
    """The mean losses of some steps on the same examples."""
    examples = method.training_set(table, 0)
    rows = list(range(12))
    optimizer = torch.optim.AdamW([p for p in method.module.parameters() if p.requires_grad], lr)
    method.module.train()
    losses = []
    for _ in range(steps):
        loss = method.loss(examples.batch(rows)) / examples.weights[rows].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    method.module.eval()
    return losses


def export(method: Finetuned, folder: Path) -> None:
    """What the launcher does at the end of training."""
    trained = {
        n: p.detach().clone() for n, p in method.module.named_parameters() if p.requires_grad
    }
    method.export(trained, folder)
