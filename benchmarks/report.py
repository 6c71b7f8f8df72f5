"""Reports of realistic size: time and memory of the command, and how the page behaves.

    python -m benchmarks.report [--quick]

Ten runs of 27,000 predictions are reported on as the command line does it; every accuracy in the
leaderboard must equal scikit-learn's before a figure is told. A page whose table holds more than
100,000 wrong predictions is opened in a headless Chromium, if there is one.
"""

import argparse
import csv
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import Claim, conclude, machine
from launcher.predictions import make_table, merge_parts, write_part

RUNS, EXAMPLES = 10, 27_000
ERRORS = 100_000
LABELS = ("动画", "音乐舞蹈", "知识", "生活", "影视", "综合")
_CHARACTERS = (
    "的一是不了人我在有他这为之来大以个中上们到说国和地也子时道出而要于就下得可你年生哈啊吗"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="equality only, on small runs")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, n = (2, 300) if quick else (RUNS, EXAMPLES)
        runs = [make_run(folder / f"run_{i}", n, seed=i, skill=0.5 + 0.1 * i) for i in range(count)]
        seconds, memory = report(runs, folder / "out")
        check(runs, folder / "out")
        print(f"accuracies of {count} runs are equal to scikit-learn's")
        if quick:
            print("nothing is measured with --quick")
            return 0
        claims = [
            Claim(
                f"{RUNS} runs x {EXAMPLES:,} predictions, processor time", seconds, 30, True, " s"
            ),
            Claim("peak memory", memory / 2**30, 1, True, " GiB"),
        ]
        wrong = make_run(folder / "wrong", int(ERRORS * 1.25), seed=0, skill=0.0)
        report([wrong], folder / "large")
        figures = in_browser(folder / "large" / "report.html")
        if figures:
            print(f"page with {figures['errors']:,} wrong predictions: {figures}")
            claims += [
                Claim("rows in the document", figures["rows"], 100, True, ""),
                Claim(
                    "slowest of filter, sort and scroll", figures["slowest_ms"], 1000, True, " ms"
                ),
            ]
        else:
            print("no browser: the page is not measured")
        record = {"machine": machine(["numpy", "matplotlib"]), "page": figures}
        return conclude("report", claims, record)


def make_run(
    folder: Path,
    n: int,
    *,
    seed: int = 0,
    skill: float = 1.0,
    labels: Sequence[str] = LABELS,
    texts: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run folder with predictions for `n` examples, the same ones for every seed.

    `skill` is added to the score of the gold label, in units of the noise. The config names no
    data, unless another one is given.
    """
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    gold = shared.integers(0, len(labels), n)
    if texts is None:
        letters = np.array(list(_CHARACTERS))
        texts = ["".join(shared.choice(letters, size)) for size in shared.integers(2, 9, n)]
    scores = own.normal(size=(n, len(labels)))
    scores[np.arange(n), gold] += skill
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    ids = [f"chat-{i}" for i in range(n)]
    table = make_table(ids, texts, gold, None, scores, None, labels, {"unit": "sentence"})
    write_part(folder, "dev", 0, table)
    merge_parts(folder, "dev")
    if config is None:
        config = {"method": "finetune.encoder", "model": {"path": folder.name}}
    stored = {"run": {"name": folder.name, "seed": seed}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored, allow_unicode=True), "utf-8")
    return folder


def report(runs: Sequence[Path], out: Path) -> tuple[float, int]:
    """Run the command; processor time in seconds and peak memory in bytes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "launcher.report", *map(str, runs), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, after.ru_maxrss * 1024


def check(runs: Sequence[Path], out: Path) -> None:
    """Compare the leaderboard's figures with those of scikit-learn.

    Raises:
        AssertionError: one differs.
    """
    from sklearn.metrics import accuracy_score, f1_score

    from launcher.predictions import read_predictions

    with (out / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for run in runs:
        one = read_predictions(run / "predictions/dev.parquet")
        accuracy = accuracy_score(one.labels, one.predicted)
        f1 = f1_score(one.labels, one.predicted, average="macro")
        for key, expected in (("Acc@1", accuracy), ("hit@1", accuracy), ("macro-F1", f1)):
            assert abs(float(rows[run.name][key]) - expected) < 1e-9, (run.name, key)


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A headless Chromium that fetches nothing, driven by selenium; None where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        program = None
    if not program or not driver:
        yield None
        return
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which does not work for root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver's path is given, or selenium would look for one to download.
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def in_browser(page: Path) -> dict[str, Any]:
    """Milliseconds until the page is there, and of its actions; {} without a browser."""
    with browser() as opened:
        if opened is None:
            return {}
        start = time.perf_counter()
        opened.get(page.as_uri())
        figures: dict[str, Any] = {"open_ms": round(1e3 * (time.perf_counter() - start))}
        figures |= json.loads(opened.execute_script(_MEASURE))
        figures["slowest_ms"] = max(figures[key] for key in ("filter_ms", "sort_ms", "scroll_ms"))
        return figures


# Layout is forced by reading a height, so that it is in the time.
_MEASURE = """
const grid = document.querySelector(".grid"), form = document.querySelector(".filters");
const timed = (act) => {
  const start = performance.now();
  act();
  grid.getBoundingClientRect();
  return Math.round(performance.now() - start);
};
const found = { errors: Number(grid.getAttribute("aria-rowcount")) - 1 };
found.filter_ms = timed(() => {
  form.text.value = "哈";
  form.text.dispatchEvent(new Event("input"));
});
form.text.value = "";
form.text.dispatchEvent(new Event("input"));
found.sort_ms = timed(() => document.querySelector(".grid-head button").click());
found.scroll_ms = timed(() => {
  grid.scrollTop = 1e6;
  grid.dispatchEvent(new Event("scroll"));
});
found.rows = document.querySelectorAll(".grid-body > *").length;
return JSON.stringify(found);
"""


if __name__ == "__main__":
    sys.exit(main())
