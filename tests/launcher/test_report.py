"""Reports: their figures are the metrics', runs that can't be compared stay apart, text is text."""

import base64
import csv
import hashlib
import json
import re
import statistics
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from data_prep.dataset import SCHEMA, Dataset, write_dataset
from launcher.metrics import compute, write_metrics
from launcher.predictions import make_table, merge_parts, read_predictions, write_part
from launcher.report import SYNTHETIC, drawing, main, prompts_table, write_run_report
from launcher.report.leaderboard import DEFINITIONS
from launcher.run_folder import trained_parameters

LABELS = ["动画", "音乐舞蹈", "知识"]
EVIL = "<script>alert('x')</script> </table> | *{text}* `属于`哪个分区? $a$"
N = 60


def make_run(
    folder: Path,
    seed: int = 0,
    *,
    labels: Sequence[str] = LABELS,
    ids: str = "chat",
    split: str = "dev",
    synthetic: bool = False,
    generated: bool = False,
    texts: Sequence[str] | None = None,
    shares: np.ndarray | None = None,
    provenance: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run of 60 examples whose gold labels are always the same, and its predictions are not."""
    gold = np.random.default_rng(99).integers(0, len(labels), N)
    scores = np.random.default_rng(seed).normal(size=(N, len(labels)))
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    table = make_table(
        ids=[f"{ids}-{i}" for i in range(N)],
        texts=["x"] * N if texts is None else texts,
        labels=gold if shares is None else shares.argmax(axis=1),
        distributions=shares,
        scores=None if generated else scores,
        predicted=np.where(np.arange(N) < 7, -1, gold) if generated else None,
        label_names=labels,
        provenance={"synthetic": synthetic, **(provenance or {})},
    )
    write_part(folder, split, 0, table)
    merge_parts(folder, split)
    if config is not None:
        text = yaml.safe_dump({"run": {"name": folder.name, "seed": seed}, **config})
        (folder / "config.yaml").write_text(text, encoding="utf-8")
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
        names = ("href", "src", "xlink:href")
        self.links += [values[name] or "" for name in names if name in values]
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
            joined = f"{self.tables[-1][-1][-1]} {' '.join(data.split())}"
            self.tables[-1][-1][-1] = joined.strip()

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the first table whose header begins like this."""
        return next(t[1:] for t in self.tables if t and t[0][: len(header)] == list(header))


def cells_of(metrics: dict[str, Any], *more: str) -> list[str]:
    """A row's figures as a reader should see them."""
    cells = []
    for key in ("acc@1", "acc@3", "hit@1", "hit@3", "macro_f1", *more):
        value, interval = metrics[key]["value"], metrics[key]["ci95"]
        known = value is not None
        cells.append(f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if known else "–")
    return [*cells, str(metrics["n"]), str(metrics["unmatched"])]


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def report(tmp_path: Path, *runs: Path, against: str | None = None) -> tuple[str, Page, Path]:
    """Markdown, page and folder of a report."""
    out = tmp_path / "out"
    more = ["--against", against] if against else []
    assert main([*map(str, runs), "--out", str(out), *more]) == 0
    html = (out / "report.html").read_text(encoding="utf-8")
    return (out / "report.md").read_text(encoding="utf-8"), Page(html), out


def test_tables_hold_the_metrics(tmp_path: Path) -> None:
    scored, generated = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1, generated=True)
    row = {"title": "prompt 1", "prompt": "{text} 属于哪个分区?", "method": "prompting.discrete"}
    (scored / "report_row.json").write_text(json.dumps(row), encoding="utf-8")
    stored = "method: prompting.discrete\nprompt: {template: {question: '弹幕分类: {text}'}}\n"
    (generated / "config.yaml").write_text(stored, encoding="utf-8")
    write_metrics(scored)

    markdown, page, out = report(tmp_path, scored, generated)
    measured = [
        compute(read_predictions(run / "predictions/dev.parquet")) for run in (scored, generated)
    ]
    assert measured[1]["unmatched"] == 7
    support = [one["support"] for one in measured[0]["per_class"].values()]
    share, largest = max(support) / N, LABELS[int(np.argmax(support))]
    f1 = 2 * share / (1 + share) / 3
    # One-hot gold: Acc@3 can't exceed Acc@1, while three best of three labels always hit.
    bar, top = f"{share:.3f}", "1.000"
    third = "0.333"
    heads = [
        ["prompt 1", "{text} 属于哪个分区?", "prompting.discrete"],
        ["b", "弹幕分类: {text}", "prompting.discrete"],
    ]
    bars = [[bar, bar, bar, top, f"{f1:.3f}"], [third, third, third, top, "–"]]
    expected = [head + cells_of(one) for head, one in zip(heads, measured, strict=True)]
    expected.append(["majority class", f"always {largest}", "–", *bars[0], "60", "–"])
    expected.append(["chance", "one of 3", "–", *bars[1], "60", "–"])
    assert table_rows(prompts_table([scored, generated]))[2:] == expected

    # The leaderboard: the better one first, with calibration.
    rows = [head + cells_of(one, "ece") for head, one in zip(heads, measured, strict=True)][::-1]
    rows.append(["majority class", "–", f"always {largest}", *bars[0], "–", "60", "–"])
    rows.append(["chance", "–", "one of 3", *bars[1], "–", "60", "–"])
    assert table_rows(markdown)[2:6] == rows
    assert page.tables[0][1:] == rows
    stored_rows = {row["run"]: row for row in csv_rows(out / "leaderboard.csv")}
    for name, one in (("prompt 1", measured[0]), ("b", measured[1])):
        assert float(stored_rows[name]["Acc@1"]) == one["acc@1"]["value"]
        assert float(stored_rows[name]["Acc@1 high"]) == one["acc@1"]["ci95"][1]
    for definition in DEFINITIONS:
        assert definition in markdown and definition in page.text

    # Each run's own tables: per category, then the confusion matrix.
    classes = [table[1:] for table in page.tables if table[0][:2] == ["category", "precision"]]
    matrices = [table for table in page.tables if table[0] == ["gold", *LABELS, "unmatched"]]
    for index, metrics in enumerate(measured):
        for shown, (name, one) in zip(classes[index], metrics["per_class"].items(), strict=True):
            figures = [f"{one[key]:.3f}" for key in ("precision", "recall", "f1")]
            assert shown == [name, *figures, str(one["support"])]
        cells = [[int(cell) for cell in row[1:]] for row in matrices[index][1:]]
        assert cells == metrics["confusion"]

    again = tmp_path / "again"
    assert main([str(scored), str(generated), "--out", str(again)]) == 0
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert {"report.html", "report.md", "errors.csv"} <= {str(file) for file in files}
    assert [f for f in files if (out / f).read_bytes() != (again / f).read_bytes()] == []


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"labels": ["动画", "知识", "生活"]}, "labels"),
        ({"ids": "other"}, "examples or gold labels"),
        ({"texts": ["y"] * N}, "examples or gold labels"),
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

    _, page, _ = report(tmp_path, *runs)
    assert "Set apart" in page.text
    (pair,) = page.table("A", "B")
    assert set(pair[:2]) == {"a", "b"}


def test_seeds_of_one_config_are_one_row(tmp_path: Path) -> None:
    def config(lr: float) -> dict[str, Any]:
        return {"method": "baselines.mlp", "train": {"lr": lr}}

    runs = [make_run(tmp_path / f"s{seed}", seed, config=config(0.1)) for seed in range(3)]
    runs.append(make_run(tmp_path / "same_seed", 2, config=config(0.1)))
    runs.append(make_run(tmp_path / "other", 4, config=config(0.2)))
    runs.append(make_run(tmp_path / "unknown", 5))
    table, page, _ = report(tmp_path, *runs)
    rows = {row[0]: row[1:] for row in page.tables[0][1:-2]}
    assert set(rows) == {"s0 (3 seeds)", "same_seed", "other", "unknown"}
    values = [
        compute(read_predictions(run / "predictions/dev.parquet"))["acc@1"]["value"]
        for run in runs[:3]
    ]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert rows["s0 (3 seeds)"][1] == f"{mean:.3f} ± {spread:.3f}"
    assert "seeds are drawn as well as examples" in table
    assert len(page.table("A", "B")) == 6


def test_cost_and_curves_come_from_the_logs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed) for seed, name in enumerate(["long", "short", "none"])]
    for run, epochs in zip(runs[:2], (3, 2), strict=True):
        lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "dev_acc@1": 0.25}]
        for epoch in range(epochs):
            step = 40 * (epoch + 1)
            log = {"step": step, "epoch": epoch, "loss": 1.0, "tokens_per_s": 100.0 * (epoch + 1)}
            lines += [{**log, "memory_bytes": 3 << 30}]
            lines += [{"step": step, "epoch": epoch, "dev_acc@1": 0.3 + 0.1 * epoch}]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12'
        (run / "train_log.jsonl").write_text(text, encoding="utf-8")
    environment = {
        "hardware": {"world_size": 2, "gpus": [], "cpu": "x86_64"},
        "cost": {"trained_parameters": 51_200, "memory_bytes": 1 << 30, "wall_seconds": 192.0},
    }
    (runs[0] / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    markdown, page, out = report(tmp_path, *runs)
    header = page.tables[0][0]
    row = next(row for row in page.tables[0] if row[0] == "long")
    costs = dict(zip(header, row, strict=True))
    assert costs["trained"] == "51.2 k" and costs["tokens/s"] == "200"
    assert costs["peak memory"] == "3.0 GiB" and costs["wall time"] == "3 min 12 s"
    assert costs["device"] == "x86_64, 2 ranks"
    best = page.table("run", "epoch", "Acc@1")
    assert best == [["long", "3", "0.500", "4"], ["short", "2", "0.400", "3"]]
    assert "Without a curve, because they did not train: none." in markdown
    svg = (out / "figures/learning_curves.svg").read_text(encoding="utf-8")
    assert "long" in svg and "short" in svg


def test_trained_parameters_are_counted() -> None:
    from torch import nn

    layer = nn.Linear(3, 4)
    assert trained_parameters(SimpleNamespace(module=layer, replicated=None)) == 16
    layer.bias.requires_grad_(False)
    assert trained_parameters(SimpleNamespace(module=layer, replicated=None)) == 12
    assert trained_parameters(SimpleNamespace(module=layer, replicated=nn.Embedding(5, 2))) == 10


def test_parts_of_the_examples(tmp_path: Path) -> None:
    """Accuracy by length, frequency, categories, relatives and filter, against plain counting."""
    generator = np.random.default_rng(3)
    texts = [
        "".join(generator.choice(list("天地人你我他哈"), size))
        for size in generator.integers(2, 9, N)
    ]
    texts[:4] = ["哈哈哈哈", "233", "啊吗啊吗", "天地人和"]
    shares = generator.integers(0, 3, size=(N, 3)).astype(np.float32)
    shares[:, 0] += 0.5
    shares /= shares.sum(axis=1, keepdims=True)
    frequency = generator.integers(1, 12, N)
    train = ["天地人和气", "你我", "火山"]
    dataset = Dataset(
        labels=tuple(LABELS),
        splits={
            "train": rows(["t0", "t1", "t2"], train, [0, 1, 2], [1, 1, 1]),
            # In another order: examples are found by their ids.
            "dev": rows(
                [f"chat-{i}" for i in range(N)][::-1],
                texts[::-1],
                shares.argmax(axis=1)[::-1].tolist(),
                frequency[::-1].tolist(),
            ),
        },
        provenance={},
        grouping=None,
        sha256={},
    )
    write_dataset(tmp_path / "data", dataset)
    config = {"data": {"path": str(tmp_path / "data")}}
    run = make_run(tmp_path / "a", texts=texts, shares=shares, config=config)
    files = sorted((tmp_path / "data").iterdir())
    hashes = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    environment = json.dumps({"data_sha256": hashes})
    (run / "environment.json").write_text(environment, encoding="utf-8")

    _, page, out = report(tmp_path, run)
    measured = read_predictions(run / "predictions/dev.parquet")
    right = measured.predicted == shares.argmax(axis=1)
    parts = {(row["by"], row["part"]): row for row in csv_rows(out / "slices.csv")}

    def expect(by: str, part: str, members: list[bool]) -> None:
        seen = parts[by, part]
        assert int(seen["n"]) == sum(members) > 0, (by, part)
        hits = sum(bool(hit) for hit, inside in zip(right, members, strict=True) if inside)
        assert float(seen["a"]) == pytest.approx(hits / sum(members))

    expect("length", "4", [len(text) == 4 for text in texts])
    expect("length", "7–8", [7 <= len(text) <= 8 for text in texts])
    expect("frequency", "3–4", [3 <= count <= 4 for count in frequency])
    expect("frequency", "10–29", [count >= 10 for count in frequency])
    expect("categories", "2", [np.count_nonzero(row) == 2 for row in shares])
    related = [any(text in other or other in text for other in train) for text in texts]
    expect("relatives", "with a relative", related)
    expect("relatives", "without", [not one for one in related])
    empty = [
        text in ("233",) or bool(re.fullmatch(r"(.)\1{2,}|(..+)\2+.?", text)) for text in texts
    ]
    expect("meaningless", "says nothing", empty)

    # The nearest training text of what is shown, with its label.
    assert "天地人和气（动画）" in page.text

    (tmp_path / "data/train.parquet").touch()
    (tmp_path / "data/labels.json").write_text(
        (tmp_path / "data/labels.json").read_text("utf-8") + "\n", encoding="utf-8"
    )
    markdown, _, _ = report(tmp_path, run)
    assert "have changed since" in markdown and "frequency | " not in markdown


def rows(ids: list[str], texts: list[str], labels: list[int], frequency: list[int]) -> pa.Table:
    n = len(ids)
    columns = [ids, texts, labels, [None] * n, [f"video-{i % 2}" for i in range(n)], frequency]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def test_coarser_levels_have_a_table(tmp_path: Path) -> None:
    grouping = {"泛娱乐": LABELS[:2], "知识": LABELS[2:]}
    run = make_run(tmp_path / "a", provenance={"levels": {"main": grouping}})
    _, page, _ = report(tmp_path, run)
    one = read_predictions(run / "predictions/dev.parquet")
    group = np.array([0, 0, 1])
    p = np.exp(one.scores) @ np.eye(2)[group]
    accuracy = (p.argmax(axis=1) == group[one.labels]).mean()
    (row,) = page.table("run", "level", "categories")
    assert row[:3] == ["a", "main", "2"] and row[3].startswith(f"{accuracy:.3f} [")


def test_beside_the_study(tmp_path: Path) -> None:
    def prompt(name: str, scoring: str, path: str) -> dict[str, Any]:
        template = {"name": name, "question": "{text}"}
        return {
            "method": "prompting.discrete",
            "prompt": {"template": template, "scoring": scoring},
            "model": {"path": path},
        }

    pangu = "models/pangu-alpha-evolution-2.6B"
    runs = [
        make_run(tmp_path / "a", 0, config=prompt("study_4", "generate", pangu)),
        make_run(tmp_path / "b", 1, config=prompt("study_1", "sum", "runs/nano/model")),
        make_run(tmp_path / "c", 2, config={"method": "baselines.linear"}),
    ]
    _, page, _ = report(tmp_path, *runs, against="paper")
    rows = page.table("study's system", "metric", "reported")
    assert [row[2:4] for row in rows] == [
        ["0.093", "b"], ["0.118", "b"], ["0.145", "a"], ["0.158", "a"],
    ]  # fmt: skip
    by_run = {row[3]: row[6] for row in rows}
    for why in ("categories: 5 in the study, 3 here", "data unit: words in the study", "test set"):
        assert all(why in reasons for reasons in by_run.values())
    assert "model: another one" in by_run["b"] and "model" not in by_run["a"]
    assert "prompt.scoring is 'sum', the study's generate" in by_run["b"]
    assert "No run here repeats: MLP baseline" in page.text
    _, page, _ = report(tmp_path, *runs)
    assert "Beside the study" not in page.text


def test_synthetic_data_is_said_everywhere(tmp_path: Path) -> None:
    real, synthetic = make_run(tmp_path / "a"), make_run(tmp_path / "b", synthetic=True)
    assert SYNTHETIC not in prompts_table([real])
    assert SYNTHETIC not in write_run_report(real).read_text(encoding="utf-8")
    assert SYNTHETIC in prompts_table([real, synthetic])
    assert SYNTHETIC in write_run_report(synthetic).read_text(encoding="utf-8")
    markdown, page, _ = report(tmp_path, real, synthetic)
    assert SYNTHETIC in markdown and SYNTHETIC in page.text
    (real / "report_row.json").write_text('{"synthetic": true}', encoding="utf-8")
    assert SYNTHETIC in prompts_table([real])


def test_text_is_shown_as_it_is_and_nothing_is_fetched(tmp_path: Path) -> None:
    labels = ["<b>动画</b>", "a|b", "[x](http://y)"]
    run = make_run(tmp_path / "a", labels=labels, texts=[f"{EVIL}{i}" for i in range(N)])
    row = json.dumps({"title": EVIL, "prompt": EVIL})
    (run / "report_row.json").write_text(row, encoding="utf-8")
    markdown, page, out = report(tmp_path, run)
    html = (out / "report.html").read_text(encoding="utf-8")
    # The data and the page's own script; the latter alone may run.
    assert page.tags.count("script") == 2 and "b" not in page.tags
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    allowed = re.search(r"script-src 'sha256-([^']+)'", html)
    assert allowed is not None and len(scripts) == 1
    digest = hashlib.sha256(scripts[0].encode()).digest()
    assert base64.b64encode(digest).decode() == allowed[1]
    assert page.tables[0][1][0] == EVIL and "<b>动画</b>" in page.text
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert "default-src 'none'" in html

    data = json.loads(re.findall(r'id="data">(.*?)</script>', html, re.S)[0])
    assert all(text.startswith(EVIL) for text in data[0][0]["texts"])
    assert len(data[0][0]["runs"][0]["rows"]) == len(csv_rows(out / "errors.csv"))
    plain = re.sub(r"\]\(figures/[\w.]+\)", "", markdown)
    assert "<script" not in plain and "<b>" not in plain and "](" not in plain
    assert len({len(row) for row in table_rows(markdown)[:5]}) == 1
    for file in (out / "figures").glob("*.svg"):
        text = "".join(ElementTree.parse(file).getroot().itertext())
        assert "script>" not in file.read_text(encoding="utf-8")
        if file.name.startswith("confusion"):
            assert "<b>动画</b>" in text


def test_pictures_have_every_character_or_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 1)]
    monkeypatch.setattr(drawing, "cjk_font", lambda: None)
    markdown, _, out = report(tmp_path, *runs)
    figures = {file.name for file in (out / "figures").iterdir()}
    # The names of runs have no Chinese character, those of categories have.
    assert "accuracy_dev.png" in figures and "confusion_dev_1.png" not in figures
    assert "confusion_dev_1.svg" in figures
    assert "(no PNG: no font here has" in markdown
    live = (out / "figures/confusion_dev_1.svg").read_text(encoding="utf-8")
    assert "音乐舞蹈" in live and "Noto Sans CJK SC" in live

    monkeypatch.undo()
    if drawing.cjk_font() is None:
        pytest.skip("no Chinese font on this machine: no picture to look at")
    markdown, _, out = report(tmp_path, *runs)
    assert (out / "figures/confusion_dev_1.png").read_bytes().startswith(b"\x89PNG")
    assert "no PNG" not in markdown


def test_a_runs_own_report_is_quick(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    write_run_report(run)
    start = time.process_time()
    page = Page(write_run_report(run).read_text(encoding="utf-8"))
    assert time.process_time() - start < 2
    assert page.table("text", "gold", "predicted")


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
