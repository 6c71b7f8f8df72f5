"""What `--plan` prints: the plans as a table, the one to take, and what others would need."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from launcher.config import Config
from launcher.footprint import Footprint
from launcher.machine import with_precision
from launcher.planner import Hardware, Plan, choose, compare, refusal, remembered, steps
from launcher.progress import clock


def show(config: Config, module: ModuleType, dataset: Any, hardware: Hardware) -> list[str]:
    """What `--plan` prints.

    Raises:
        InputError: the method says nothing of its shapes, or nothing that the config allows fits.
    """
    plans, chosen, needs, count = _planned(config, module, dataset, hardware)
    return [*lines(plans, chosen, needs, hardware), _duration(count, chosen.seconds, needs)]


def short(
    config: Config, module: ModuleType, dataset: Any, hardware: Hardware
) -> tuple[str, float]:
    """A run's memory and time in a few words, and its seconds; raises InputError as `show`."""
    _, chosen, needs, count = _planned(config, module, dataset, hardware)
    memory = f"ZeRO {chosen.zero}, {(chosen.total + hardware.card.reserved) / 1e9:.2f} GB a rank"
    return f"{memory}, {_duration(count, chosen.seconds, needs)}", count * chosen.seconds


def _planned(
    config: Config, module: ModuleType, dataset: Any, hardware: Hardware
) -> tuple[Sequence[Plan], Plan, Footprint, int]:
    """All plans, the chosen one, what it is for, and the steps of the run."""
    config = with_precision(config, hardware.card)
    footprints = remembered(module, dataset)
    plans = compare(config, footprints, hardware)
    chosen = choose(config, plans)
    if chosen is None:
        raise refusal(config, plans, footprints, hardware)
    needs = footprints(config, hardware.ranks)
    return plans, chosen, needs, steps(config, dataset, needs)


def _duration(count: int, seconds: float, needs: Footprint) -> str:
    what = "training" if needs.trains else "scoring"
    return f"{what} {clock(count * seconds)}, {count:,} steps of {seconds:.2g} s"


def lines(plans: Sequence[Plan], chosen: Plan, needs: Footprint, hardware: Hardware) -> list[str]:
    """The plans as a table, and why one of them is chosen."""
    card, link = hardware.card, hardware.link
    weights = f"{needs.frozen + needs.trained:,} weights in {needs.precision}"
    learned = needs.trained + needs.replicated
    found = [
        f"hardware: {hardware.ranks} x {card.name}, {card.memory / 1e9:.1f} GB each, of which "
        f"{card.reserved / 1e9:.1f} GB are never a tensor's"
        + (f"; {link.name}" if hardware.ranks > 1 else ""),
        f"model: {weights}, of which frozen {needs.frozen:,}; trained {learned:,}",
        f"a step: {needs.examples:,.0f} examples, {needs.passes:.1f} micro batches a rank",
    ]
    names = list(chosen.device)
    heads = ["zero", "offload", "checkpointing", *names, "total GB", "host GB", "sent GB"]
    rows = [[*heads, "step s", "fits"]]
    for plan in plans:
        amounts = [*plan.device.values(), plan.total, plan.host, plan.sent]
        rows.append(
            [
                str(plan.zero),
                "cpu" if plan.offload else "none",
                "yes" if plan.checkpointing else "no",
                *(f"{amount / 1e9:.2f}" for amount in amounts),
                f"{plan.seconds:.3g}",
                "yes" if not plan.lacks else f"{plan.lacks / 1e9:.1f} GB too little",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    told = f"plan: {chosen.overrides}: the fastest that fits and that the config allows"
    told += f", {needs.examples / chosen.seconds:,.0f} examples a second"
    if chosen.link_s:
        told += f", {100 * chosen.link_s / chosen.seconds:.0f} % of its step spent sending"
    return [*found, *table, told, *_others(plans, chosen)]


def _others(plans: Sequence[Plan], chosen: Plan) -> list[str]:
    """What stands beside the chosen plan."""
    found = []
    faster = [plan for plan in plans if plan.seconds < 0.95 * chosen.seconds]
    if faster:
        best = min(faster, key=lambda plan: (plan.lacks, plan.seconds))
        lacking = (
            f"{best.lacks / 1e9:.1f} GB more" if best.lacks else "only that the config says so"
        )
        found.append(
            f"faster, {best.seconds / chosen.seconds:.2f} of its time: {best.overrides}; it needs "
            f"{lacking}"
        )
    smaller = [p for p in plans if not p.lacks and p.total < 0.9 * chosen.total]
    if smaller:
        best = min(smaller, key=lambda plan: plan.seconds)
        found.append(
            f"smaller, by {(chosen.total - best.total) / 1e9:.1f} GB a rank: {best.overrides}; it "
            f"takes {best.seconds / chosen.seconds:.2f} times as long"
        )
    return found
