"""Cards and links as data: makers' figures, and which part of them is reached in practice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What computes one rank."""

    name: str
    memory: float
    """Bytes."""
    flops: dict[str, float]
    """Dense FLOP/s by precision; of fp32 without TF32, which PyTorch leaves off."""
    bandwidth: float
    """Bytes/s of its memory."""
    reached: float = 0.5
    """Share of `flops` in matrix products of a transformer's sizes, kernel launches included."""
    streamed: float = 0.7
    """Share of `bandwidth` in operations from element to element."""
    launch: float = 1e-5
    """Seconds from the start of one kernel to that of the next, when they are small."""
    sharded: float = 1.0
    """Share of `reached` that is left under ZeRO 3, whose linear layers differ on CPUs."""
    reserved: float = 1.5e9
    """Bytes that are never a tensor's: context, libraries' and NCCL's buffers, gaps."""
    is_cpu: bool = False


@dataclass(frozen=True)
class Link:
    """What ranks send through."""

    name: str
    bandwidth: float
    """Bytes/s in one direction; of a network that of a node, whose ranks share it."""
    latency: float
    """Seconds of a message from one rank to the next."""
    reached: float = 0.8
    """Share of `bandwidth` in collectives."""


def _card(
    name: str, gigabytes: float, fp32: float, fp16: float, gb_per_s: float, *, bf16: float = 0
) -> Card:
    tflops = {"fp32": fp32, "fp16": fp16} | ({"bf16": bf16} if bf16 else {})
    return Card(name, gigabytes * 1e9, {k: v * 1e12 for k, v in tflops.items()}, gb_per_s * 1e9)


# Memory is what the driver leaves of the nominal size, in units of 10^9 bytes. fp16 and bf16 are
# tensor-core figures with fp32 accumulation, which on GeForce cards is half of fp16 accumulation.
CARDS = {
    card.name: card
    for card in [
        _card("RTX 2080", 8.3, 10.1, 40.3, 448),
        _card("RTX 2080 Ti", 11.5, 13.4, 53.8, 616),
        _card("RTX 3090", 25.3, 35.6, 71.2, 936, bf16=71.2),
        _card("RTX 4090", 25.3, 82.6, 165, 1008, bf16=165),
        _card("A10G", 23.7, 31.5, 70.0, 600, bf16=70.0),
        _card("V100 16GB", 16.9, 15.7, 125, 900),
        _card("V100 32GB", 34.1, 15.7, 125, 900),
        _card("A100 40GB", 42.3, 19.5, 312, 1555, bf16=312),
        _card("A100 80GB", 85.0, 19.5, 312, 2039, bf16=312),
        _card("H100", 85.0, 66.9, 989, 3350, bf16=989),
    ]
}

LINKS = {
    link.name: link
    for link in [
        Link("PCIe 3", 15.8e9, 1e-5),
        Link("PCIe 4", 31.5e9, 1e-5),
        Link("PCIe 5", 63.0e9, 1e-5),
        Link("NVLink V100", 150e9, 5e-6),
        Link("NVLink A100", 300e9, 5e-6),
        Link("NVLink H100", 450e9, 5e-6),
        Link("10 Gbit Ethernet", 1.25e9, 3e-5),
        Link("100 Gbit Ethernet", 12.5e9, 1.5e-5),
        Link("200 Gbit Ethernet", 25e9, 1.5e-5),
    ]
}
"""PCIe with 16 lanes; NVLink by the card it connects, all its lanes together."""

LOOPBACK = Link("loopback", 1e9, 1e-4, reached=1.0)
"""Processes of one machine through gloo."""
