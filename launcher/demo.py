"""`make demo`: the whole study in miniature, offline, on synthetic texts.

A local site is crawled, a dataset built and audited; a nano PanGu is trained and asked by discrete
prompts and a soft one; baselines are fitted; a report compares them. Every step is a command that
can be typed by hand; each is printed before it runs.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launcher.report import SYNTHETIC, prompts_table

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
PROMPTS = {f"prompt_{n}": f"study_{n}" for n in (1, 2, 3, 4)}
BASELINES = ("mlp", "linear")


def main() -> int:
    """Run the demo; gives the exit code of the first step that fails, else 0."""
    start = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    ranks = min(2, len(os.sched_getaffinity(0)))
    launch = ["deepspeed", "--num_accelerators", str(ranks), "--log_level", "error"]
    launch += ["launcher/run.py", "--config"]
    prepare = ["python", "-m", "data_prep"]
    runs = [FOLDER / name for name in (*PROMPTS, "soft_prompt", *BASELINES)]
    steps = [
        [*prepare, "build", str(FOLDER / "corpus"), str(FOLDER / "data")],
        [*prepare, "audit", str(FOLDER / "data"), "--out", str(FOLDER / "card")],
        [*launch, "configs/demo/pretrain.yaml"],
        *(
            [*launch, "configs/demo/prompt.yaml", f"run.name={name}", f"prompt.template={template}"]
            for name, template in PROMPTS.items()
        ),
        [*launch, "configs/demo/tune.yaml"],
        *(
            ["python", "launcher/run.py", "--config", f"configs/demo/{name}.yaml"]
            for name in BASELINES
        ),
        ["python", "-m", "launcher.report", *map(str, runs), "--out", str(FOLDER / "report")],
    ]
    if code := _crawl(prepare):
        return code
    for step in steps:
        if code := _run(step):
            return code
    print(f"\n{prompts_table(runs)}\n{SYNTHETIC}")
    print(f"data card: {ROOT / FOLDER / 'card' / 'card.html'}")
    print(f"report: {ROOT / FOLDER / 'report' / 'report.html'}")
    print(f"whole demo: {time.monotonic() - start:.0f} s")
    return 0


def _crawl(prepare: list[str]) -> int:
    """Crawl the fake site, which runs beside it."""
    site = [*prepare, "fake-site", "--port", "0", "--videos-per-zone", "20"]
    print(f"\n$ {shlex.join(site)} &", flush=True)
    with subprocess.Popen(_program(site), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            print(address, flush=True)
            hosts = [f"--{host}-base={address}" for host in ("api", "comment", "www")]
            crawl = [*prepare, "crawl", "--out", str(FOLDER / "corpus"), "--min-spacing", "0.005"]
            return _run([*crawl, *hosts])
        finally:
            process.terminate()


def _run(step: list[str]) -> int:
    print(f"\n$ {shlex.join(step)}", flush=True)
    return subprocess.run(_program(step), check=False).returncode


def _program(step: list[str]) -> list[str]:
    """The programs of this environment, whatever the search path holds."""
    return [str(Path(sys.executable).with_name(step[0])), *step[1:]]


if __name__ == "__main__":
    sys.exit(main())
