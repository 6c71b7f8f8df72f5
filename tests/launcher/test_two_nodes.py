"""A run over two nodes, network namespaces of one machine with names and addresses of their own,
predicts what one node does. The second node can't write the run's folder."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")
NODES = ("node-1", "node-2")

# What a cluster has: a command on another node by ssh, and on several by pdsh.
SSH = """#!{python}
import os, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    del arguments[: 2 if arguments[0] in ("-o", "-p") else 1]
os.execv({enter!r} + arguments[0], ["enter", "sh", "-c", " ".join(arguments[1:])])
"""
PDSH = """#!{python}
import subprocess, sys
at = sys.argv.index("-w") + 1
hosts, command = sys.argv[at].split(","), " ".join(sys.argv[at + 1 :])
started = [
    subprocess.Popen(["ssh", host, command.replace("%n", str(number))])
    for number, host in enumerate(hosts)
]
sys.exit(max(abs(process.wait()) for process in started))
"""
ENTER = """#!/bin/sh
exec ip netns exec {space} unshare --uts --mount sh -c '
hostname {name}
{hide}
exec "$@"' enter "$@"
"""


@dataclass
class Cluster:
    """Two nodes, and what stands in for ssh and pdsh between them."""

    tools: Path
    hostfile: Path
    addresses: list[str]
    runs: Path
    """Read-only and empty on the second node."""
    environment: dict[str, str]

    def start(self, node: int, *command: str) -> "subprocess.Popen[str]":
        """Start a command on a node."""
        return subprocess.Popen(
            [str(self.tools / f"enter_{NODES[node]}"), *command],
            env=self.environment,
            cwd=self.tools,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, launch_environment: dict[str, str]
) -> Iterator[Cluster]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare: two network namespaces stand for two nodes")
    tag = os.getpid() % 10**6
    spaces = [f"chats{tag}-{number}" for number in (1, 2)]
    addresses = [f"10.213.{tag % 250}.{number}" for number in (1, 2)]
    links = [f"chat{tag}{letter}" for letter in "ab"]
    tools = tmp_path_factory.mktemp("tools")
    runs = tmp_path_factory.mktemp("runs_of_node_1")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    made: list[str] = []
    try:
        try:
            for space in spaces:
                ip("netns", "add", space)
                made.append(space)
            ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        hosts = "127.0.0.1 localhost\n"
        hosts += "".join(f"{own} {name}\n" for own, name in zip(addresses, NODES, strict=True))
        for space, link, own in zip(spaces, links, addresses, strict=True):
            ip("link", "set", link, "netns", space)
            ip("-n", space, "addr", "add", f"{own}/24", "dev", link)
            ip("-n", space, "link", "set", link, "up")
            ip("-n", space, "link", "set", "lo", "up")
            (Path("/etc/netns") / space).mkdir(parents=True)
            (Path("/etc/netns") / space / "hosts").write_text(hosts)
        hides = ["", f"mount -t tmpfs -o ro none {runs}"]
        for space, name, hide in zip(spaces, NODES, hides, strict=True):
            _script(tools / f"enter_{name}", ENTER, space=space, name=name, hide=hide)
        _script(tools / "ssh", SSH, python=sys.executable, enter=str(tools / "enter_"))
        _script(tools / "pdsh", PDSH, python=sys.executable)
        (tools / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NODES))
        environment = {k: v for k, v in launch_environment.items() if k != "PYTHONPATH"}
        environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
        yield Cluster(tools, tools / "hostfile", addresses, runs, environment)
    finally:
        for space in made:
            ip("netns", "del", space)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


@pytest.fixture(scope="module")
def one_node(start: Any, discrete: list[str], predictions_of: Any) -> Any:
    """The predictions of a run on one rank."""
    job = start([*discrete, "run.name=one_node"]).wait()
    assert job.codes == [0], job.err
    return predictions_of("one_node")


def assert_equal_to(one_node: Any, cluster: Cluster, name: str) -> None:
    given = read_predictions(cluster.runs / name / "predictions" / "dev.parquet")
    assert given.scores is not None and given.ids.tolist() == one_node.ids.tolist()
    np.testing.assert_allclose(given.scores, one_node.scores, rtol=0, atol=1e-4)


def finished(*processes: "subprocess.Popen[str]") -> None:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert "".join(outputs).count("done: ") == 1


def test_deepspeed_with_a_hostfile(
    cluster: Cluster, one_node: Any, discrete: list[str], free_port: Callable[[], int]
) -> None:
    """Sharded over the nodes, so that every pass crosses the network."""
    command = ["deepspeed", "--hostfile", str(cluster.hostfile), "--master_port", str(free_port())]
    own = ["run.name=hostfile", f"run.dir={cluster.runs}", "parallel.zero=3"]
    finished(cluster.start(0, *command, RUN, *discrete, *own))
    assert_equal_to(one_node, cluster, "hostfile")


@pytest.mark.slow
def test_deepspeed_started_on_each_node(
    cluster: Cluster, one_node: Any, discrete: list[str], free_port: Callable[[], int]
) -> None:
    command = ["deepspeed", "--hostfile", str(cluster.hostfile), "--no_ssh"]
    command += ["--master_addr", cluster.addresses[0], "--master_port", str(free_port())]
    own = ["run.name=no_ssh", f"run.dir={cluster.runs}"]
    finished(
        *(
            cluster.start(node, *command, "--node_rank", str(node), RUN, *discrete, *own)
            for node in (0, 1)
        )
    )
    assert_equal_to(one_node, cluster, "no_ssh")


@pytest.mark.slow
def test_mpi(cluster: Cluster, one_node: Any, discrete: list[str]) -> None:
    command = ["mpirun", "-n", "2", "--host", ",".join(f"{name}:1" for name in NODES)]
    command += ["--prtemca", "plm_ssh_agent", str(cluster.tools / "ssh")]
    own = ["run.name=mpi", f"run.dir={cluster.runs}"]
    finished(cluster.start(0, *command, sys.executable, RUN, *discrete, *own))
    assert_equal_to(one_node, cluster, "mpi")


@pytest.mark.slow
def test_training_needs_a_folder_that_all_nodes_see(cluster: Cluster, pretrain: list[str]) -> None:
    command = ["mpirun", "-n", "2", "--host", ",".join(f"{name}:1" for name in NODES)]
    command += ["--prtemca", "plm_ssh_agent", str(cluster.tools / "ssh")]
    own = ["run.name=unshared", f"run.dir={cluster.runs}"]
    process = cluster.start(0, *command, sys.executable, RUN, *pretrain, *own)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert f"run.dir {cluster.runs / 'unshared'}: not seen on node-2: " in output
    assert "Traceback" not in output


def _script(path: Path, text: str, **names: str) -> None:
    path.write_text(text.format(**names))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
