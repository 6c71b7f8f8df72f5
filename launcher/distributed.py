"""Ranks and rendezvous: one process group whichever launcher started the processes."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from launcher import watchdog
from launcher.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device


def start() -> World:
    """Join the run's process group: NCCL on GPUs, gloo on CPUs.

    The place comes from the environment that `deepspeed` and `torchrun` set, or under `mpirun`
    from DeepSpeed's MPI discovery through mpi4py; a plain `python` is a group of one. From here on
    the death of a rank ends the others: see `watchdog`.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Batches seldom have the same shape twice, and a kernel kept for each of a thousand shapes
        # takes hundreds of megabytes; within one pass the layers share a few.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # Imported here: it takes seconds, which a wrong config should not cost.
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    port = 29500
    if "RANK" not in os.environ:
        if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
            port = _mpi_port()
        else:
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(_free_port()),
            )  # fmt: skip
    # Its collectives for inference on CPUs, unused here, take a minute to compile at first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        distributed_port=port,
        timeout=timedelta(minutes=30),
        verbose=False,
    )
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores wait for one another most of the time.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    world = World(dist.get_rank(), dist.get_world_size(), device)
    watchdog.start(world.rank, world.size)
    return world


def local_world_size() -> int:
    """Ranks on this machine."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if variable in os.environ:
            return int(os.environ[variable])
    return dist.get_world_size()


def stop() -> None:
    """Leave the process group, if one was joined."""
    if sys.exception() is not None or _device_failed:
        # The group's end would wait, on GPUs, for collectives that the others never enter; this
        # process is about to end, which tells them.
        watchdog.silence()
        return
    watchdog.goodbye(0)
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process at once, without tearing down what libraries left running.

    Everything is on disk by now. Torn down in no fixed order, threads of gloo end one launch in
    eight or so with an abort, which makes a finished run look failed.
    """
    mpi: Any = sys.modules.get("mpi4py.MPI")
    # mpirun takes an end without Finalize for a crash; but that waits for all ranks, and one that
    # ends before its work is done would hold up those it is to stop.
    if code == 0 and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank_before_start() -> int:
    """This process's rank as its launcher says, before the group exists; 0 when alone."""
    for variable in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0


def on_rank_0(world: World, work: Callable[[], T]) -> T:
    """The result of `work`, done by rank 0 alone; every rank gets the result or the InputError."""
    box: list[Any] = [None, None]
    if world.rank == 0:
        try:
            box[0] = work()
        except InputError as error:
            box[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def together(world: World, work: Callable[[], T]) -> T:
    """The result of `work`, done by every rank; if any rank's input is wrong, all raise its error.

    Without this a rank that gives up leaves the others waiting for it.
    """
    result, problem = None, None
    try:
        result = work()
    except InputError as error:
        problem = str(error)
    problems: list[str | None] = [problem]
    if world.size > 1:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise InputError(first)
    return result  # type: ignore[return-value]


def max_over_ranks(world: World, value: int) -> int:
    """The largest `value` of all ranks."""
    if world.size == 1:
        return value
    largest = torch.tensor(value, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_ranks(world: World, value: float) -> float:
    """The sum of all ranks' `value`, in float64."""
    if world.size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return float(total)


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Parameters whole while the context lasts, where ZeRO 3 has sharded them (collective), or
    where they are left in memory-mapped files."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    left = [(p, p.data) for p in parameters if hasattr(p, "mapped")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        try:
            for parameter, placeholder in left:
                parameter.data = parameter.mapped.to(placeholder.dtype)
            yield
        finally:
            for parameter, placeholder in left:
                parameter.data = placeholder


def full_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape; under ZeRO 3 its own is that of an empty remainder."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_to_rank_0(world: World, value: T) -> list[T] | None:
    """Every rank's `value` in rank order, on rank 0; None elsewhere."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def fail(error: InputError) -> int:
    """Print the error once for all ranks and give the exit code.

    A launcher kills every process when the first one leaves, so the silent ranks leave last.
    """
    # What looks like a disk that can't be written may be a rank that died meanwhile.
    watchdog.verdict(0.5)
    watchdog.goodbye(2)
    if rank_before_start() == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        # The launcher's SIGTERM must not become a traceback.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    return 2


def is_device_failure(error: RuntimeError) -> bool:
    """Whether an error is a GPU's that failed or vanished, and no mistake in what it was given."""
    text = str(error)
    failed = (
        isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "HIP error" in text
    )
    return failed and "device-side assert" not in text and "out of memory" not in text


def fail_with_device(error: RuntimeError) -> int:
    """Say which rank lost its GPU, and give the exit code; its end tells the other ranks."""
    global _device_failed
    _device_failed = True
    local_rank = os.environ.get("LOCAL_RANK", "0")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(
        f"rank {rank_before_start()} (host {socket.gethostname()}) has lost its GPU {local_rank}: "
        f"{reason}; see nvidia-smi and the system's messages, and leave that GPU out if it does "
        "not come back. The same command with --resume goes on from what is saved",
        file=sys.stderr,
        flush=True,
    )
    # Without a goodbye: collectives on GPUs would wait half an hour for a rank that said one.
    watchdog.silence()
    return watchdog.RESUMABLE


_device_failed = False


def _mpi_port() -> int:
    """A port that is free on rank 0, agreed on by all ranks: runs side by side must not meet."""
    from mpi4py import MPI

    own = _free_port() if MPI.COMM_WORLD.Get_rank() == 0 else None
    return int(MPI.COMM_WORLD.bcast(own, root=0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
