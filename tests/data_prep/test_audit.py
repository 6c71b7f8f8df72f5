"""The data card: its figures against plain loops over the rows, and what must not be in it."""

import html
import json
import math
import random
import re
import time
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_prep.__main__ import main
from data_prep.audit import make_card
from data_prep.dataset import SCHEMA, Dataset, read_dataset, write_dataset
from data_prep.log_odds import log_odds

LABELS = ("动画", "音乐", "生活", "美食", "影视")


def dataset_of(splits: dict[str, list[dict[str, Any]]], **changes: Any) -> Dataset:
    tables = {}
    for split, rows in splits.items():
        full = [{"id": f"{split}-{i}", "frequency": 1} | row for i, row in enumerate(rows)]
        tables[split] = pa.Table.from_pylist(full, schema=SCHEMA)
    kept: dict[str, Any] = {"provenance": {}, "grouping": None, "sha256": {}}
    return Dataset(labels=LABELS, splits=tables, **(kept | changes))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    """Random texts that repeat, contain each other and differ in form; some without a label."""
    rng = random.Random(3)

    def row() -> dict[str, Any]:
        text = "".join(rng.choices("哈啊鱼A1", (4, 2, 2, 1, 1), k=rng.randint(3, 7)))
        text = text.lower() if rng.random() < 0.2 else text
        text += rng.choice(["", "", "！", "哈哈哈哈哈"])
        shares = rng.choices([0, 0, 0, 1, 2], k=5)
        kind = rng.random()
        return {
            "text": text,
            "label": rng.randrange(5) if kind < 0.6 else None,
            "distribution": [s / sum(shares) for s in shares]
            if any(shares) and kind > 0.3
            else None,
            "group": f"v{rng.randrange(60)}" if rng.random() < 0.9 else None,
            "frequency": rng.choice([1, 1, 1, 2, 3, 9]),
        }

    return {
        name: [row() for _ in range(n)] for name, n in [("test", 70), ("train", 150), ("dev", 60)]
    }


@pytest.fixture(scope="module")
def card(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return make_card(dataset_of(rows), "random")


def plain_form(text: str) -> str:
    kept = ""
    for char in unicodedata.normalize("NFKC", text).casefold():
        if char.isalnum() and not kept.endswith(char * 2):
            kept += char
    return kept


def counted(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Text to its occurrences per category, of the texts that have any."""
    counts: dict[str, list[float]] = {}
    for row in (row for split in rows.values() for row in split):
        shares = row["distribution"]
        if shares is None and row["label"] is not None:
            shares = [float(index == row["label"]) for index in range(5)]
        for index, share in enumerate(shares or []):
            counts.setdefault(row["text"], [0.0] * 5)[index] += share * row["frequency"]
    return counts


def test_leaks_and_duplicates_equal_brute_force(
    card: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> None:
    names = ["train", "dev", "test"]
    expected = []
    for later, split in enumerate(names):
        for against in names[:later]:
            others = rows[against]
            tests = {
                "exact": lambda a, b: a["text"] == b["text"],
                "normalised": lambda a, b: plain_form(a["text"]) == plain_form(b["text"]),
                "substring": lambda a, b: a["text"] in b["text"] or b["text"] in a["text"],
                "video": lambda a, b: a["group"] is not None and a["group"] == b["group"],
            }
            counts = {
                kind: sum(any(same(row, other) for other in others) for row in rows[split])
                for kind, same in tests.items()
            }
            pair: dict[str, Any] = {"split": split, "against": against, "texts": len(rows[split])}
            expected.append(pair | counts)
    assert card["leaks"] == expected
    assert 0 < expected[0]["exact"] < expected[0]["normalised"] < expected[0]["substring"] < 60

    for split, size in card["sizes"].items():
        texts = [row["text"] for row in rows[split]]
        assert size["duplicates"] == {
            "exact": sum(text in texts[:i] for i, text in enumerate(texts)),
            "normalised": len(texts) - len(set(map(plain_form, texts))),
        }
        assert size["occurrences"] == sum(row["frequency"] for row in rows[split])
        assert size["videos"] == len({row["group"] for row in rows[split]} - {None})


def test_no_video_is_named() -> None:
    card = make_card(dataset_of({s: [{"text": "鱼", "label": 0}] for s in ("train", "dev")}), "x")
    assert card["leaks"][0]["video"] is None


def test_distributions_equal_plain_counting(
    card: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> None:
    every = [row for split in rows.values() for row in split]
    sizes = Counter(len(row["text"]) for row in every)
    length = card["lengths"]["all"]
    assert {b["from"]: b["texts"] for b in length["histogram"] if b["texts"]} == sizes
    assert length["share_3_to_6"] == round(sum(sizes[n] for n in (3, 4, 5, 6)) / len(every), 6)

    seen = Counter[str]()
    for row in every:
        seen[row["text"]] += row["frequency"]
    bins = {b["from"]: b["texts"] for b in card["frequencies"]["histogram"]}
    assert bins == {n: sum(n <= f < 2 * n for f in seen.values()) for n in bins}
    assert sum(bins.values()) == len(seen) and card["frequencies"]["largest"] == max(seen.values())

    gold = [
        row["label"] if row["label"] is not None else int(np.argmax(row["distribution"]))
        for row in every
        if row["label"] is not None or row["distribution"]
    ]
    per_label = Counter(LABELS[label] for label in gold)
    assert {name: c["all"] for name, c in card["balance"]["counts"].items()} == per_label
    entropy = -sum(n / len(gold) * math.log2(n / len(gold)) for n in per_label.values())
    assert card["balance"]["entropy_bits"]["all"] == pytest.approx(entropy, abs=1e-6)


def test_ambiguity_equals_plain_counting(
    card: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> None:
    counts = counted(rows)
    appearing = Counter(max(1, sum(round(n, 3) >= 0.5 for n in one)) for one in counts.values())
    got = card["appearances"]
    assert got["texts"] == len(counts)
    assert {b["from"]: b["texts"] for b in got["categories"] if b["texts"]} == appearing
    bits = [-sum(n / sum(c) * math.log2(n / sum(c)) for n in c if n) for c in counts.values()]
    assert got["entropy_bits"]["mean"] == pytest.approx(sum(bits) / len(bits), abs=1e-5)
    assert got["entropy_bits"]["one_category"] == sum(b < 1e-9 for b in bits)
    many = [b for b in bits if b > 1e-9]
    assert sum(b["texts"] for b in got["entropy_bits"]["histogram_of_share_of_most"]) == len(many)


def test_too_general_is_more_than_three_categories() -> None:
    spread = [[0.25] * 4 + [0.0], [0.5, 0.25, 0.25, 0.0, 0.0], [0.96] + [0.01] * 4]
    texts = ["就是这样", "啊吗啊吗", "2333"]

    def flagged(frequency: int) -> dict[str, Any]:
        rows = [
            {"text": f"普通{i}", "distribution": shares, "frequency": frequency}
            for i, shares in enumerate(spread)
        ] + [{"text": text, "distribution": [0.2] * 5, "frequency": frequency} for text in texts]
        rows += rows[1:2]  # a text given twice tells nothing of the frequency of the others
        found = make_card(dataset_of({"train": rows}), "x")["meaningless"]
        return {reason: one["examples"] for reason, one in found.items()}

    shape = {"repetition": ["啊吗啊吗"], "no Han character": ["2333"]}
    assert flagged(8) == shape | {"too general": ["普通0", "就是这样"]}
    # Without frequencies a share of 0.01 counts too: it may be one of a hundred occurrences.
    assert flagged(1) == shape | {"too general": ["普通0", "普通2", "就是这样"]}


def test_characteristic_units_equal_scores_of_the_whole_table(
    card: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> None:
    chats = counted(rows)
    pairs: dict[str, list[float]] = {}
    for text, counts in chats.items():
        for pair in map("".join, pairwise(text)):
            if pair.isalnum():
                row = pairs.setdefault(pair, [0.0] * 5)
                pairs[pair] = [a + b for a, b in zip(row, counts, strict=True)]
    for kind, table in (("chats", chats), ("pairs", pairs)):
        scores = log_odds(np.array(list(table.values())))
        for category, name in enumerate(LABELS):
            z = dict(zip(table, scores[:, category].tolist(), strict=True))
            best = sorted((v for v in z.values() if v > 1.96), reverse=True)[:10]
            shown = card["characteristic"][kind][name]
            assert [one["z"] for one in shown] == pytest.approx(best, abs=1e-4)
            assert all(one["z"] == pytest.approx(z[one["text"]], abs=1e-4) for one in shown)
        assert any(card["characteristic"][kind].values())


SENTINELS = ["13812345678", "139-1234-5678", "jia.yi@mail.cn", "老番茄", "7654321", "314159"]
PRIVATE = [
    "打13812345678找我",
    "13812345678" * 3,
    "139-1234-5678",
    "jia.yi@mail.cn",
    "@老番茄",
    "7654321",
    "加QQ314159",
]


def test_no_personal_data_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": text, "label": index % 5, "group": f"av{text}", "frequency": 50}
        for index, text in enumerate([*PRIVATE, "233333", "<b>&粗"])
    ]
    rows += [{"text": f"好鱼{i}", "label": i % 5} for i in range(20)]
    folder = tmp_path / "七7654321"
    write_dataset(
        folder,
        dataset_of(
            {"train": rows, "test": rows}, provenance={"by": "jia.yi@mail.cn", "7654321": 1}
        ),
    )
    assert main(["audit", str(folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "out/card.html").read_text(encoding="utf-8")
    data = (tmp_path / "out/card.json").read_text(encoding="utf-8")
    for written in (page, data, printed.replace(str(tmp_path), "")):
        assert not [one for one in SENTINELS if one in written]
    digests = re.compile(r"\b[0-9a-f]{64}\b")
    for written in (page, data):
        assert not re.search(r"\d{7,}", digests.sub("", written))
        for tag in ("[phone]", "[e-mail]", "@[name]", "[account]", "[digits]", "233333"):
            assert tag in written
    assert "<b>" not in page and html.escape("<b>&粗") in page

    found = json.loads(data)["privacy"]
    assert {kind: one["texts"]["train"] for kind, one in found.items()} == {
        "e-mail": 1,
        "phone number": 2,
        "account": 1,
        "name after @": 1,
        "long digit run": 2,
    }


class Page(HTMLParser):
    """Text inside SVGs, and every attribute, of a page whose tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.svg_text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "svg" in self.open and self.open[-1] == "text":
            self.svg_text.append(data)


def test_page_is_whole_by_itself_and_the_same_every_time(tmp_path: Path) -> None:
    assert main(["sample", str(tmp_path / "data"), "--size", "400", "--labels", "zones21"]) == 0
    for out in ("one", "two"):
        assert main(["audit", str(tmp_path / "data"), "--out", str(tmp_path / out)]) == 0
    for name in ("card.html", "card.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    source = (tmp_path / "one/card.html").read_text(encoding="utf-8")
    page = Page(source)
    labels = read_dataset(tmp_path / "data").labels
    assert set(labels) <= set(page.svg_text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert links and all(str(link).startswith("#") for link in links)
    ids = {value for name, value in page.attributes if name == "id"}
    assert {str(link)[1:] for link in links} <= ids
    assert "Synthetic data" in source and "url(" not in source


def test_files_without_labels_or_in_one_split(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "鱼鱼", "label": null}\n{"text": "好", "label": null}\n', "utf-8")
    arguments = ["audit", "--train", str(file), "--labels", *LABELS, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    card = json.loads((tmp_path / "out/card.json").read_text(encoding="utf-8"))
    assert card["leaks"] == [] and card["sizes"]["train"]["unlabelled"] == 2
    assert card["appearances"]["texts"] == 0 and card["name"] == "chats.jsonl"
    assert not any(map(any, card["characteristic"]["chats"].values()))


@pytest.mark.parametrize("given, seen", [([], "neither"), (["X", "--dev", "Y"], "both")])
def test_folder_or_files(
    given: list[str], seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *given, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"audit: {seen} DATASET") and "\n" not in error


def test_the_studys_words(reference_data: Path) -> None:
    folder = reference_data / "data/danmu6"
    begun = time.process_time()
    files = {split: folder / f"{split}.tsv" for split in ("train", "dev")}
    card = make_card(read_dataset(files=files, labels=list("012345")), "danmu6")
    assert time.process_time() - begun < 60
    assert card["lengths"]["all"]["share_3_to_6"] == pytest.approx(0.976, abs=0.001)
    assert card["lengths"]["all"]["mean"] == pytest.approx(4.6, abs=0.05)
    # 36.6 % of the test words have a relative in train; dev was drawn the same way.
    (leak,) = card["leaks"]
    assert leak["substring"] / leak["texts"] == pytest.approx(0.366, abs=0.005)
