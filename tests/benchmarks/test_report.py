"""The report benchmark compares before it measures."""

import csv
from pathlib import Path

import pytest

from benchmarks import report


def test_equal_on_small_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "are equal to scikit-learn's" in printed and "holds" not in printed


def test_a_wrong_figure_stops_it(tmp_path: Path) -> None:
    run = report.make_run(tmp_path / "a", 200)
    report.report([run], tmp_path / "out")
    file = tmp_path / "out" / "leaderboard.csv"
    report.check([run], tmp_path / "out")
    with file.open(encoding="utf-8", newline="") as lines:
        header, first, *others = csv.reader(lines)
    place = header.index("macro-F1")
    first[place] = str(float(first[place]) + 1e-6)
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, first, *others])
    with pytest.raises(AssertionError, match="macro-F1"):
        report.check([run], tmp_path / "out")
