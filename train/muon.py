"""Muon where torch's own does not serve: on sharded matrices, and on processors that do not multiply bfloat16."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..kernels.products import multiplies_halves


def muon(matrices: list[nn.Parameter], **settings: Any) -> torch.optim.Muon:
    """`torch.optim.Muon`, or `Muon` where it is needed."""
    special = any(isinstance(matrix, DTensor) for matrix in matrices)
    special = special or (any(matrix.device.type == "cpu" for matrix in matrices) and not multiplies_halves())
    return (Muon if special else torch.optim.Muon)(matrices, **settings)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` on matrices that may be sharded as DTensor, with the state and the settings of that.

    Momentum stays sharded. Every process orthogonalises the gathered update, so the step is that of one process up to
    the rounding of its last addition, where Newton–Schulz on shards would round in another order in bfloat16.

    torch orthogonalises in bfloat16, whose products are up to a hundred times slower than those of float32 on a
    processor without AVX512_BF16: there this one does it in float32.
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

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Any = state["momentum_buffer"]
        grad: Any = parameter.grad
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        change = _change(update.full_tensor() if isinstance(update, DTensor) else update, group)
        if isinstance(parameter, DTensor):
            change = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change)


def _change(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a weight for a whole update."""
    if update.device.type == "cpu" and not multiplies_halves():
        found = orthogonalised(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
        return (found * (-group["lr"] * _scale(update.shape, group["adjust_lr_fn"]))).to(update.dtype)
    change = torch.zeros_like(update).requires_grad_()
    change.grad = update
    same = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()
    return change.detach()


def _scale(shape: torch.Size, rule: str | None) -> float:
    """What torch multiplies the rate with: "match_rms_adamw", or "original" where nothing is said."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz: X <- a X + (b X Xᵀ + c (X Xᵀ)²) X, from the matrix over its norm, in its dtype."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
