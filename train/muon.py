"""Muon on sharded matrices: each is gathered for its orthogonalisation, which needs all of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Nesterov momentum, update scaled to AdamW's size) on matrices that are sharded as DTensor.

    Momentum stays sharded. Every process orthogonalises the gathered update, so the step is that of one process, bit
    for bit up to the last addition, where Newton–Schulz on shards would round in another order in bfloat16.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every matrix that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _step(self, parameter: DTensor, lr: float, weight_decay: float, momentum: float) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Any = state["momentum_buffer"]
        grad: Any = parameter.grad
        buffer.lerp_(grad, 1 - momentum)
        change = _orthogonalised(grad.lerp(buffer, momentum).full_tensor(), lr)
        mine = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - lr * weight_decay).add_(mine)


def _orthogonalised(update: Tensor, lr: float) -> Tensor:
    """What Muon adds to a weight for a whole update."""
    change = torch.zeros_like(update).requires_grad_()
    change.grad = update
    plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([change], lr=lr, adjust_lr_fn="match_rms_adamw", **plain).step()
    return change.detach()
