"""The scoring benchmark compares before it measures, and counts what it says it counts."""

import pytest
import torch

from benchmarks import scoring
from prompting import scorer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: no peer to compare with")


def test_all_methods_agree_on_tiny_models(monkeypatch, capsys):
    monkeypatch.delenv("REFERENCE_DATA", raising=False)

    assert scoring.main(["--quick"]) == 0

    printed = capsys.readouterr().out
    assert printed.count("lm-eval is given") == 5
    assert "scores are equal" in printed
    assert "holds" not in printed


@pytest.mark.parametrize("peer", ["lm-eval", "loop", "study"])
def test_wrong_answers_stop_it(monkeypatch, peer):
    """One label of one text off by 3e-4 relative, or one token, is found."""
    right = scoring.METHODS[peer]

    def wrong(subject, texts, batch):
        answers = right(subject, texts, batch)
        if peer == "study":
            answers[-1][0] += 1
        else:
            answers[-1] = answers[-1].clone()
            answers[-1][2] += 3e-4 * (1 + abs(answers[-1][2]))
        return answers

    monkeypatch.setitem(scoring.METHODS, peer, wrong)
    with pytest.raises(AssertionError, match=peer):
        scoring.main(["--quick"])


def test_sums_are_compared_besides_the_normalised_scores(monkeypatch):
    """A constant added to all labels of a text drops out of the normalised scores."""
    right = scorer.score_words
    monkeypatch.setattr(scorer, "score_words", lambda *given: right(*given) + 0.01)
    with pytest.raises(AssertionError, match="lm-eval"):
        scoring.main(["--quick"])


def test_work_is_counted():
    model = scoring._model("PanGu", quick=True)
    figures = scoring.Figures()
    with torch.inference_mode(), scoring._counting(model, figures):
        model(torch.ones(3, 7, dtype=torch.int64), logits_to_keep=torch.tensor([5, 6]))

    # One ordinary layer of 12 h^2 for each of 21 tokens; the query layer's keys and values for
    # all, its queries once for all rows, the rest of it and the head for the 6 kept.
    square = 32 * 32
    layers = 21 * 12 * square + 21 * 2 * square + 2 * square + 6 * 9 * square
    assert figures.tokens == 21
    assert figures.head_rows == 6
    assert figures.multiplications == layers + 6 * 32 * scoring.VOCABULARY
