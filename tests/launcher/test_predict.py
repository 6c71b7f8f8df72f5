"""Single texts get the scores that the run's own predictions hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset import Dataset


@pytest.fixture(scope="session")
def scored(start: Any, discrete: list[str], runs: Path) -> Path:
    """A run to classify with; it was sharded over two ranks, which classifying is not."""
    job = start([*discrete, "run.name=scored", "parallel.zero=3"], ranks=2).wait()
    assert job.codes == [0, 0], job.err
    return runs / "scored"


def answers(job: Any) -> list[dict[str, Any]]:
    assert job.codes == [0], job.err
    return [json.loads(line) for line in job.out.splitlines()]


def test_lines_get_the_scores_of_the_run(
    scored: Path, start: Any, sample: Dataset, predictions_of: Any, tmp_path: Path
) -> None:
    file, stored = tmp_path / "texts.txt", predictions_of("scored")
    # A byte order mark, Windows' line ends and a last line without one are not of the texts.
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(stored.texts).encode())
    from_file = answers(start([str(scored), str(file)], module="launcher.predict").wait())
    assert [answer["text"] for answer in from_file] == stored.texts.tolist()
    labels = [sample.labels[index] for index in stored.predicted]
    assert [answer["label"] for answer in from_file] == labels
    assert list(from_file[0]["scores"]) == list(sample.labels)
    scores = [list(answer["scores"].values()) for answer in from_file]
    np.testing.assert_allclose(scores, stored.scores, rtol=0, atol=1e-4)
    from_stdin = start([str(scored), "-"], module="launcher.predict", stdin=file).wait()
    assert answers(from_stdin) == from_file


def test_a_line_without_a_text_is_answered_as_such(
    scored: Path, start: Any, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("前方高能\n\n \n前方高能\n", encoding="utf-8")
    given = answers(start([str(scored), str(file)], module="launcher.predict").wait())
    assert given[1:3] == [
        {"text": "", "error": "empty text"},
        {"text": " ", "error": "empty text"},
    ]
    assert given[0] == given[3] and given[0]["label"] is not None
    (tmp_path / "empty.txt").write_bytes(b"")
    empty = start([str(scored), str(tmp_path / "empty.txt")], module="launcher.predict").wait()
    assert answers(empty) == []


def test_what_cannot_be_classified_is_refused(
    scored: Path, start: Any, pretrain: list[str], runs: Path, tmp_path: Path
) -> None:
    job = start([*pretrain, "run.name=trained", "train.epochs=1"]).wait()
    assert job.codes == [0], job.err
    file = tmp_path / "gb.txt"
    file.write_bytes("前方高能\n".encode("gb18030"))
    cases: Sequence[tuple[list[str], str]] = [
        ([str(scored), str(file)], f"{file}: not UTF-8"),
        ([str(scored), str(tmp_path / "none")], f"{tmp_path / 'none'}: can't be read"),
        ([str(tmp_path), str(file)], f"{tmp_path}: no run here"),
        ([str(runs / "trained"), str(file)], "a run of prompting.pretrain classifies nothing"),
    ]
    job = start(commands=[("launcher.predict", arguments) for arguments, _ in cases]).wait()
    assert job.codes == [0], job.err
    assert job.out == ""
    for (_, expected), message in zip(
        cases, job.err_file.read_text(encoding="utf-8").split("\0"), strict=False
    ):
        assert expected in message
        assert message.count("\n") == 1


def test_a_pretrained_model_can_be_asked(
    start: Any, pretrain: list[str], discrete: list[str], runs: Path
) -> None:
    """The two methods meet in `model/`: what one writes the other reads."""
    job = start([*pretrain, "run.name=asked", "train.epochs=1"]).wait()
    assert job.codes == [0], job.err
    model = runs / "asked" / "model"
    job = start([*discrete, "run.name=asking", f"model.path={model}"]).wait()
    assert job.codes == [0], job.err
    assert (runs / "asking" / "metrics.json").exists()
