"""Reports: their figures are the metrics', runs that can't be compared stay apart, text is text."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.metrics import compute, write_metrics
from launcher.predictions import make_table, merge_parts, read_predictions, write_part
from launcher.report import DEFINITIONS, SYNTHETIC, main, prompts_table, write_run_report

LABELS = ["动画", "音乐舞蹈", "知识"]
EVIL = "<script>alert('x')</script> | *{text}* `属于`哪个分区?"


def make_run(
    folder: Path,
    seed: int = 0,
    *,
    labels: Sequence[str] = LABELS,
    ids: str = "chat",
    split: str = "dev",
    synthetic: bool = False,
    generated: bool = False,
) -> Path:
    """A run of 60 examples whose gold labels are always the same, and its predictions are not."""
    n, gold = 60, np.random.default_rng(99).integers(0, len(labels), 60)
    scores = np.random.default_rng(seed).normal(size=(n, len(labels)))
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    table = make_table(
        ids=[f"{ids}-{i}" for i in range(n)],
        texts=["x"] * n,
        labels=gold,
        distributions=None,
        scores=None if generated else scores,
        predicted=np.where(np.arange(n) < 7, -1, gold) if generated else None,
        label_names=labels,
        provenance={"synthetic": synthetic},
    )
    write_part(folder, split, 0, table)
    merge_parts(folder, split)
    return folder


class Page(HTMLParser):
    """The tables of a page as text, all tags, and all links to elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += " ".join(data.split()) and f" {' '.join(data.split())}"


def cells_of(metrics: dict[str, Any]) -> list[str]:
    """A row's figures as a reader should see them."""
    cells = []
    for key in ("acc@1", "acc@3", "hit@1", "hit@3", "macro_f1"):
        value, interval = metrics[key]["value"], metrics[key]["ci95"]
        known = value is not None
        cells.append(f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if known else "–")
    return [*cells, str(metrics["n"]), str(metrics["unmatched"])]


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_tables_hold_the_metrics(tmp_path: Path) -> None:
    scored, generated = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1, generated=True)
    row = {"title": "prompt 1", "prompt": "{text} 属于哪个分区?", "method": "prompting.discrete"}
    (scored / "report_row.json").write_text(json.dumps(row), encoding="utf-8")
    stored = "method: prompting.discrete\nprompt: {template: {question: '弹幕分类: {text}'}}\n"
    (generated / "config.yaml").write_text(stored, encoding="utf-8")
    write_metrics(scored)

    assert main([str(scored), str(generated), "--out", str(tmp_path / "out")]) == 0
    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    measured = [
        compute(read_predictions(run / "predictions/dev.parquet")) for run in (scored, generated)
    ]
    assert measured[1]["unmatched"] == 7
    support = [one["support"] for one in measured[0]["per_class"].values()]
    share, largest = max(support) / 60, LABELS[int(np.argmax(support))]
    f1 = 2 * share / (1 + share) / 3
    # One-hot gold: Acc@3 can't exceed Acc@1, while three best of three labels always hit.
    bar, top = f"{share:.3f}", "1.000"
    third = "0.333"
    expected = [
        ["prompt 1", "{text} 属于哪个分区?", "prompting.discrete", *cells_of(measured[0])],
        ["b", "弹幕分类: {text}", "prompting.discrete", *cells_of(measured[1])],
        ["majority class", f"always {largest}", "–", bar, bar, bar, top, f"{f1:.3f}", "60", "–"],
        ["chance", "one of 3", "–", third, third, third, top, "–", "60", "–"],
    ]
    assert table_rows(prompts_table([scored, generated]))[2:] == expected
    assert table_rows(markdown)[2:6] == expected
    page = Page(html)
    assert [[cell.strip() for cell in row] for row in page.tables[0][1:]] == expected
    assert prompts_table([scored, generated]).strip() in markdown
    for definition in DEFINITIONS:
        assert definition in markdown and definition in page.text

    # Each run's own tables: per category, then the confusion matrix.
    for index, metrics in enumerate(measured):
        classes, confusion = page.tables[1 + 2 * index : 3 + 2 * index]
        for shown, (name, one) in zip(classes[1:], metrics["per_class"].items(), strict=True):
            figures = [f"{one[key]:.3f}" for key in ("precision", "recall", "f1")]
            assert [cell.strip() for cell in shown] == [name, *figures, str(one["support"])]
        assert [[int(cell) for cell in row[1:]] for row in confusion[1:]] == metrics["confusion"]
        assert [cell.strip() for cell in confusion[0]] == ["gold", *LABELS, "unmatched"]

    again = tmp_path / "again"
    assert main([str(scored), str(generated), "--out", str(again)]) == 0
    assert (again / "report.html").read_text(encoding="utf-8") == html
    assert (again / "report.md").read_text(encoding="utf-8") == markdown


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"labels": ["动画", "知识", "生活"]}, "labels"),
        ({"ids": "other"}, "examples or gold labels"),
        ({"split": "test"}, "split"),
    ],
)
def test_runs_that_differ_are_set_apart(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", 1),
        make_run(tmp_path / "c", **other),
    ]
    table = prompts_table(runs)
    first, second = table.split(f"Set apart: measured on other {reason} than the first table")
    assert [row[0] for row in table_rows(first)][2:] == ["a", "b", "majority class", "chance"]
    assert [row[0] for row in table_rows(second)][2:] == ["c", "majority class", "chance"]
    assert "Set apart" not in prompts_table(runs[:2])


def test_synthetic_data_is_said_everywhere(tmp_path: Path) -> None:
    real, synthetic = make_run(tmp_path / "a"), make_run(tmp_path / "b", synthetic=True)
    assert SYNTHETIC not in prompts_table([real])
    assert SYNTHETIC not in write_run_report(real).read_text(encoding="utf-8")
    assert SYNTHETIC in prompts_table([real, synthetic])
    assert SYNTHETIC in write_run_report(synthetic).read_text(encoding="utf-8")
    assert main([str(real), str(synthetic), "--out", str(tmp_path)]) == 0
    for name in ("report.md", "report.html"):
        assert SYNTHETIC in (tmp_path / name).read_text(encoding="utf-8")
    (real / "report_row.json").write_text('{"synthetic": true}', encoding="utf-8")
    assert SYNTHETIC in prompts_table([real])


def test_text_is_shown_as_it_is_and_nothing_is_fetched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", labels=["<b>动画</b>", "a|b", "[x](http://y)"])
    row = json.dumps({"title": EVIL, "prompt": EVIL})
    (run / "report_row.json").write_text(row, encoding="utf-8")
    html = write_run_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "b" not in page.tags
    assert page.tables[0][1][1].strip() == EVIL and "<b>动画</b>" in page.text
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html

    assert main([str(run), "--out", str(tmp_path)]) == 0
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<b>" not in markdown and "](" not in markdown
    assert len({len(row) for row in table_rows(markdown)[:5]}) == 1


def test_runs_without_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, partial = make_run(tmp_path / "whole"), make_run(tmp_path / "partial")
    (partial / "predictions/test.parts").mkdir()
    (tmp_path / "empty").mkdir()
    broken = make_run(tmp_path / "broken")
    (broken / "predictions/dev.parquet").write_bytes(b"PAR1")
    for name in ("partial", "empty", "broken", "missing"):
        out = tmp_path / "out"
        assert main([str(whole), str(tmp_path / name), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and str(tmp_path / name) in printed.err
        assert not out.exists()
