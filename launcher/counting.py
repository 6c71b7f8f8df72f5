"""Bytes, arithmetic and gathers of a pass through a module on the device `meta`."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KEPT_WHOLE = 100_000
"""Elements up to which ZeRO 3 leaves a weight whole on every rank."""


@dataclass(frozen=True)
class Pass:
    """One micro batch, forward and, where it is trained, backward."""

    flops: float
    streamed: float
    """Bytes read and written by operations that multiply no matrices."""
    operations: int
    """Kernels started."""
    activations: int
    """Bytes alive at most beside weights and their gradients."""
    with_gradients: int
    """Bytes alive at most beside weights, the gradients that are whole by then among them; there
    were none before this pass."""
    logits: int
    """Bytes of `activations`, at that moment, that are as wide as the vocabulary."""
    activations_gathered: int
    """`activations` with the weight that is being multiplied, at the worst moment of both."""
    gathered: int
    """Elements of the weights too large to be `KEPT_WHOLE`, counted each time they are used."""
    gathers: int
    """How often one is used."""


def count(
    module: nn.Module,
    work: Callable[[], Any],
    *,
    sharded: bool = False,
    vocabulary: int = -1,
    fused: bool = True,
) -> Pass:
    """Run `work`, whose weights are those of `module` on `meta`, and count.

    Args:
        sharded: with the linear layers that DeepSpeed puts in place under ZeRO 3.
        vocabulary: last dimension of what counts as logits.
        fused: whether attention's dropout stays in a fused kernel, as on GPUs and not on CPUs.
    """
    counter = _Counter(module, vocabulary)
    # A gradient leaves as soon as it is whole: where it is kept is the planner's question.
    hooks = [
        p.register_post_accumulate_grad_hook(counter.take)
        for p in module.parameters()
        if p.requires_grad
    ]
    try:
        with counter, _kernels(counter, sharded=sharded, fused=fused):
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(
        counter.flops,
        counter.streamed,
        counter.operations,
        counter.peak,
        counter.peak_with_gradients,
        counter.logits_at_peak,
        counter.peak_gathered,
        counter.gathered,
        counter.gathers,
    )


class _Counter(TorchDispatchMode):
    """Follows the storages of all tensors on `meta` that operations make."""

    def __init__(self, module: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata: p.numel() for p in module.parameters()}
        self.buffers = {b.untyped_storage()._cdata for b in module.buffers()}
        self.vocabulary = vocabulary
        self.alive: dict[int, tuple[Any, int, bool]] = {}
        self.live = self.logits = self.peak = self.logits_at_peak = self.peak_gathered = 0
        self.gradients = self.peak_with_gradients = 0
        self.flops = self.streamed = 0.0
        self.operations = self.gathered = self.gathers = 0
        self.forward = False
        """Whether a linear layer's own forward pass runs."""
        self.held: dict[int, int] = {}
        """Bytes of the weights that a second forward pass has gathered, by storage. DeepSpeed
        releases them after the backward pass of the layer for which it was run."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._overloadpacket not in _FLOPS:
            # Without autograd, in inference mode, an operation comes whole that is made of others.
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        asked = function is torch.ops.aten._local_scalar_dense.default and args[0]
        if asked is not False and asked.is_meta and asked.dtype is torch.bool:
            # transformers asks whether a mask hides nothing; a batch without padding has no mask.
            return False
        result = function(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_meta]
        for tensor in made:
            self._follow(tensor)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
        packet = function._overloadpacket
        flops = _FLOPS.get(packet)
        self.operations += not function.is_view
        if flops:
            self.flops += flops(*args, **kwargs, out_val=result)
        if flops or packet is torch.ops.aten.embedding:
            for tensor in given:
                self._use(tensor)
        elif not function.is_view:
            moved = [t for t in (*given, *made) if t.untyped_storage()._cdata not in self.weights]
            self.streamed += sum(t.numel() * t.element_size() for t in moved)
        if self.live > self.peak:
            self.peak, self.logits_at_peak = self.live, self.logits
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)
        return result

    def take(self, parameter: Tensor) -> None:
        """Remove a gradient that is whole."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes
        parameter.grad = None

    def _use(self, tensor: Tensor) -> None:
        """Gather `tensor` if it is a large weight, and release what is not needed any more."""
        key = tensor.untyped_storage()._cdata
        size = self.weights.get(key, 0)
        if size <= KEPT_WHOLE:
            return
        if key not in self.held:
            self.gathered, self.gathers = self.gathered + size, self.gathers + 1
        held = self.held | {key: size * tensor.element_size()}
        self.peak_gathered = max(self.peak_gathered, self.live + sum(held.values()))
        again = self.forward and torch._C._current_graph_task_id() != -1
        self.held = held if again else {}

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.weights or key in self.buffers or key in self.alive:
            return
        logits = tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
        self.alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size, logits
        self.live, self.logits = self.live + size, self.logits + logits * size
        self.peak_gathered = max(self.peak_gathered, self.live + sum(self.held.values()))

    def _forget(self, key: int) -> None:
        _, size, logits = self.alive.pop(key)
        self.live, self.logits = self.live - size, self.logits - logits * size


@contextmanager
def _kernels(counter: _Counter, *, sharded: bool, fused: bool) -> Iterator[None]:
    """The kernels that real devices would choose, where `meta` chooses others.

    Patched, not by a mode, so that activation checkpointing's second pass has them, too.
    """
    layer: Any = functional.linear
    if sharded:
        from deepspeed.runtime.zero import linear as of_zero_3

        layer = of_zero_3.zero3_linear_wrap

    def linear(*args: Any, **options: Any) -> Tensor:
        counter.forward = True
        try:
            result: Tensor = layer(*args, **options)
        finally:
            counter.forward = False
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "linear", linear))
        plain = functional.scaled_dot_product_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            dropout = options.get("dropout_p", 0.0)
            if (dropout and not fused) or options.get("enable_gqa"):
                return plain(query, key, value, **options)
            options = {k: options.get(k) for k in ("attn_mask", "scale")} | {
                "is_causal": options.get("is_causal", False)
            }
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, **options
            )[0]

        patched = mock.patch.object(functional, "scaled_dot_product_attention", attend)
        stack.enter_context(patched)
        yield


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    rows, heads, tokens, size = query.shape
    return 2 * rows * heads * tokens * key.shape[2] * (size + value.shape[3])


def _attention_backward_flops(gradient: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any,
                              **__: Any) -> float:  # fmt: skip
    return 2.5 * _attention_flops(query, key, value)


_FLOPS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
