"""How much arithmetic training needs, and how much of it the machine can do."""

import math
import time

import torch

from launcher.distributed import World, max_over_ranks, sum_over_ranks

_SMALLEST, _LARGEST = 128, 4096  # rows of the matrices
_LONG_ENOUGH_S = 0.005
_REPETITION_S, _REPETITIONS_S = 0.05, 0.3
_Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # two factors and their product


def peak_flops_per_s(world: World, dtype: torch.dtype) -> float:
    """FLOP/s that all ranks together reach in products of large square matrices of `dtype`.

    Measured in under a second on every rank's device, at the same time and with this process's
    threads and settings; each rank counts its best repetition. The same number on every rank, and
    all ranks call it together. It is what dense products reach here and now, which other work on
    the machine lowers; it is not the vendor's figure, which is higher.
    """
    matrices = _matrices(_SMALLEST, world.device, dtype)
    while (product_s := _product_s(matrices)) < _LONG_ENOUGH_S and len(matrices[0]) < _LARGEST:
        matrices = _matrices(2 * len(matrices[0]), world.device, dtype)
    size, products = len(matrices[0]), math.ceil(_REPETITION_S / product_s)
    # A barrier: ranks that share a machine must not find it idle.
    max_over_ranks(world, 0)
    end, best_s = time.perf_counter() + _REPETITIONS_S, math.inf
    while time.perf_counter() < end:
        best_s = min(best_s, _seconds(matrices, products))
    return sum_over_ranks(world, 2 * size**3 * products / best_s)


def transformer_flops(*, weights: int, tokens: int, trained: bool) -> float:
    """FLOPs of forward and backward through `weights` multiplied weights for `tokens` tokens.

    Per weight and token 2 forward, 2 for the gradient of the inputs and, where the weights are
    trained, 2 for their own; a frozen weight still passes the gradient on. Attention's own
    products, of queries with keys and of shares with values, are left out, and so is what is
    computed twice under activation checkpointing. Source: Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models", section 2.1.
    """
    return float((6 if trained else 4) * weights * tokens)


def _matrices(size: int, device: torch.device, dtype: torch.dtype) -> _Matrices:
    """Their product has been computed once."""
    # Its own generator leaves the run's random state alone. Not zeros: they cost a GPU less power,
    # so that it runs faster than on real weights.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    product = torch.empty_like(left)
    # The first product of a size also sets up kernels.
    _seconds((left, right, product), 1)
    return left, right, product


def _product_s(matrices: _Matrices) -> float:
    """Time of one product: of three, because another process may have the core during one."""
    return min(_seconds(matrices, 1) for _ in range(3))


def _seconds(matrices: _Matrices, products: int) -> float:
    """Time of so many products."""
    left, right, product = matrices
    _wait_for(left.device)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(left, right, out=product)
    _wait_for(left.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
