"""The hardware to plan for: what the config names, or what is found and measured here."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch.nn.functional import gelu, linear

from launcher.config import Config
from launcher.errors import InputError
from launcher.hardware import CARDS, LINKS, LOOPBACK, Card, Link
from launcher.planner import Hardware

CPU_RESERVED = 7.5e7
"""Bytes that libraries take for themselves once they are used."""
_SIZE = 2048
_SECONDS = 0.3


def named(config: Config, ranks: int) -> Hardware | None:
    """The hardware that the config names; None: it names no card."""
    given = config.hardware
    if given.card is None:
        return None
    card = CARDS[given.card]
    if given.memory_gb is not None:
        card = replace(card, memory=given.memory_gb * 1e9)
    return Hardware(
        card,
        given.cards or ranks,
        _link(config),
        given.host_memory_gb * 1e9,
        LINKS[given.host_link],
    )


def found(config: Config, device: torch.device, ranks: int, *, nodes: int = 1) -> Hardware:
    """`ranks`, on `nodes` like this one, of what this process has: its GPU, or its share of this
    machine's CPU, whose speed is measured in two seconds."""
    host = psutil.virtual_memory().available / math.ceil(ranks / nodes)
    if device.type == "cuda":
        card = _gpu(torch.cuda.get_device_properties(device))
        return Hardware(card, ranks, _link(config), host, LINKS[config.hardware.host_link])
    link = LOOPBACK if config.hardware.network is None else LINKS[config.hardware.network]
    return Hardware(cpu(host), ranks, link, host)


def with_precision(config: Config, card: Card) -> Config:
    """`config` with `model.precision` as a run would choose it.

    Raises:
        InputError: it is given, and the card has no fast arithmetic for it.
    """
    precision: str = config.model.precision
    if precision == "auto":
        precision = next(name for name in ("bf16", "fp16") if name in card.flops)
        precision = "fp32" if card.is_cpu else precision
    if precision not in card.flops:
        raise InputError(
            f"model.precision: {precision}, but a {card.name} computes fast in "
            f"{' and '.join(card.flops)} only: use one of these, or auto"
        )
    model = config.model.model_copy(update={"precision": precision})
    return config.model_copy(update={"model": model})


def cpu(memory: float) -> Card:
    """A card of this process's threads, by processor time: other processes stretch the wall time.

    `memory` in bytes.
    """
    return replace(_cpu(torch.get_num_threads()), memory=memory)


@functools.cache
def _cpu(threads: int) -> Card:
    """One without memory; measured once in a process."""
    products = {"fp32": _products_per_s(torch.float32, onednn=True)}
    shared = _products_per_s(torch.float32, onednn=False) / products["fp32"]
    products |= {
        name: _products_per_s(dtype, onednn=False)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }
    # More than a cache holds, as a model's states are.
    states = torch.randn(2048, _SIZE)
    seconds = _best(lambda: gelu(states))
    return Card(
        "CPU",
        0.0,
        products,
        2 * states.numel() * states.element_size() / seconds,
        reached=0.8,
        streamed=1.0,
        launch=2e-5,
        sharded=min(1.0, shared),
        reserved=CPU_RESERVED,
        is_cpu=True,
    )


def _link(config: Config) -> Link:
    given = config.hardware
    links = [LINKS[given.link]]
    if given.network is not None:
        links.append(LINKS[given.network])
    return min(links, key=lambda link: link.bandwidth)


def _gpu(properties: Any) -> Card:
    """The card of the table that a device's name holds; else one as fast as the slowest there."""
    memory = float(properties.total_memory)
    for known in CARDS.values():
        model = known.name.removeprefix("RTX ").split(" ")[0]
        if model in properties.name.replace("-", " ").split():
            return replace(known, memory=memory)
    slowest = min(CARDS.values(), key=lambda card: card.flops["fp16"])
    flops = dict(slowest.flops)
    if properties.major >= 8:
        flops["bf16"] = flops["fp16"]
    return replace(slowest, name=properties.name, memory=memory, flops=flops)


def _products_per_s(dtype: torch.dtype, *, onednn: bool) -> float:
    """FLOP/s of a large linear layer by the library that the model uses for it."""
    # Half precision may be emulated and a hundred times slower.
    rows = 256 if dtype == torch.float32 else 16
    states, weight = torch.randn(rows, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
    if onednn and torch.backends.mkldnn.is_available():
        operator = torch.ops.mkldnn._linear_pointwise
        seconds = _best(lambda: operator(states, weight, None, "none", [], ""))
    else:
        seconds = _best(lambda: linear(states, weight))
    return 2 * rows * _SIZE * _SIZE / seconds


def _best(work: Callable[[], Any]) -> float:
    """Least processor time a thread of one repetition."""
    work()
    best, end = math.inf, time.process_time() + _SECONDS * torch.get_num_threads()
    while time.process_time() < end or best == math.inf:
        begun = time.process_time()
        work()
        best = min(best, (time.process_time() - begun) / torch.get_num_threads())
    return best
