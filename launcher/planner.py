"""Where a run fits and how fast it would be: memory, communication and time of every way to share
a model, from its shapes alone; see `launcher.footprint`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from launcher.batching import total_steps
from launcher.config import REDUCE_BUCKET, Config
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.hardware import LINKS, Card, Link

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENTS = 8  # AdamW's two, in float32
_JOINED = 500_000_000  # elements of gradients that DeepSpeed sends together at stage 0
_HALVINGS = 6  # of the micro batch, when looking for what would fit
Footprints = Callable[[Config, int], Footprint]
"""The footprint of a config on so many ranks."""


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on."""

    card: Card
    ranks: int
    link: Link
    """The slowest that a ring of all ranks goes through."""
    host_memory: float
    """Bytes for each rank; on a CPU the card's own."""
    host_link: Link = LINKS["PCIe 3"]
    """Between a card and its host's memory."""


@dataclass(frozen=True)
class Plan:
    """One way to share the model: bytes of one rank, and its time for a step."""

    zero: int
    offload: bool
    checkpointing: bool
    device: dict[str, float]
    """Bytes by item at the worst moment."""
    host: float
    """Bytes beside the process itself."""
    sent: float
    """Bytes that a rank sends in a step."""
    compute_s: float
    link_s: float
    """Sending, as if nothing were computed meanwhile: DeepSpeed's settings overlap little."""
    lacks: float
    """Bytes more than there are, of the card's memory or else the host's; 0: it fits."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.link_s

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def settings(self) -> dict[str, Any]:
        """What gives this plan, under the config's `parallel`."""
        return {
            "zero": self.zero,
            "offload": "cpu" if self.offload else "none",
            "activation_checkpointing": self.checkpointing,
        }

    @property
    def overrides(self) -> str:
        """The same for a command line."""
        return " ".join(_override(key, value) for key, value in self.settings.items())


def estimate(
    needs: Footprint,
    hardware: Hardware,
    *,
    zero: int,
    offload: bool = False,
    checkpointing: bool = False,
) -> Plan:
    """Memory, communication and time of one plan.

    Memory is what tensors take at the worst of two moments: the end of the forward pass, when
    activations are most, and the update, when gradients are copied. What is sent follows
    Rajbhandari et al. 2020, "ZeRO", section 7: a ring sends (ranks - 1) / ranks of what it gathers
    or reduces.
    """
    ranks, card, one = hardware.ranks, hardware.card, needs.heaviest[zero == 3]
    device, host = _memory(needs, ranks, zero, offload)
    lacks = max(
        sum(device.values()) + card.reserved - card.memory,
        host - hardware.host_memory if not card.is_cpu else 0.0,
        0.0,
    )
    width, ring = BYTES[needs.precision], (ranks - 1) / ranks
    gradients = needs.trained * width + needs.replicated * 4
    collectives, sent = 1.0, 2 * ring * gradients
    if zero == 3:
        weights = needs.passes * one.gathered * width
        sent = ring * (weights + gradients) + ring * needs.replicated * 4
        collectives += needs.passes * one.gathers
    rate = card.flops[needs.precision] * card.reached * (card.sharded if zero == 3 else 1)
    compute_s = needs.work * (one.flops / rate + one.streamed / (card.bandwidth * card.streamed))
    launched_s = needs.passes * one.operations * card.launch
    # A GPU computes while the next kernels are started.
    compute_s = compute_s + launched_s if card.is_cpu else max(compute_s, launched_s)
    # AdamW reads and writes weights, gradients and moments.
    share = ranks if zero else 1
    updated = (needs.trained / share + needs.replicated) * (2 * _MOMENTS + 12)
    compute_s += updated / (card.bandwidth * card.streamed)
    link = hardware.link
    link_s = 0.0
    if ranks > 1:
        link_s = sent / (link.bandwidth * link.reached) + collectives * (ranks - 1) * link.latency
    if offload:
        moved = 2 * needs.trained / share * width
        if zero == 3:
            moved += needs.passes * one.gathered * width / ranks
        link_s += moved / (hardware.host_link.bandwidth * hardware.host_link.reached)
    return Plan(zero, offload, checkpointing, device, host, sent, compute_s, link_s, lacks)


def compare(config: Config, footprints: Footprints, hardware: Hardware) -> list[Plan]:
    """All plans, those that fit first and of them the fastest; of equally fast ones the simplest.

    Plans that would be another's equal are left out: stages 1 and 2 where the module is not
    trained, ZeRO 3 on one rank without offload, and checkpointing without a backward pass. The
    stage that the config asks for never is.
    """
    plans = []
    asked = config.parallel.zero
    first = footprints(_with(config, activation_checkpointing=False), hardware.ranks)
    for checkpointing in (False, True) if first.trains else (False,):
        needs = first
        if checkpointing:
            needs = footprints(_with(config, activation_checkpointing=True), hardware.ranks)
        for zero in sorted({*_stages(needs), *([] if asked == "auto" else [asked])}):
            for offload in (False, True):
                pointless = hardware.ranks == 1 and zero and not offload and zero != asked
                nothing = offload and (zero == 0 or hardware.card.is_cpu)
                if not pointless and not nothing:
                    plans.append(
                        estimate(
                            needs,
                            hardware,
                            zero=zero,
                            offload=offload,
                            checkpointing=checkpointing,
                        )
                    )
    return sorted(plans, key=_order)


def choose(config: Config, plans: Sequence[Plan]) -> Plan | None:
    """The first plan that fits among those that the config allows: its `offload` and
    `activation_checkpointing` stay as they are, and `zero`, if it is not auto."""
    return next((plan for plan in plans if _allows(config, plan) and not plan.lacks), None)


def refusal(
    config: Config, plans: Sequence[Plan], footprints: Footprints, hardware: Hardware
) -> InputError:
    """Says what of a config that does not fit would have to change: the least that would do.

    In this order: other settings under `parallel`, smaller micro batches, more ranks, other cards.
    """
    allowed = [plan for plan in plans if _allows(config, plan)] or plans
    least = min(allowed, key=lambda plan: plan.lacks)
    problem = (
        f"parallel: {least.overrides} takes {least.total / 1e9:.1f} GB a rank"
        + (f" and {least.host / 1e9:.1f} GB of its host" if least.host else "")
        + f", {least.lacks / 1e9:.1f} GB more than there are"
    )
    others = [plan for plan in plans if not plan.lacks]
    if others:
        changes = min((_changes(config, plan) for plan in others), key=len)
        return InputError(f"{problem}: use {' '.join(changes)}")
    heading = "train" if footprints(config, hardware.ranks).trains else "evaluation"
    tokens = getattr(config, heading).micro_batch_tokens
    for _ in range(_HALVINGS):
        tokens //= 2
        smaller = config.model_copy(
            update={
                heading: getattr(config, heading).model_copy(update={"micro_batch_tokens": tokens})
            }
        )
        found = [plan for plan in compare(smaller, footprints, hardware) if not plan.lacks]
        if found:
            changes = [f"{heading}.micro_batch_tokens={tokens}", *_changes(config, found[0])]
            return InputError(f"{problem}: use {' '.join(changes)}")
    for ranks in (2, 4, 8, 16, 32, 64, 128):
        if ranks > hardware.ranks:
            more = replace(hardware, ranks=ranks)
            found = [plan for plan in compare(config, footprints, more) if not plan.lacks]
            if found:
                changes = [f"{ranks} ranks", *_changes(config, found[0])]
                return InputError(f"{problem}: use {' '.join(changes)}")
    best = min(plans, key=lambda plan: plan.lacks)
    changes = [f"cards with {best.lacks / 1e9:.1f} GB more", *_changes(config, best)]
    return InputError(f"{problem}: use {' '.join(changes)}")


def stage(config: Config, module: ModuleType, dataset: Any, hardware: Hardware) -> int:
    """The ZeRO stage for `parallel.zero: auto`.

    Raises:
        InputError: none fits.
    """
    footprints = remembered(module, dataset)
    needs = footprints(config, hardware.ranks)
    given = config.parallel
    settings = {"offload": given.offload == "cpu", "checkpointing": given.activation_checkpointing}
    plans = [estimate(needs, hardware, zero=zero, **settings) for zero in _stages(needs)]
    chosen = choose(config, sorted(plans, key=_order))
    if chosen is None:
        error = refusal(config, compare(config, footprints, hardware), footprints, hardware)
        raise InputError(f"{error}; or give parallel.zero, and it is tried as it is")
    return chosen.zero


def steps(config: Config, dataset: Any, needs: Footprint) -> int:
    """How many steps a run has: of training, or of scoring where nothing is trained."""
    if needs.trains:
        return total_steps(config.train, len(dataset.splits["train"]))
    texts = sum(len(dataset.splits[split]) for split in config.data.evaluate)
    return math.ceil(texts / needs.examples)


def remembered(module: ModuleType, dataset: Any) -> Footprints:
    """The footprints that a method offers, each counted once.

    Raises:
        InputError: it offers none.
    """
    if not hasattr(module, "footprint"):
        raise InputError(
            f"method {module.__name__}: it can't be planned, as it does not tell its shapes: leave "
            "--plan out"
        )
    known: dict[str, Footprint] = {}

    def footprint(config: Config, ranks: int) -> Footprint:
        parts = config.parallel.activation_checkpointing, config.train, config.evaluation
        key = f"{ranks} {parts}"
        if key not in known:
            known[key] = module.footprint(config, dataset, ranks)
        return known[key]

    return footprint


def _memory(
    needs: Footprint, ranks: int, zero: int, offload: bool
) -> tuple[dict[str, float], float]:
    """Bytes of one rank by item on the device, at the worse of two moments, and on its host."""
    width, trained = BYTES[needs.precision], needs.trained
    one, share = needs.heaviest[zero == 3], ranks if zero else 1
    weights = float((needs.frozen + trained) * width)
    small = float(needs.small * width if zero == 3 else 0)
    if zero == 3:
        weights = (weights - small) / ranks
    # In half precision, and under ZeRO, AdamW has a float32 copy of the weights that it updates.
    states = trained / share * (_MOMENTS + (4 if zero or width == 2 else 0))
    gradients = trained / (share if zero >= 2 else 1) * width
    host = 0.0
    if offload and zero:
        host = states + trained / share * 4
        states = 0.0
        if zero == 3:
            host, weights = host + weights, 0.0
    kept = {
        "weights": weights + small,
        "optimizer": states + needs.replicated * (4 + 4 + _MOMENTS),
    }
    gathered = 0.0
    if zero == 3:
        gathered = float(one.activations_gathered - one.activations)
        # A weight lands in a buffer before it is the layer's.
        gathered += needs.largest * width if ranks > 1 else 0
    # From stage 2 on gradients leave in the midst of the backward pass, through a buffer beside
    # which the next ones wait; stage 3 lays it out anew and receives its share.
    buffers = {2: 1.5, 3: 2.5 + 1 / ranks}.get(zero, 0.0)
    if zero < 3:
        # In a step's first micro batch gradients come as activations go; stage 3 has room for its
        # share from the start.
        coming = (one.with_gradients - one.activations) / (share if zero == 2 else 1)
        gradients = max(coming, gradients - (1 - needs.later) * one.activations)
    backward = kept | {
        "gradients": gradients + buffers * min(REDUCE_BUCKET, trained) * width,
        "gathered": gathered,
        "activations": float(one.activations - one.logits - needs.prefix),
        "logits": float(one.logits),
        "prefix": float(needs.prefix),
    }
    update = dict.fromkeys(backward, 0.0) | kept
    if zero:
        # A rank's share twice: as it was sent, and joined for AdamW.
        update["gradients"] = 2 * trained / share * 4
    else:
        joined = min(trained, _JOINED) if ranks > 1 else 0
        update["gradients"] = (trained + joined) * width
    return max(backward, update, key=lambda items: sum(items.values())), host


def _allows(config: Config, plan: Plan) -> bool:
    return not _changes(config, plan)


def _changes(config: Config, plan: Plan) -> list[str]:
    """The overrides that a config needs for a plan."""
    given: dict[str, Any] = {"zero": config.parallel.zero, "offload": config.parallel.offload}
    given["activation_checkpointing"] = config.parallel.activation_checkpointing
    return [
        _override(key, value)
        for key, value in plan.settings.items()
        if given[key] not in ("auto", value)
    ]


def _override(key: str, value: Any) -> str:
    return f"parallel.{key}={str(value).lower()}"


def _order(plan: Plan) -> tuple[Any, ...]:
    # Of plans within a few percent, more than which the estimate can't tell, the simplest.
    return (
        bool(plan.lacks),
        float(f"{plan.seconds:.1e}"),
        plan.offload,
        plan.checkpointing,
        plan.zero,
    )


def _with(config: Config, **parallel: Any) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _stages(needs: Footprint) -> tuple[int, ...]:
    """Those that differ: 1 and 2 share what training the module needs."""
    return (0, 1, 2, 3) if needs.trained else (0, 3)
