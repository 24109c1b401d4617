"""One gradient buffer for each stacked weight, however many calls of moe_ffn share it.

All calls between a weight and its next backward use the same alias of it, the output of `_Alias`. In the backward each
call adds its gradient of the weight, with beta = 1, to one float32 buffer and hands autograd nothing; `_Alias` runs
once all of its users have, as autograd's order demands, and returns the buffer. One call alone has nothing to add, and
writes in the weight's dtype. What stands before the weight (hooks, accumulation, DDP) sees one complete gradient a
backward, as ever.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..dispatch import batched
from . import eager, op


class SharedWeight:
    """A weight as the calls up to its next backward see it, cast to the dtype of their products.

    It lives as long as a call's graph does: those hold it, and `_open` finds it for the next call.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.version = weight, dtype, weight._version
        # Setting `weight.data` leaves the version as it is. The old data stay, so that no new ones take their address.
        self.data = weight.detach()
        self.sums = _Sums(weight, dtype)
        self.alias: Tensor = _Alias.apply(weight, dtype, self.sums)

    def serves(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether another call may share: the weight is unchanged, and no backward has come to it yet."""
        same = self.weight is weight and self.dtype == dtype and self.version == weight._version
        return same and self.data.data_ptr() == weight.data_ptr() and not self.sums.used

    def total(self) -> tuple[Tensor | None, bool]:
        """The buffer for this backward and whether it holds a sum; None in one that stops short of the weight."""
        node: Any = self.alias.grad_fn
        if not torch._C._will_engine_execute_node(node):
            return None, False
        return self.sums.total(torch._C._current_graph_task_id())


class _Sums:
    """Buffers by backward: one may run inside another, and one that fails must leave nothing to the next."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.device = weight.shape, weight.device
        self.wide = torch.promote_types(dtype, torch.float32)
        self.narrow = dtype if weight.dtype == dtype else self.wide
        self.totals: dict[int, Tensor] = {}
        self.calls = 0
        self.used = False

    def total(self, backward: int) -> tuple[Tensor, bool]:
        filled = backward in self.totals
        if not filled:
            dtype = self.narrow if self.calls == 1 else self.wide
            self.totals[backward] = torch.empty(self.shape, dtype=dtype, device=self.device)
        return self.totals[backward], filled

    def take(self, backward: int) -> Tensor | None:
        self.used = True
        return self.totals.pop(backward, None)


class _Alias(torch.autograd.Function):
    """The weight; backward, the sum that the calls have left and what autograd itself brings."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, sums: _Sums) -> Tensor:
        ctx.sums, ctx.dtype = sums, weight.dtype
        ctx.set_materialize_grads(False)
        # Not a view to autograd: the base of one may not change, even after the graph's last use of it.
        return weight.detach() if weight.dtype == dtype else weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        total = ctx.sums.take(torch._C._current_graph_task_id())
        if total is None:
            total = grad
        elif grad is not None:
            total = total + grad
        return None if total is None else total.to(ctx.dtype), None, None


class _Call(torch.autograd.Function):
    """`op.moe_ffn` on aliases of the shared weights; None for one that is not shared."""

    @staticmethod
    def forward(ctx: Any, up: SharedWeight | None, down: SharedWeight | None, *inputs: Any) -> op.Parts:
        output = op.moe_ffn(*inputs)
        ctx.shared = up, down
        op.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 16
        # The opaque op writes into totals, which a vectorised Jacobian cannot have many of.
        if torch.is_grad_enabled() or batched(grad):
            return None, None, *_by_autograd(ctx, grad, torch.is_grad_enabled())
        if torch._C._current_graph_task_id() < 0 or not any(ctx.shared):
            return None, None, *op.plain_backward(ctx, grad, ctx.needs_input_grad[2:])
        (up, up_filled), (down, down_filled) = (s.total() if s else (None, False) for s in ctx.shared)
        accumulate = up_filled or down_filled
        for total, filled in ((up, up_filled), (down, down_filled)):
            if total is not None and accumulate and not filled:
                total.zero_()
        dx, dgates, db_up, db_down = op.backward(ctx, grad, up, down, accumulate)
        return None, None, dx, dgates, None, None, None, None, db_up, None, db_down, *(None,) * 5


def _by_autograd(ctx: Any, grad: Tensor, create_graph: bool) -> tuple:
    """The gradients that autograd finds for the eager form; with `create_graph`, functions of the inputs."""
    *saved, _, _, seed = ctx.saved_tensors
    with torch.enable_grad():
        # Views, so that the gradient of a weight does not come by x too, which may depend on it.
        inputs: Any = [t.view_as(t) for t in saved]
        arguments: Any = (*inputs, ctx.dropout, seed, ctx.gelu_out)
        y = eager.moe_ffn(*arguments)[0]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return *(next(found) if t.requires_grad else None for t in inputs), *(None,) * 5


_open: weakref.WeakValueDictionary[int, SharedWeight] = weakref.WeakValueDictionary()


def shared(weight: Tensor, dtype: torch.dtype) -> SharedWeight | None:
    """What the calls with this weight share until the next backward; None for a frozen weight and in torch.func."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if not weight.requires_grad or functorch.maybe_current_level() is not None:
        return None
    found = _open.get(id(weight))
    if found is None or not found.serves(weight, dtype):
        found = _open[id(weight)] = SharedWeight(weight, dtype)
    found.sums.calls += 1
    return found


def moe_ffn(
    x: Tensor, gates: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, w_up: Tensor, b_up: Tensor,
    w_down: Tensor, b_down: Tensor, dropout: float, seed: Tensor | None, gelu_out: bool, backend: str,
) -> Tensor:  # fmt: skip
    """`op.moe_ffn` with gradients; those of the weights, which may have another dtype than x, are summed here."""
    both = shared(w_up, x.dtype), shared(w_down, x.dtype)
    w_up, w_down = (s.alias if s else w.to(x.dtype) for s, w in zip(both, (w_up, w_down), strict=True))
    arguments = (x, gates, slots, order, offsets, w_up, b_up, w_down, b_down)
    return _Call.apply(*both, *arguments, dropout, seed, gelu_out, True, backend)[0]
