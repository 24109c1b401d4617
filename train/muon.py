"""Muon on sharded matrices: each is gathered for its orthogonalisation, which needs all of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` on matrices that are sharded as DTensor, with the state and the settings of that.

    Momentum stays sharded. Every process orthogonalises the gathered update, so the step is that of one process up to
    the rounding of its last addition, where Newton–Schulz on shards would round in another order in bfloat16.
    """

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
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: DTensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Any = state["momentum_buffer"]
        grad: Any = parameter.grad
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        change = _orthogonalised(update.full_tensor(), group)
        mine = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(mine)


def _orthogonalised(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a weight for a whole update."""
    change = torch.zeros_like(update).requires_grad_()
    change.grad = update
    same = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()
    return change.detach()
