"""Real sweeps on a real Ray head."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data_prep.dataset import write_dataset
from data_prep.sample import make_sample
from tests.launcher.sweeps import ROOT, RUN, sweep_file, written


@pytest.fixture(scope="module")
def ray_head(
    launch_environment: dict[str, str], free_port: Callable[[], int]
) -> Iterator[dict[str, str]]:
    """The environment in which a Ray head of two CPUs is running, with its job server."""
    port, jobs = str(free_port()), str(free_port())
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = [
        *ray,
        "start",
        "--head",
        "--node-ip-address",
        "127.0.0.1",
        "--num-cpus",
        "2",
        "--num-gpus",
        "0",
        "--port",
        port,
    ]
    head += ["--include-dashboard", "true", "--dashboard-port", jobs, "--block"]
    environment = {**launch_environment, "RAY_USAGE_STATS_ENABLED": "0"}
    # It listens on this machine alone.
    environment["RAY_AUTH_MODE"] = "disabled"
    process = subprocess.Popen(
        head, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    joined = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    joined["JOB_SERVER"] = f"http://127.0.0.1:{jobs}"
    listing = [*ray, "job", "list", "--address", joined["JOB_SERVER"]]
    try:
        until(lambda: not subprocess.run(listing, env=joined, capture_output=True).returncode)
        yield joined
    finally:
        process.terminate()
        process.wait(60)


def of_sweep(folder: Path) -> list[psutil.Process]:
    """Living ranks of a sweep's runs."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if "launcher.run" in command and str(folder) in command:
            found.append(process)
    return found


def states(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in (folder / "trials").glob("*-[0-9][0-9][0-9].json"):
        found[file.stem] = json.loads(file.read_text("utf-8"))
    return found


def until(what: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_sweep_on_a_cluster_outlives_killed_ranks_and_drivers(
    data: Path,
    pangu: Path,
    tmp_path: Path,
    ray_head: dict[str, str],
    start: Callable[..., Any],
    runs: Path,
) -> None:
    run = {**RUN, "data": {"path": str(data), "evaluate": ["dev"]}, "model": {"path": str(pangu)}}
    templates = ["study_1", "study_2", "study_3", "study_4"]
    arm = {"config": str(written(tmp_path, run)), "space": {"prompt.template": templates}}
    resources = {"ranks": 2, "cpus_per_rank": 0.5}
    values = {"name": "s", "dir": str(tmp_path), "arms": {"a": arm}, "resources": resources}
    config, folder = written(tmp_path, values, "sweep"), tmp_path / "s"
    command = [sys.executable, "-m", "launcher.sweep", "--config", str(config)]

    driver = subprocess.Popen(command, env=ray_head, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ranks = until(lambda: len(found := of_sweep(folder)) == 4 and found)
    ports = {rank.environ()["MASTER_PORT"] for rank in ranks}
    assert len(ports) == 2, "two runs at a time, each with a port of its own"
    victim = ranks[0]
    victim.kill()
    again = until(lambda: [s for s in states(folder).values() if s["attempts"] == 2], 60)
    assert "-9" in again[0]["problem"]
    until(lambda: any(s["state"] == "finished" for s in states(folder).values()))
    finished = {name for name, s in states(folder).items() if s["state"] == "finished"}
    driver.kill()
    driver.communicate()
    until(lambda: not of_sweep(folder), 60)
    before = {name: (folder / "trials" / f"{name}.json").stat().st_mtime_ns for name in finished}

    submitted = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
         ray_head["JOB_SERVER"], "--working-dir", str(tmp_path), "--",
         "env", f"PYTHONPATH={ROOT}", *command, "--resume"],
        env=ray_head, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert {s["state"] for s in states(folder).values()} == {"finished"}
    after = {name: (folder / "trials" / f"{name}.json").stat().st_mtime_ns for name in finished}
    assert finished and before == after, "what has finished is not run again"
    assert not of_sweep(folder)

    for number, template in enumerate(templates):
        own = [f"run.name=hand_{template}", f"run.dir={runs}", f"prompt.template={template}"]
        by_hand = start(["--config", arm["config"], *own], ranks=2).wait()
        assert by_hand.codes == [0, 0], by_hand.err
        mine = json.loads((folder / f"trials/a-{number:03d}/metrics.json").read_text("utf-8"))
        hand = json.loads((runs / f"hand_{template}/metrics.json").read_text("utf-8"))
        assert mine == hand
    best = yaml.safe_load((folder / "best.yaml").read_text("utf-8"))
    values_of = {s["point"]["prompt.template"]: s["value"] for s in states(folder).values()}
    assert values_of[best["prompt"]["template"]["name"]] == max(values_of.values())
    assert (folder / "report" / "report.html").exists()


def test_what_no_node_can_give_is_refused_at_once(tmp_path: Path, ray_head: dict[str, str]) -> None:
    file = sweep_file(tmp_path, {}, resources={"ranks": 2, "gpus_per_rank": 1})
    done = subprocess.run(
        [sys.executable, "-m", "launcher.sweep", "--config", str(file)],
        env=ray_head, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no room for 2 ranks of 1 CPU and 1 GPU each; the nodes have 2 CPU, 0 GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_always_fails_is_recorded_with_its_last_lines(
    data: Path, tmp_path: Path, ray_head: dict[str, str]
) -> None:
    run = {**RUN, "data": {"path": str(data), "evaluate": ["dev"]}}
    run["model"] = {"path": str(tmp_path / "nowhere")}
    arm = {"config": str(written(tmp_path, run))}
    file = written(tmp_path, {"name": "s", "dir": str(tmp_path), "arms": {"a": arm}}, "sweep")
    done = subprocess.run(
        [sys.executable, "-m", "launcher.sweep", "--config", str(file)],
        env=ray_head, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no trial has finished" in done.stderr
    (state,) = states(tmp_path / "s").values()
    assert state["state"] == "failed" and state["attempts"] == 1
    assert "nowhere" in state["problem"]
    assert not of_sweep(tmp_path / "s")


@pytest.mark.slow
def test_eight_trials_of_two_ranks_two_at_a_time(
    data: Path, pangu: Path, tmp_path: Path, ray_head: dict[str, str]
) -> None:
    """Each slot is idle for at most 5 s a trial, the report at the end included."""
    run = {**RUN, "data": {"path": str(data), "evaluate": ["dev"]}, "model": {"path": str(pangu)}}
    templates = ["study_1", "study_2", "study_3", "study_4"]
    arm = {"config": str(written(tmp_path, run)), "space": {"prompt.template": templates}}
    values = {"name": "s", "dir": str(tmp_path), "arms": {"a": arm}, "seeds": [0, 1]}
    values["resources"] = {"ranks": 2, "cpus_per_rank": 0.5}
    command = [sys.executable, "-m", "launcher.sweep", "--config"]
    begun = time.monotonic()
    sweep = subprocess.Popen([*command, str(written(tmp_path, values, "sweep"))],
                             env=ray_head, cwd=ROOT, stderr=subprocess.DEVNULL)  # fmt: skip
    ports: dict[str, str] = {}
    most = 0
    while sweep.poll() is None:
        alive = of_sweep(tmp_path / "s")
        for rank in alive:
            with suppress(psutil.Error, KeyError):
                name = Path(rank.cmdline()[rank.cmdline().index("--config") + 1]).stem
                ports[name] = rank.environ()["MASTER_PORT"]
        most = max(most, len(alive))
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    assert sweep.returncode == 0
    of_trials = [json.loads(file.read_text("utf-8"))
                 for file in (tmp_path / "s/trials").glob("a-*.json")]  # fmt: skip
    assert [trial["state"] for trial in of_trials] == ["finished"] * 8
    assert most == 4, "two runs of two ranks at a time"
    assert len(ports) == len(set(ports.values())) == 8
    overhead = (seconds - sum(trial["seconds"] for trial in of_trials) / 2) / 8
    print(f"{seconds:.0f} s for 8 trials, of which beside the trials {overhead:.2f} s each")
    assert overhead <= 5


@pytest.mark.slow
def test_early_stopping_saves_a_third_of_hopeless_trials_and_finds_the_grids_best(
    tmp_path: Path, ray_head: dict[str, str]
) -> None:
    """27 trials in full, then the same with early stopping."""
    write_dataset(tmp_path / "data", make_sample(size=8000, seed=3))
    run = {
        "method": "baselines.mlp",
        "run": {"name": "base"},
        "data": {"path": str(tmp_path / "data"), "evaluate": ["dev"]},
        "mlp": {"features": ["characters"]},
        "train": {"epochs": 9, "global_batch": 32, "schedule": "constant"},
    }
    space = {
        "train.lr": [1e-6, 3e-4, 3e-3],
        "mlp.hidden": [[32], [64], [128]],
        "mlp.feature_dropout": [0.0, 0.5, 0.95],
    }
    arm = {"config": str(written(tmp_path, run)), "space": space}
    command = [sys.executable, "-m", "launcher.sweep", "--config"]
    found = {}
    for name, search in (("grid", {}), ("halving", {"early_stopping": {"first_rung": 1}})):
        values = {"name": name, "dir": str(tmp_path), "arms": {"a": arm}, "search": search}
        done = subprocess.run([*command, str(written(tmp_path, values, name))],
                              env=ray_head, cwd=ROOT, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[name] = states(tmp_path / name)
    assert len(found["grid"]) == len(found["halving"]) == 27
    whole = {name: trial["value"] for name, trial in found["grid"].items()}
    best = max(whole.values())
    hopeless = [name for name, value in whole.items() if value < best - 0.1]
    stopped = [name for name, trial in found["halving"].items() if trial["state"] == "stopped"]
    kept = max(trial["value"] or 0.0 for trial in found["halving"].values())
    seconds = {name: sum(t["seconds"] for t in trials.values()) for name, trials in found.items()}
    print(f"best {best:.4f}, with early stopping {kept:.4f}; {len(hopeless)} hopeless, of which "
          f"{len({*hopeless} & {*stopped})} stopped, {len(stopped)} in all; {seconds}")  # fmt: skip
    assert len(hopeless) >= 9
    assert len({*hopeless} & {*stopped}) >= len(hopeless) / 3
    assert kept >= best - 0.01
