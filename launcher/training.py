"""The training loop: the same steps on one rank or many, with checkpoints that resume exactly."""

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from launcher.config import Config, TrainSettings
from launcher.distributed import World, max_over_ranks, on_rank_0
from launcher.engine import derived_config
from launcher.errors import InputError
from launcher.files import writing
from launcher.method import Learner, TrainingSet
from launcher.progress import Progress

LOG_EVERY_STEPS = 10
# Steps whose examples are sorted by length together before they are shuffled again.
_STEPS_PER_WINDOW = 32


class Stopped(Exception):
    """A signal asked the run to stop; what it had is on disk."""


def train(
    config: Config,
    learner: Learner,
    world: World,
    examples: pa.Table,
    dev: pa.Table | None,
    *,
    resume: bool,
) -> None:
    """Train `learner.module` and leave it wrapped by the DeepSpeed engine.

    Raises:
        Stopped: after SIGTERM or SIGINT, with a checkpoint written.
        InputError: the loss is not a number.
    """
    engine = _engine(config, learner)
    learner.module = engine
    folder = config.run_dir / "checkpoints" / "last"
    settings = config.train
    per_epoch = math.ceil(len(examples) / settings.global_batch)
    total = per_epoch * settings.epochs
    step = _load(engine, folder) if resume else 0
    log = _Log(config.run_dir / "train_log.jsonl", world, step)
    progress = Progress("training", total, "steps", rank=world.rank, done=step)
    stop_asked = _catch_signals()
    while step < total:
        epoch = step // per_epoch
        epoch_set = learner.training_set(examples, epoch)
        order = step_order(epoch_set.lengths, settings.global_batch, config.run.seed + epoch)
        engine.train()
        for rows in order[step - epoch * per_epoch :]:
            loss = _step(engine, learner, epoch_set, rows, config, world, step, total)
            step += 1
            log.add(loss, int(epoch_set.lengths[rows].sum()))
            stopped = False
            saves = step % settings.checkpoint_every == 0 or step == total
            # Logged before every checkpoint: none holds a loss that is not a number, and a
            # resumed run begins its means where the uninterrupted one does.
            if step % LOG_EVERY_STEPS == 0 or saves:
                mean = log.write(step, epoch, learning_rate(settings, step - 1, total))
                if not math.isfinite(mean):
                    raise InputError(
                        f"train: the loss is {mean} at step {step}; the checkpoint before it, if "
                        f"any, is kept in {folder}: lower train.lr or use model.precision=fp32"
                    )
                progress.advance(step - progress.done, f"loss {mean:.4f}")
                stopped = bool(max_over_ranks(world, int(bool(stop_asked))))
            if dev is not None and step % per_epoch == 0:
                log.write_dev(step, epoch, mean_loss(config, learner, world, dev))
            if saves or stopped:
                _save(engine, folder, step, world)
            if stopped:
                raise Stopped
    progress.finish()


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: warm-up, then the schedule down to 0."""
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[settings.schedule]
    return settings.lr * factor


def step_order(lengths: np.ndarray, global_batch: int, seed: int) -> list[np.ndarray]:
    """Rows of each optimizer step: random, but with neighbours in length together.

    The order depends on the seed alone, not on the number of ranks.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    window = global_batch * _STEPS_PER_WINDOW
    steps = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        steps += [rows[i : i + global_batch] for i in range(0, len(rows), global_batch)]
    return [steps[i] for i in generator.permutation(len(steps))]


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, tokens: int, world_size: int, rank: int
) -> list[tuple[np.ndarray, bool]]:
    """This rank's micro batches of a step, as many as every other rank's.

    Each is (rows, counts): where a rank has fewer than the others it repeats a row that does not
    count, because sharded ranks must run the same number of passes.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    shares = [_cut(by_length[r::world_size], lengths, tokens) for r in range(world_size)]
    own: list[tuple[np.ndarray, bool]] = [(part, True) for part in shares[rank]]
    return own + [(by_length[-1:], False)] * (max(map(len, shares)) - len(own))


def mean_loss(config: Config, learner: Learner, world: World, examples: pa.Table) -> float:
    """Mean loss over `examples` without training."""
    learner.module.eval()
    held_out = learner.training_set(examples, epoch=0)
    total, rows = 0.0, np.arange(len(examples))
    with torch.no_grad():
        for part, counts in micro_batches(
            rows, held_out.lengths, config.train.micro_batch_tokens, world.size, world.rank
        ):
            loss = float(learner.loss(held_out.batch(part.tolist())))
            total += loss if counts else 0.0
    return _sum_over_ranks(world, total) / float(held_out.weights.sum())


def export(config: Config, learner: Learner, world: World) -> None:
    """Let the method write its trained weights into the run folder.

    Raises:
        InputError: they can't be written.
    """
    state = full_weights(learner, world)

    def write() -> None:
        with writing(config.run_dir):
            learner.export(state, config.run_dir)

    on_rank_0(world, write)


def full_weights(learner: Learner, world: World) -> dict[str, torch.Tensor]:
    """Every parameter, whole, on the CPU of rank 0; empty elsewhere. Gathered one by one."""
    import deepspeed

    engine: Any = learner.module
    state = {}
    for name, parameter in engine.module.named_parameters():
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            if world.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def _engine(config: Config, learner: Learner) -> Any:
    import deepspeed

    decayed = [p for p in learner.module.parameters() if p.requires_grad and _matrix(p)]
    others = [p for p in learner.module.parameters() if p.requires_grad and not _matrix(p)]
    groups = [
        {"params": decayed, "weight_decay": config.train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.train.lr)
    engine, *_ = deepspeed.initialize(
        model=learner.module, optimizer=optimizer, config=derived_config(config, trains=True)
    )
    return engine


def _step(
    engine: Any,
    learner: Learner,
    epoch_set: TrainingSet,
    rows: np.ndarray,
    config: Config,
    world: World,
    step: int,
    total: int,
) -> torch.Tensor:
    """One optimizer step; this rank's share of the mean loss."""
    # Dropout is drawn from the step itself: a resumed run needs no saved random state.
    torch.manual_seed((config.run.seed * 1_000_003 + step) * world.size + world.rank)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, step, total)
    weight = float(epoch_set.weights[rows].sum())
    parts = micro_batches(
        rows, epoch_set.lengths, config.train.micro_batch_tokens, world.size, world.rank
    )
    mean = torch.zeros((), device=world.device)
    for place, (part, counts) in enumerate(parts):
        engine.set_gradient_accumulation_boundary(place == len(parts) - 1)
        loss = learner.loss(epoch_set.batch(part.tolist())) * (float(counts) / weight)
        # DeepSpeed averages gradients over ranks; the step's loss is their sum.
        engine.backward(loss * world.size)
        mean += loss.detach()
    engine.step()
    return mean


def _cut(rows: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut rows, longest first, into batches whose padded size is at most `tokens`."""
    parts = []
    while len(rows):
        count = max(1, tokens // int(lengths[rows[0]]))
        parts.append(rows[:count])
        rows = rows[count:]
    return parts


def _matrix(parameter: torch.Tensor) -> bool:
    # Under ZeRO 3 a parameter's own shape is its empty remainder.
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def _save(engine: Any, folder: Path, step: int, world: World) -> None:
    tag = f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / tag):
        engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step})
    on_rank_0(world, lambda: _remove_older(folder, tag))


def _remove_older(folder: Path, tag: str) -> None:
    for old in folder.glob("step_*"):
        if old.name != tag:
            shutil.rmtree(old)


def _load(engine: Any, folder: Path) -> int:
    """Load the last checkpoint, if there is one, and give its step."""
    if not (folder / "latest").exists():
        return 0
    path, state = engine.load_checkpoint(str(folder))
    if path is None:
        raise InputError(f"--resume: no readable checkpoint in {folder}; remove it to start anew")
    return int(state["step"])


def _sum_over_ranks(world: World, value: float) -> float:
    if world.size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return float(total)


def _catch_signals() -> list[int]:
    """A list that holds the signals received from now on; empty while there was none."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return received


class _Log:
    """`train_log.jsonl`: a line every few steps, means over the steps since the last one."""

    def __init__(self, path: Path, world: World, step: int) -> None:
        self.path, self.world = path, world
        self.losses: list[torch.Tensor] = []
        self.tokens, self.start = 0, time.monotonic()
        if world.rank == 0:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in _complete(lines) if line["step"] <= step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens

    def write(self, step: int, epoch: int, lr: float) -> float:
        local = float(torch.stack(self.losses).sum()) / len(self.losses)
        mean = _sum_over_ranks(self.world, local)
        rate = self.tokens / (time.monotonic() - self.start)
        self._append(
            {"step": step, "epoch": epoch, "loss": mean, "lr": lr, "tokens_per_s": round(rate, 1)}
        )
        self.losses, self.tokens, self.start = [], 0, time.monotonic()
        return mean

    def write_dev(self, step: int, epoch: int, loss: float) -> None:
        self._append({"step": step, "epoch": epoch, "dev_loss": loss})
        self.start = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        if self.world.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _complete(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Parsed lines; a run that was killed may have left half a line at the end."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
