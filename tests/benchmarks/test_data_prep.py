"""The data benchmark compares before it measures, and its comparison can fail."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import data_prep


def test_loop_and_build_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_prep, "QUICK_ROWS", 3000)
    assert data_prep.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "words, their frequencies, distributions and labels are equal" in printed
    assert "holds" not in printed


def test_comparison_finds_a_difference(tmp_path: Path) -> None:
    data_prep.write_corpus(tmp_path / "corpus", ["前方高能预警", "滑铁卢了吧这"], 500)
    expected = data_prep.plain_loop(tmp_path / "corpus")
    run = data_prep.build(tmp_path / "corpus", tmp_path / "dataset")
    assert run.cpu > 0 and 0.02 < run.gib < 4
    data_prep.compare(expected, tmp_path / "dataset")
    word = next(iter(expected))
    zone = max(range(21), key=expected[word].__getitem__)
    expected[word][zone] += 1
    with pytest.raises(AssertionError, match=f"frequency of {word} differs"):
        data_prep.compare(expected, tmp_path / "dataset")
    expected[word][zone] -= 2
    expected[word][(zone + 1) % 21] += 1
    with pytest.raises(AssertionError, match=f"distribution of {word} differs"):
        data_prep.compare(expected, tmp_path / "dataset")
    del expected[word]
    with pytest.raises(AssertionError, match="too many"):
        data_prep.compare(expected, tmp_path / "dataset")


def test_corpus_repeats_and_edits(tmp_path: Path) -> None:
    texts = ["前方高能预警", "滑铁卢了吧这"]
    data_prep.write_corpus(tmp_path / "corpus", texts, 2000)
    drawn = pq.read_table(tmp_path / "corpus/chats.parquet")["text"].to_pylist()
    edited = [text for text in drawn if text not in texts]
    assert 0.15 < len(edited) / len(drawn) < 0.3
    assert {len(text) for text in edited} == {5, 6, 7}
