"""The training loop: the same steps on one rank or many, with checkpoints that resume exactly."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from launcher import lr_range_test, metrics
from launcher.batching import micro_batches, step_order, steps_per_epoch, total_steps
from launcher.config import Config, TrainSettings
from launcher.distributed import World, gathered, max_over_ranks, on_rank_0, sum_over_ranks
from launcher.engine import DTYPES, check_scores, score_texts
from launcher.errors import InputError
from launcher.files import write_json, writing
from launcher.method import Learner, TrainingSet
from launcher.optimizer import Optimizer, keep_only, make_optimizer
from launcher.predictions import Predictions, gold_of
from launcher.progress import Progress
from launcher.throughput import peak_flops_per_s
from launcher.training_log import TrainingLog

LOG_EVERY_STEPS = 10
_COLLAPSED = 0.95
"""Share of one label among the predictions, far above its share of the texts."""
_PROBES = 8
"""Texts that are scored before and after an export."""


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
    """Train what the learner trains and leave its module wrapped by the DeepSpeed engine.

    The dev split is looked at before the first step, if the method classifies, and then every
    epoch or `train.evaluate_every` steps. With `train.keep: best` the state in which it did best is
    what is left in the end.

    Raises:
        Stopped: after SIGTERM or SIGINT, with a checkpoint written.
        InputError: the loss is not a number, or fp16 overflows again and again.
    """
    optimizer = _placed(config, learner, world, examples)
    last, best = (config.run_dir / "checkpoints" / name for name in ("last", "best"))
    settings = config.train
    first = learner.training_set(examples, 0)
    per_epoch = steps_per_epoch(settings, len(first.lengths))
    total = total_steps(settings, len(first.lengths))
    state = optimizer.load(last) if resume else None
    state = state or {
        "step": 0,
        "best": None,  # {"step", "value"} of the dev figures so far
        "patience": 0,  # evaluations since then
        "ended": False,  # because of them
        "skipped": 0,  # steps without an update, of which the last
        "in_a_row": 0,
    }
    peak = peak_flops_per_s(world, DTYPES[config.model.precision])
    log = TrainingLog(config.run_dir, world, state["step"], peak_flops_per_s=peak)
    progress = Progress("training", total, "steps", rank=world.rank, done=state["step"])
    stop_asked, stopped = _catch_signals(), False
    if dev is not None and state["step"] == 0 and hasattr(learner, "scores"):
        _evaluate(config, learner, world, dev, log, state, 0)
        _save(optimizer, best, last, state, world)
    for epoch, epoch_set, rows in _steps(config, learner, examples, first, state["step"]):
        if state["ended"] or state["step"] == total:
            break
        state["step"] += 1
        loss = _step(config, optimizer, learner, world, epoch_set, rows, state, total)
        if loss is None:
            raise _not_finite(config, learner, world, epoch_set, rows, state["step"])
        log.add(loss, int(epoch_set.lengths[rows].sum()), learner.flops(epoch_set.lengths[rows]))
        step = state["step"]
        due = step % (settings.evaluate_every or per_epoch) == 0 or step == settings.max_steps
        evaluates = dev is not None and due
        saves = evaluates or step % settings.checkpoint_every == 0 or step == total
        # Logged before every checkpoint: none holds a loss that is not a number, and a resumed run
        # begins its means where the uninterrupted one does.
        if step == 1 or step % LOG_EVERY_STEPS == 0 or saves:
            rate = learning_rate(settings, step - 1, total)
            mean = log.write(step, epoch, rate, skipped_steps=state["skipped"])
            progress.advance(step - progress.done, f"loss {mean:.4f}")
            stopped = bool(max_over_ranks(world, int(bool(stop_asked))))
        if evaluates:
            assert dev is not None
            _evaluate(config, learner, world, dev, log, state, epoch)
        if saves or stopped:
            _save(optimizer, best, last, state, world)
        if stopped:
            raise Stopped
    if settings.keep == "best" and state["best"] and state["best"]["step"] != state["step"]:
        optimizer.load(best)
    log.close()
    progress.finish()


def range_test(config: Config, learner: Learner, world: World, examples: pa.Table) -> None:
    """Train with a rising learning rate until the loss diverges; write and tell what it shows."""
    test = config.train.lr_range_test
    assert test is not None
    optimizer = _placed(config, learner, world, examples)
    rates: list[float] = []
    losses: list[float] = []
    progress = Progress("learning-rate range test", test.steps, "steps", rank=world.rank)
    first = learner.training_set(examples, 0)
    for _, epoch_set, rows in _steps(config, learner, examples, first, 0, endless=True):
        rates.append(lr_range_test.learning_rate(test.lowest, test.highest, len(rates), test.steps))
        share = _accumulate(config, optimizer, learner, world, epoch_set, rows, len(rates))
        losses.append(sum_over_ranks(world, float(share)))
        optimizer.step(rates[-1])
        progress.advance(1, f"lr {rates[-1]:.1e}, loss {losses[-1]:.4f}")
        if len(rates) == test.steps or lr_range_test.diverged(losses):
            break
    progress.finish()
    suggested = on_rank_0(world, lambda: lr_range_test.write(config.run_dir, rates, losses))
    if world.rank == 0:
        print(f"learning-rate range test: try train.lr={suggested:.1e}, see lr_range_test.svg")


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
    return sum_over_ranks(world, total) / float(held_out.weights.sum())


def export(config: Config, learner: Learner, world: World, texts: list[str]) -> None:
    """Let the method write what it learned into the run folder.

    A method that classifies goes on with what it reads back, which must score `texts` as before.

    Raises:
        InputError: it can't be written, or reads back otherwise.
    """
    state = full_weights(learner, world)
    classifies = hasattr(learner, "scores")
    probes = sorted(set(texts))[:_PROBES]
    before = score_texts(config, learner, world, probes) if classifies else None

    def write() -> None:
        with writing(config.run_dir):
            learner.export(state, config.run_dir)

    on_rank_0(world, write)
    if not classifies:
        return
    learner.load_export(config.run_dir)  # type: ignore[attr-defined]
    after = score_texts(config, learner, world, probes)

    def compare() -> None:
        assert before is not None and after is not None
        if not np.allclose(before, after, atol=1e-3):
            raise InputError(
                f"{config.run_dir}: what was saved scores {probes[0]!r} and others differently, by "
                f"{float(np.abs(before - after).max()):.3g}; the checkpoints are kept"
            )

    on_rank_0(world, compare)


def full_weights(learner: Learner, world: World) -> dict[str, torch.Tensor]:
    """The module's trained parameters, whole, on the CPU of rank 0; gathered one by one."""
    module: Any = getattr(learner.module, "module", learner.module)
    state = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered([parameter]):
            if world.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def _placed(config: Config, learner: Learner, world: World, examples: pa.Table) -> Optimizer:
    """The optimizer; the learner's module is on its device, sharded, with its first values."""
    optimizer = make_optimizer(config, learner, world)
    learner.module = optimizer.module
    learner.start(examples)
    return optimizer


def _steps(
    config: Config,
    learner: Learner,
    examples: pa.Table,
    first: TrainingSet,
    done: int,
    *,
    endless: bool = False,
) -> Iterator[tuple[int, TrainingSet, np.ndarray]]:
    """Epoch, its examples (`first` in epoch 0) and the rows of each step after `done` of them."""
    per_epoch = steps_per_epoch(config.train, len(first.lengths))
    epoch = done // per_epoch
    while endless or epoch < config.train.epochs:
        epoch_set = learner.training_set(examples, epoch) if epoch else first
        order = step_order(epoch_set.lengths, config.train.global_batch, config.run.seed + epoch)
        for rows in order[max(0, done - epoch * per_epoch) :]:
            yield epoch, epoch_set, rows
        epoch += 1


def _step(
    config: Config,
    optimizer: Optimizer,
    learner: Learner,
    world: World,
    epoch_set: TrainingSet,
    rows: np.ndarray,
    state: dict[str, Any],
    total: int,
) -> torch.Tensor | None:
    """One optimizer step; this rank's share of the mean loss, or None if it is not a number.

    What is not finite is noticed before it gets into the weights.
    """
    step = state["step"]
    loss = _accumulate(config, optimizer, learner, world, epoch_set, rows, step)
    half = config.model.precision == "fp16"
    scale = optimizer.scale
    finite = not max_over_ranks(world, int(not math.isfinite(float(loss))))
    if not finite and not half:
        return None
    norm = optimizer.step(learning_rate(config.train, step - 1, total))
    if math.isfinite(norm) and finite:
        state["in_a_row"] = 0
        return loss
    if not half:
        return None
    state["skipped"] += 1
    state["in_a_row"] += 1
    if state["in_a_row"] >= config.train.max_skipped_steps:
        cause = f"the gradients overflow even at a loss scale of {scale:g}"
        if not finite:
            cause = "the loss itself is not a number: the model's activations do not fit fp16"
        raise InputError(
            f"train: fp16 overflow in {state['in_a_row']} steps in a row, up to step {step}; "
            f"{cause}; use model.precision=bf16 or fp32. The checkpoint before, if any, is kept in "
            f"{config.run_dir / 'checkpoints' / 'last'}"
        )
    return torch.zeros_like(loss) if not finite else loss


def _accumulate(
    config: Config,
    optimizer: Optimizer,
    learner: Learner,
    world: World,
    epoch_set: TrainingSet,
    rows: np.ndarray,
    step: int,
) -> torch.Tensor:
    """Forward and backward of a step; this rank's share of the mean loss."""
    # Dropout is drawn from the step itself: a resumed run needs no saved random state.
    torch.manual_seed((config.run.seed * 1_000_003 + step - 1) * world.size + world.rank)
    optimizer.module.train()
    # Examples that count 0 add nothing, also where a step has no others.
    weight = float(epoch_set.weights[rows].sum()) or 1.0
    parts = micro_batches(
        rows, epoch_set.lengths, config.train.micro_batch_tokens, world.size, world.rank
    )
    mean = torch.zeros((), device=world.device)
    for place, (part, counts) in enumerate(parts):
        loss = learner.loss(epoch_set.batch(part.tolist())) * (float(counts) / weight)
        optimizer.backward(loss, last=place == len(parts) - 1)
        mean += loss.detach()
    return mean


def _evaluate(
    config: Config,
    learner: Learner,
    world: World,
    dev: pa.Table,
    log: TrainingLog,
    state: dict[str, Any],
    epoch: int,
) -> None:
    """Look at the dev split, log it, and say in `state` whether it is the best so far."""
    settings, step = config.train, state["step"]
    shown = dev.slice(0, settings.dev_examples)
    if not hasattr(learner, "scores"):
        figures = {"loss": mean_loss(config, learner, world, shown)}
        value = -figures["loss"]
    else:
        learner.module.eval()
        scores = score_texts(config, learner, world, shown["text"].to_pylist())
        found = on_rank_0(world, lambda: _dev_figures(shown, scores, config.data.labels or []))
        figures, collapsed = found
        value = figures["acc@1"]
        if collapsed and world.rank == 0:
            print(
                f"\nwarning: after step {step} nearly every dev text is given {collapsed!r}: if it "
                "stays so, what is learned has collapsed; lower train.lr, or find one by "
                "train.lr_range_test, or start from other values",
                flush=True,
            )
    log.write_dev(step, epoch, **figures)
    # Equal accuracies are told apart by the loss.
    if state["best"] is None or (value, -figures["loss"]) > tuple(state["best"]["value"]):
        state["best"] = {"step": step, "value": [value, -figures["loss"]]}
        state["patience"] = 0
    else:
        state["patience"] += 1
        if settings.patience is not None and state["patience"] >= settings.patience:
            state["ended"] = True


def _dev_figures(
    dev: pa.Table, scores: np.ndarray | None, labels: list[str]
) -> tuple[dict[str, float], str | None]:
    """Loss, Acc@k and macro-F1; and the label that nearly every text is given, if there is one."""
    assert scores is not None
    check_scores(scores, dev["text"])
    gold, shares = gold_of(dev, len(labels))
    predicted = scores.argmax(axis=1)
    ids = np.array([str(row) for row in range(len(dev))])
    found = metrics.compute(
        Predictions(ids, ids, gold, shares, predicted, scores, labels, {}), bootstrap_samples=2
    )
    known = gold >= 0
    loss = -float(scores[known, gold[known]].mean()) if known.any() else math.nan
    values = {key: found[key]["value"] for key in ("acc@1", "acc@3", "macro_f1")}
    most = int(np.bincount(predicted).argmax())
    collapsed = (predicted == most).mean() >= _COLLAPSED > (gold[known] == most).mean()
    return {"loss": loss, **values}, labels[most] if collapsed else None


def _save(
    optimizer: Optimizer, best: Path, last: Path, state: dict[str, Any], world: World
) -> None:
    """Write the last checkpoint, and the best one if it is that; older ones go when both are."""
    step, found = state["step"], state["best"]
    if found and found["step"] == step:
        optimizer.save(best, state)
    optimizer.save(last, state)
    on_rank_0(world, lambda: keep_only(last, step))
    if found:
        on_rank_0(world, lambda: keep_only(best, found["step"]))


def _not_finite(
    config: Config,
    learner: Learner,
    world: World,
    epoch_set: TrainingSet,
    rows: np.ndarray,
    step: int,
) -> InputError:
    """Write which examples have no finite loss, and say where."""
    learner.module.eval()
    found = []
    with torch.no_grad():
        for row in rows.tolist():
            loss = float(learner.loss(epoch_set.batch([row])))
            if not math.isfinite(loss):
                found.append({"id": epoch_set.names[row], "loss": str(loss)})
    file = config.run_dir / "not_finite.json"

    content = {"step": step, "examples": found, "of": len(rows)}
    on_rank_0(world, lambda: write_json(file, content))
    return InputError(
        f"train: the loss or its gradient is not a number in step {step}; {len(found)} of its "
        f"{len(rows)} examples have no finite loss by themselves, their ids are in {file}. The "
        f"checkpoint before it, if any, is kept in {config.run_dir / 'checkpoints' / 'last'}: "
        "lower train.lr, use model.precision=fp32, or look at those texts"
    )


def _catch_signals() -> list[int]:
    """A list that holds the signals received from now on; empty while there was none."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return received
