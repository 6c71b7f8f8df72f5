"""A rank that dies is named and ends the others; one that is paused, stopped or done does not."""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import watchdog
from launcher.errors import InputError

RESUMABLE = 75
GONE = r"rank {} \(host {}, pid {}\) is gone: [^\n]*--resume[^\n]*\n"

# A rank of a group that does nothing but what `act` says.
_RANK = """
import os, signal, socket, time
os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
import torch.distributed as dist
from launcher import watchdog
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
dist.init_process_group("gloo", rank=rank, world_size=size)
watchdog._SILENCE_S = silence
socket.gethostname = lambda: f"machine_{rank // 2}"
watchdog.start(rank, size)
exec(act)
os._exit(0)
"""


@pytest.fixture
def group(
    start: Any, tmp_path: Path, free_port: Callable[[], int]
) -> Callable[..., tuple[list[Any], Path]]:
    """`group(actions, silence=30)`: a process for each action, and the file of their stderr; forked
    off the process that `start` has made."""
    context = multiprocessing.get_context("forkserver")

    def begin(actions: list[str], silence: int = 30) -> tuple[list[Any], Path]:
        err, port, processes = tmp_path / "err", free_port(), []
        err.touch()
        for rank, act in enumerate(actions):
            names: dict[str, Any] = {"rank": rank, "size": len(actions), "port": port, "act": act}
            names |= {"silence": silence, "err": str(err)}
            processes.append(context.Process(target=exec, args=(_RANK, names)))
            processes[-1].start()
        return processes, err

    return begin


def ended(processes: list[Any], seconds: float = 30) -> list[int]:
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


# Whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_training_with_its_name(
    killed: int, start: Any, pretrain: list[str], runs: Path
) -> None:
    name = f"killed_{killed}"
    job = start([*pretrain, f"run.name={name}", "train.epochs=400"], ranks=2)
    wait_for(runs / name / "checkpoints" / "last" / "latest", job)
    pid = job.processes[killed].pid
    os.kill(pid, signal.SIGKILL)
    job.wait(10)
    codes = [RESUMABLE, RESUMABLE]
    codes[killed] = -signal.SIGKILL
    assert job.codes == codes, job.err
    others = [line for line in job.err.splitlines(True) if not line.startswith("training: ")]
    assert re.fullmatch(GONE.format(killed, socket.gethostname(), pid), "".join(others))


def test_a_rank_told_to_stop_takes_the_others_along(
    start: Any, discrete: list[str], runs: Path
) -> None:
    arguments = [*discrete, "data.evaluate=[train]", "evaluation.chunk_examples=8"]
    job = start([*arguments, "run.name=one_stopped"], ranks=2)
    wait_for(runs / "one_stopped" / "predictions" / "train.parts" / "00002.parquet", job)
    os.kill(job.processes[1].pid, signal.SIGTERM)
    job.wait(30)
    assert job.codes == [RESUMABLE, RESUMABLE], job.err
    assert job.err == "stopped; the same command with --resume goes on from here\n"


def test_a_finished_run_says_nothing_of_it(start: Any, discrete: list[str]) -> None:
    job = start([*discrete, "run.name=watched"], ranks=2).wait(60)
    assert job.codes == [0, 0], job.err
    assert all(re.match(r"scoring (dev|test): ", line) for line in job.err.splitlines()), job.err


def wait_for(path: Path, job: Any) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert all(process.is_alive() for process in job.processes), job.err
        assert time.monotonic() < end
        time.sleep(0.01)


# The watch alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_that_wait_for_nothing_hear_of_a_death(killed: int, group: Any) -> None:
    """No collective fails here, and a child of the killed rank still has what it had open."""
    dies = "os.kill(os.getpid(), signal.SIGKILL) if os.fork() else time.sleep(12)"
    actions = ["time.sleep(20)"] * 4
    actions[killed] = dies
    processes, err = group(actions)
    begun = time.monotonic()
    codes = [RESUMABLE] * 4
    codes[killed] = -signal.SIGKILL
    assert ended(processes) == codes
    assert time.monotonic() - begun < 10
    line = GONE.format(killed, "machine_0", processes[killed].pid)
    assert re.fullmatch(2 * line, err.read_text()), "one line from each machine"


def test_paused_and_early_ranks_are_not_taken_for_dead(group: Any) -> None:
    """Rank 1 is stopped for longer than a machine may be silent; then rank 0 is the first to go."""
    processes, err = group(
        [
            "time.sleep(4); watchdog.goodbye(0)",
            "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1.2); watchdog.goodbye(0)",
            "time.sleep(4.8); watchdog.goodbye(0)",
        ],
        silence=3,
    )
    while Path(f"/proc/{processes[1].pid}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    time.sleep(3.3)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert ended(processes) == [0, 0, 0]
    assert err.read_text() == ""


def test_the_verdict_is_the_reason_of_who_left(group: Any) -> None:
    """75 from any rank; 2 from rank 0, which speaks for all; None while nobody has gone."""
    processes, err = group(
        [
            "assert watchdog.verdict(0.2) is None;time.sleep(1);assert watchdog.verdict() == 75;"
            "watchdog.goodbye(2)",
            "time.sleep(0.7); watchdog.goodbye(75)",
            "time.sleep(0.7); assert watchdog.verdict() == 2; watchdog.goodbye(2)",
        ]
    )
    assert ended(processes) == [0, 0, 0]
    assert err.read_text() == ""


def test_strangers_are_sent_away_and_missing_ranks_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    listener = watchdog._listener(3)
    port = listener.getsockname()[1]
    places = [watchdog._Place("here", rank, port, bytes([rank] * 16)) for rank in range(3)]
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(watchdog._HELLO.pack(places[1].token, 2))
    clients = [watchdog._connected(rank, places) for rank in (1, 2)]
    peers = watchdog._accepted(listener, places)
    ports = {rank: peer.getpeername()[1] for rank, peer in peers.items()}
    assert ports == {rank: clients[rank - 1].getsockname()[1] for rank in (1, 2)}
    assert stranger.recv(1) == b""
    monkeypatch.setattr(watchdog, "_CONNECT_S", 0.2)
    with pytest.raises(InputError, match=r"rank 0 \(host here\) got no connection from rank 1, 2 "):
        watchdog._accepted(watchdog._listener(3), places)
    for one in [stranger, *clients, *peers.values()]:
        one.close()
