"""`make demo`: the study's prompts, discrete and soft, in miniature, offline, on synthetic texts.

Every step is a command that can be typed by hand; each is printed before it runs.
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


def main() -> int:
    """Run the demo; gives the exit code of the first step that fails, else 0."""
    start = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    ranks = min(2, len(os.sched_getaffinity(0)))
    launch = ["deepspeed", "--num_accelerators", str(ranks), "--log_level", "error"]
    launch += ["launcher/run.py", "--config"]
    runs = [FOLDER / name for name in (*PROMPTS, "soft_prompt")]
    steps = [
        ["python", "-m", "data_prep", "sample", str(FOLDER / "data"), "--size", "12000"],
        [*launch, "configs/demo/pretrain.yaml"],
        *(
            [*launch, "configs/demo/prompt.yaml", f"run.name={name}", f"prompt.template={template}"]
            for name, template in PROMPTS.items()
        ),
        [*launch, "configs/demo/tune.yaml"],
        ["python", "-m", "launcher.report", *map(str, runs), "--out", str(FOLDER / "report")],
    ]
    for step in steps:
        print(f"\n$ {shlex.join(step)}", flush=True)
        # The programs of this environment, whatever the search path holds.
        program = Path(sys.executable).with_name(step[0])
        if code := subprocess.run([str(program), *step[1:]], check=False).returncode:
            return code
    print(f"\n{prompts_table(runs)}\n{SYNTHETIC}")
    print(f"report: {ROOT / FOLDER / 'report' / 'report.html'}")
    print(f"whole demo: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
