"""The tuning benchmark compares before it measures, and counts what it says it counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import tuning
from benchmarks.common import Claim
from benchmarks.tuning_peers import PEERS


def test_all_methods_agree_on_a_tiny_model(monkeypatch, capsys):
    monkeypatch.delenv("REFERENCE_DATA", raising=False)

    assert tuning.main(["--quick"]) == 0

    printed = capsys.readouterr().out
    assert "losses, gradients and updates are equal" in printed
    compared = [line.split()[-3:] for line in printed.splitlines() if "ours" not in line]
    assert sum(all("e-" in gap or gap == "0.0e+00" for gap in gaps) for gaps in compared) == 6
    assert "holds" not in printed


@pytest.fixture(scope="module")
def subject():
    tokenizer, examples, _ = tuning._data(None, tuning.QUICK_EXAMPLES)
    model = tuning._model(len(tokenizer), quick=True)
    return tuning.Subject(tuning._config(20, quick=True), model, tokenizer, examples)


@pytest.mark.parametrize("name", PEERS)
def test_another_loss_is_found(monkeypatch, subject, name):
    """An answer's token missing from the labels of one example."""
    right = PEERS[name].collate

    def wrong(step, vectors):
        batch = right(step, vectors)
        batch["labels"][0] = -100
        return batch

    monkeypatch.setitem(PEERS, name, replace(PEERS[name], collate=wrong))
    with pytest.raises(AssertionError, match=f"^{name}: the mean loss"):
        tuning.compare(subject, name, tuning.Figures())


def test_another_gradient_is_found(monkeypatch, subject):
    right = tuning.peft_gradient

    def wrong(*given):
        loss, gradient = right(*given)
        return loss, gradient * 1.0003

    monkeypatch.setattr(tuning, "peft_gradient", wrong)
    with pytest.raises(AssertionError, match=r"^Trainer: the gradient"):
        tuning.compare(subject, "Trainer", tuning.Figures())


@pytest.mark.parametrize("name", ["Trainer", "padded"])
def test_another_optimizer_is_found(monkeypatch, subject, name):
    """A learning rate that is one percent too high."""
    peer = PEERS[name]

    def wrong(peft, steps, collate, lr, clip):
        peer.train(peft, steps, collate, 1.01 * lr, clip)

    monkeypatch.setitem(PEERS, name, replace(peer, train=wrong))
    with pytest.raises(AssertionError, match=f"^{name}: after 3 steps"):
        tuning.compare(subject, name, tuning.Figures())


def test_work_is_counted(subject):
    """Two passes of ours, each with its prefix of 20; Trainer pads; kept: 3 tokens of an answer."""
    trie = subject.method.asked.trie
    fed, longest = len(trie.tokens), max(map(len, trie.words))
    lengths = subject.examples.lengths
    rows = np.argsort(lengths, kind="stable")[[0, -1]]
    answers = [len(subject.features[row]["input_ids"]) for row in rows]

    def counted(name):
        figures = tuning.Figures()
        with tuning._counting(subject.model, figures):
            tuning.train(subject, name, [rows])
        return figures.tokens, figures.head_rows

    passes = 1 if 2 * lengths[rows].max() <= 64 else 2
    assert counted("Trainer") == (2 * (20 + max(answers)),) * 2
    assert counted("padded") == (2 * 1024, 2 * 1024)
    tokens, head_rows = counted("ours")
    assert tokens == 20 * passes + (2 * lengths[rows].max() if passes == 1 else lengths[rows].sum())
    assert head_rows == passes + 2 * (1 + fed)
    assert counted("Trainer kept oneDNN")[1] <= 2 * longest


def test_timed_steps_stand_for_all_lengths():
    lengths = np.random.default_rng(0).permutation(64 * 200 + 7)
    batches = tuning.step_order(lengths, tuning.BATCH, seed=0)

    rounds = tuning.spread_over_lengths(batches, lengths, 3)

    drawn = [tuple(rows) for steps in rounds for rows in steps]
    assert len(set(drawn)) == 9
    assert {len(rows) for rows in drawn} == {64}
    for steps in rounds:
        shares = [lengths[rows].mean() / len(lengths) for rows in steps]
        assert shares == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=0.03)


def test_claims_bound_either_way():
    assert Claim("fast", 2.0, 2.0).holds and not Claim("fast", 1.9, 2.0).holds
    assert Claim("cheap", 1.4, 1.4, at_most=True).holds
    dear = Claim("cheap", 1.5, 1.4, at_most=True)
    assert dear.line() == "cheap: 1.50x, goal at most 1.4x, falls short"


def test_ours_learns(subject):
    """What is timed is training: the loss falls."""
    rows = np.arange(16)
    subject.reset()
    before = tuning.accumulate(subject, rows, lambda loss: loss.backward())
    subject.reset()
    tuning.train(subject, "ours", [rows] * 20)
    after = tuning.accumulate(subject, rows, lambda loss: None)
    assert float(after) < float(before) - 0.1
    assert torch.isfinite(subject.prompt).all()
