"""The fine-tuning benchmark compares before it measures, and counts what it says it counts."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import finetune
from benchmarks.finetune_peers import PEERS
from launcher import distributed


@pytest.fixture(scope="module")
def subject() -> Iterator[finetune.Subject]:
    examples, _ = finetune._data(None, finetune.QUICK_EXAMPLES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bert"
        finetune._write_model(folder, None, examples, quick=True)
        yield finetune.Subject(folder, examples, quick=True)
    distributed.stop()


@pytest.mark.parametrize("name", PEERS)
def test_all_methods_agree_on_a_tiny_model(subject: finetune.Subject, name: str) -> None:
    figures = finetune.Figures()
    finetune.compare(subject, name, figures)
    assert max(figures.loss_difference, figures.gradient_difference) < 1e-5


def test_another_loss_is_found(monkeypatch: pytest.MonkeyPatch, subject: finetune.Subject) -> None:
    """Padding that is seen as text."""
    right = PEERS["dynamic"].collate

    def wrong(step):  # type: ignore[no-untyped-def]
        return {**right(step), "attention_mask": None}

    monkeypatch.setitem(PEERS, "dynamic", replace(PEERS["dynamic"], collate=wrong))
    with pytest.raises(AssertionError, match=r"^dynamic: the (mean loss|gradient) differs"):
        finetune.compare(subject, "dynamic", finetune.Figures())


def test_another_optimizer_is_found(
    monkeypatch: pytest.MonkeyPatch, subject: finetune.Subject
) -> None:
    """A learning rate of Trainer's that is two percent too high."""
    train = type(PEERS["dynamic"]).train

    def wrong(peer, model, steps, lr, weight_decay, clip):  # type: ignore[no-untyped-def]
        train(peer, model, steps, 1.02 * lr, weight_decay, clip)

    monkeypatch.setattr(type(PEERS["dynamic"]), "train", wrong)
    with pytest.raises(AssertionError, match="^dynamic: after 2 steps"):
        finetune.compare(subject, "dynamic", finetune.Figures())


def test_tokens_are_counted(subject: finetune.Subject) -> None:
    lengths = subject.examples.lengths
    rows = np.argsort(lengths, kind="stable")[[0, -1]]

    def counted(name: str) -> int:
        figures = finetune.Figures()
        with finetune._counting(subject, name, figures):
            finetune.train(subject, name, [rows])
        return figures.tokens

    assert counted("dynamic") == 2 * lengths[rows].max()
    assert counted("fixed 128") == 2 * 128
    assert counted("ours") in (lengths[rows].sum(), 2 * lengths[rows].max())


def test_flops_of_a_text_are_those_of_its_matrix_products() -> None:
    """Twice each product's multiplications forward, and twice that backward."""
    layers, width, inner, length, labels = 3, 16, 40, 5, 6
    config = BertConfig(
        vocab_size=9, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=inner, attn_implementation="eager",
    )  # fmt: skip
    config.num_labels = labels
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    multiplied = layers * length * (4 * width**2 + 2 * width * inner + 2 * length * width)
    multiplied += width**2 + width * labels
    assert finetune.example_flops(model, length) == pytest.approx(3 * 2 * multiplied, rel=0.01)


def test_no_ratio_without_a_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("REFERENCE_DATA", raising=False)
    assert finetune.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "losses, gradients and updates are equal" in printed
    assert "holds" not in printed
