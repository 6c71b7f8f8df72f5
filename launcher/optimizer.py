"""From losses to updates, and their checkpoints: one way for a model that is trained, one for a
small network that is trained beside a frozen model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config import Config
from launcher.distributed import World, full_shape, on_rank_0
from launcher.engine import derived_config, place_for_scoring
from launcher.errors import InputError
from launcher.files import replacing, writing
from launcher.method import Learner


class Optimizer(Protocol):
    """AdamW on what a learner trains."""

    module: Any
    """What the learner's module is from now on."""

    @property
    def scale(self) -> float:
        """What losses are multiplied with in fp16 so that gradients don't vanish; 1 otherwise."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's share of the loss; `last` of the step or not."""

    def step(self, lr: float) -> float:
        """Update with the summed gradients of all ranks; their norm before it is clipped.

        If that is not finite nothing was updated, and in fp16 `scale` falls. The model's own
        optimizer (`ShardedOptimizer`) notices it in fp16 only and gives 0 otherwise.
        """

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the checkpoint `folder/step_N`, with N from `state`, and make it the latest."""

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Go on from the latest checkpoint in `folder`; its `state`, or None without one."""


def make_optimizer(config: Config, learner: Learner, world: World) -> Optimizer:
    """The optimizer for what the learner trains: its `replicated` network, or its module."""
    if learner.replicated is not None:
        return ReplicatedOptimizer(config, learner, world)
    return ShardedOptimizer(config, learner, world)


class ShardedOptimizer:
    """DeepSpeed's: gradients and AdamW's moments of the module's own weights, sharded by ZeRO."""

    def __init__(self, config: Config, learner: Learner, world: World) -> None:
        import deepspeed

        groups = _groups(config, learner.module, getattr(learner, "lr_factor", None))
        optimizer = torch.optim.AdamW(groups, lr=config.train.lr, fused=True)
        derived = derived_config(config, trains=True)
        self.engine, *_ = deepspeed.initialize(
            model=learner.module, optimizer=optimizer, config=derived
        )
        if world.size == 1 and config.parallel.zero == 0:
            # It would copy all gradients into one buffer and back, to add up those of one rank.
            self.engine.enable_backward_allreduce = False
        self.module: Any = self.engine
        self.world = world

    @property
    def scale(self) -> float:
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the step's loss is their sum.
        self.engine.backward(loss * self.world.size)

    def step(self, lr: float) -> float:
        skipped = self.engine.skipped_steps
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.engine.step()
        return float("inf") if self.engine.skipped_steps > skipped else 0.0

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        tag = f"step_{state['step']}"
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / tag):
            self.engine.save_checkpoint(
                str(folder),
                tag=tag,
                client_state={"training": state},
                exclude_frozen_parameters=True,
            )

    def load(self, folder: Path) -> dict[str, Any] | None:
        if not (folder / "latest").exists():
            return None
        frozen = not all(p.requires_grad for p in self.engine.module.parameters())
        path, state = self.engine.load_checkpoint(str(folder), load_module_strict=not frozen)
        if path is None:
            raise _unreadable(folder)
        return dict(state["training"])


class ReplicatedOptimizer:
    """For a network of kilobytes beside a frozen model: float32, whole on every rank.

    DeepSpeed has the frozen model alone: stage 3 shards its weights, and stages 1 and 2, which
    shard what updates need, find nothing and act as 0. A step sends the network's gradients once. A
    checkpoint holds the network, AdamW's moments and the step, from which all random numbers are
    drawn.
    """

    def __init__(self, config: Config, learner: Learner, world: World) -> None:
        self._sharded = place_for_scoring(config, learner, world)
        self.module: Any = learner.module
        assert learner.replicated is not None
        self.network = learner.replicated.to(world.device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(_groups(config, self.network), lr=config.train.lr)
        self.clip_norm, self.world = config.train.clip_norm, world
        half = config.model.precision == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=half)

    @property
    def scale(self) -> float:
        return self.scaler.get_scale()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.world.size > 1:
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([gradient.flatten() for gradient in own])
            dist.all_reduce(flat)
            sizes = [p.numel() for p in self.parameters]
            for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        elif norm < float("inf"):
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        on_rank_0(self.world, lambda: self._save(folder, state))

    def load(self, folder: Path) -> dict[str, Any] | None:
        if not (folder / "latest").exists():
            return None
        file = folder / (folder / "latest").read_text(encoding="utf-8") / "state.pt"
        try:
            loaded = torch.load(file, map_location=self.world.device, weights_only=True)
            self.network.load_state_dict(loaded["network"])
            self.optimizer.load_state_dict(loaded["optimizer"])
        except (OSError, RuntimeError, EOFError, KeyError, ValueError):
            raise _unreadable(folder) from None
        self.scaler.load_state_dict(loaded["scaler"])
        return dict(loaded["state"])

    def _save(self, folder: Path, state: dict[str, Any]) -> None:
        tag = f"step_{state['step']}"
        held = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": state,
        }
        (folder / tag).mkdir(parents=True, exist_ok=True)
        with replacing(folder / tag / "state.pt") as temporary:
            torch.save(held, temporary)
        written = torch.load(folder / tag / "state.pt", map_location="cpu", weights_only=True)
        for name, tensor in self.network.state_dict().items():
            if not torch.equal(written["network"][name], tensor.cpu()):
                raise InputError(f"{folder / tag}: {name} reads back otherwise: check the disk")
        with replacing(folder / "latest") as temporary:
            temporary.write_text(tag, encoding="utf-8")


def keep_only(folder: Path, step: int) -> None:
    """Remove the checkpoints of other steps."""
    for old in folder.glob("step_*"):
        if old.name != f"step_{step}":
            shutil.rmtree(old)


def _groups(
    config: Config, module: nn.Module, lr_factor: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Weight decay on matrices only, and not on PEFT's table of learned vectors.

    A learner may offer `lr_factor(name)`, what the rate of that parameter is multiplied with.
    """
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = len(full_shape(parameter)) > 1 and name != "embedding.weight"
        factor = lr_factor(name) if lr_factor else 1.0
        decay = config.train.weight_decay if decays else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (factor, decay), parameters in groups.items()
    ]


def _unreadable(folder: Path) -> InputError:
    return InputError(f"--resume: no readable checkpoint in {folder}; remove it to start anew")
