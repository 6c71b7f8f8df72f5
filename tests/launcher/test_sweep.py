"""Search spaces and early stopping by themselves; then real sweeps on a real Ray head."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launcher.errors import InputError
from launcher.sweep import driver
from launcher.sweep.board import Board
from launcher.sweep.driver import planned
from launcher.sweep.search import Study, grid, stops
from launcher.sweep.settings import Arm, EarlyStopping, SearchSettings, SweepConfig, load_sweep
from launcher.sweep.summary import best_point, dry_run
from launcher.sweep.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "method": "prompting.discrete",
    "run": {"name": "base"},
    "data": {"path": "data", "evaluate": ["dev"]},
    "model": {"path": "model"},
    "prompt": {"template": "study_1"},
}


def written(folder: Path, values: dict[str, Any], name: str = "run") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return file


def sweep_file(folder: Path, space: dict[str, Any], **others: Any) -> Path:
    arm = {"config": str(written(folder, RUN)), "space": space}
    values = {"name": "s", "dir": str(folder), "arms": {"a": arm}, **others}
    return written(folder, values, "sweep")


def test_a_grid_has_every_combination_once_and_conditions_hold() -> None:
    space = {
        "kind": ["x", "y"],
        "size": {"values": [1, 2], "when": {"kind": "y"}},
        "lr": [0.1, 0.2],
    }
    arm = Arm.model_validate({"config": "c", "space": space})
    assert grid(arm) == [
        {"kind": "x", "lr": 0.1},
        {"kind": "x", "lr": 0.2},
        {"kind": "y", "size": 1, "lr": 0.1},
        {"kind": "y", "size": 1, "lr": 0.2},
        {"kind": "y", "size": 2, "lr": 0.1},
        {"kind": "y", "size": 2, "lr": 0.2},
    ]


def test_arms_take_turns_and_the_seeds_of_a_point_follow_each_other(tmp_path: Path) -> None:
    config = str(written(tmp_path, RUN))
    sweep = SweepConfig.model_validate(
        {
            "name": "s",
            "arms": {
                "a": {"config": config, "space": {"prompt.template": ["study_1", "study_2"]}},
                "b": {"config": config},
            },
            "seeds": [3, 5],
        }
    )
    studies = {name: Study(arm, sweep.search) for name, arm in sweep.arms.items()}
    names = [trial.name for trial in planned(sweep, studies)]
    assert names == ["a-000-s3", "a-000-s5", "b-000-s3", "b-000-s5", "a-001-s3", "a-001-s5"]


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_drawn_points_stay_inside_and_a_resumed_sweep_draws_the_same(method: str) -> None:
    space = {
        "lr": {"log_uniform": [1e-4, 1e-1]},
        "kind": ["x", ["a", "list"], {"a": "mapping"}],
        "size": {"integers": [1, 9], "when": {"kind": "x"}},
        "share": {"uniform": [0.0, 1.0]},
    }
    arm = Arm.model_validate({"config": "c", "space": space})
    search = SearchSettings(method=method, samples=30)  # type: ignore[arg-type]

    def draw(study: Study, numbers: range) -> list[dict[str, Any]]:
        points = []
        for number in numbers:
            trial, point = study.begin(number)
            study.end(trial, point["share"])
            points.append(point)
        return points

    whole = draw(Study(arm, search), range(30))
    for point in whole:
        assert 1e-4 <= point["lr"] <= 1e-1 and 0 <= point["share"] <= 1
        assert point["kind"] in space["kind"]
        assert ("size" in point) == (point["kind"] == "x") and 1 <= point.get("size", 1) <= 9
    assert len({json.dumps(point) for point in whole}) == 30
    later = Study(arm, search)
    for number, point in enumerate(whole[:12]):
        trial, again = later.begin(number, point)
        assert again == point
        later.end(trial, point["share"])
    assert draw(later, range(12, 30)) == whole[12:]
    if method == "tpe":
        shares = [point["share"] for point in whole]
        assert sum(shares[15:]) > sum(shares[:15]), "it looks where the metric is high"


def test_early_stopping_ends_hopeless_runs_and_keeps_the_best() -> None:
    """27 runs of 9 looks, two at a time; every run ends at the quality it was given."""
    qualities = [round(0.3 + 0.02 * n, 2) for n in range(27)]
    random.Random(4).shuffle(qualities)
    arm = Arm.model_validate({"config": "c", "space": {"quality": qualities}})
    study = Study(arm, SearchSettings(early_stopping=EarlyStopping(first_rung=1, reduction=3)))
    waiting, running = list(range(27)), []
    finished, stopped, looked = {}, {}, 0
    while waiting or running:
        while waiting and len(running) < 2:
            number = waiting.pop(0)
            running.append((study.begin(number), list[float]()))
        for (told, point), looks in list(running):
            looks.append(point["quality"] * (1 - 0.5 ** (len(looks) + 1)))
            looked += 1
            if stops(told, looks, len(looks) - 1):
                study.end(told, None, pruned=True)
                stopped[point["quality"]] = len(looks)
            elif len(looks) == 9:
                study.end(told, looks[-1])
                finished[point["quality"]] = looks[-1]
            else:
                continue
            running.remove(((told, point), looks))
    hopeless = [quality for quality in qualities if quality < 0.56]
    assert sum(quality in stopped for quality in hopeless) >= len(hopeless) / 3
    assert max(finished) == max(qualities)
    assert looked < 27 * 9 / 2


def test_the_best_point_is_best_on_average_over_all_its_seeds() -> None:
    def trial(number: int, seed: int, value: float) -> Trial:
        name = f"a-{number:03d}-s{seed}"
        return Trial(name, "a", number, seed, {"n": number}, "finished", value=value)

    trials = [trial(0, 0, 0.9), trial(0, 1, 0.1), trial(1, 0, 0.6), trial(1, 1, 0.6)]
    name, mean, best = best_point([*trials, trial(2, 0, 0.99)])
    assert (name, mean, best.name) == ("a-001", pytest.approx(0.6), "a-001-s0")


@pytest.mark.parametrize(
    ("space", "others", "expected"),
    [
        (
            {"prompt.tmplate": ["study_1"]},
            {},
            "prompt.tmplate: unknown key, did you mean 'template'?",
        ),
        ({"train.lr": [1e-3, "fast"]}, {}, "train.lr: Input should be a valid number"),
        ({"prompt.template": []}, {}, "arms.a.space.prompt.template"),
        ({"train.lr": {"log_uniform": [1e-4, 1e-2]}}, {}, "a grid needs a list of values"),
        (
            {"train.lr": {"uniform": [2, 1]}},
            {"search": {"method": "random"}},
            "expected the lower number first",
        ),
        (
            {"train.lr": {"values": [1], "when": {"train.epochs": 1}}},
            {},
            "train.epochs must be a key of the space before it",
        ),
        ({"run.seed": [0, 1]}, {}, "run.seed is set by the sweep"),
        ({}, {"search": {"split": "test"}}, "search.split is test, but the config evaluates dev"),
        ({}, {"serch": {}}, "serch: unknown key, did you mean 'search'?"),
        ({}, {"arms": {}}, "arms: Dictionary should have at least 1 item"),
    ],
)
def test_a_wrong_sweep_is_refused_at_once(
    tmp_path: Path, space: dict[str, Any], others: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as refused:
        load_sweep(sweep_file(tmp_path, space, **others))
    assert expected in str(refused.value)


def test_a_dry_run_lists_every_run(tmp_path: Path) -> None:
    templates = ["study_1", "study_2"]
    sweep = load_sweep(sweep_file(tmp_path, {"prompt.template": templates}, seeds=[0, 1]))
    lines = dry_run(sweep)
    assert [line.split()[0] for line in lines[:4]] == [
        "a-000-s0",
        "a-000-s1",
        "a-001-s0",
        "a-001-s1",
    ]
    assert "prompt.template=study_2" in lines[2]
    assert lines[4].startswith("4 runs of 1 ranks")


def test_out_of_memory_halves_the_micro_batch_and_is_no_failed_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep(sweep_file(tmp_path, {"prompt.template": ["study_1"]}))
    run = driver._Driver(sweep)
    run.board = Board(sweep, run.trials)
    run.folder.mkdir(parents=True)
    (trial,) = run.trials
    before = driver.trial_config(sweep, trial)
    for halvings in range(1, 7):  # 4096 to 64 tokens
        trial.attempts += 1
        (run.folder / trial.name).mkdir()
        run._failed(trial, "exit codes 1\ntorch.OutOfMemoryError: CUDA out of memory.")
        assert (trial.state, trial.attempts, trial.halvings) == ("waiting", 0, halvings)
        assert run.queue == [trial] and not (run.folder / trial.name).exists()
        run.queue.clear()
        after = driver.trial_config(sweep, trial)
        assert after.train.micro_batch_tokens == before.train.micro_batch_tokens >> halvings
        assert (
            after.evaluation.micro_batch_tokens == before.evaluation.micro_batch_tokens >> halvings
        )
        assert after.train.global_batch == before.train.global_batch
        assert f"micro batches of {4096 >> halvings} tokens" in capsys.readouterr().err
    trial.attempts = sweep.retries + 1
    run._failed(trial, "exit codes 1\ntorch.OutOfMemoryError: CUDA out of memory.")
    assert trial.state == "failed", "smaller micro batches there are none"


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
