"""Riemannian SGD on the class subspaces of Grassmann heads, as an ordinary optimiser."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.heads.grassmann import TOLERANCE
from ..kernels.subspace import MODES, grassmann_step_


class GrassmannSGD(torch.optim.Optimizer):
    """SGD with momentum along exact geodesics of the Grassmannian (arXiv 2308.01547, algorithm 1; `grassmann_step`).

    Every parameter is (K·k, n), its rows i·k … (i+1)·k − 1 the orthonormal basis of subspace i, and stays so.

    params: parameters or groups. Each parameter's k is its `subspace_dim` mark (as in `GrassmannHead.weight`), else the
    group's `subspace_dim`. lr ≥ 0. momentum in [0, 1). momentum_mode: what the momentum buffer carries, "official" the
    raw gradients as the official program does, "project" their horizontal part as the paper writes, "transport" that
    part in parallel transport. weight_decay must be 0: a decayed basis is not orthonormal. backend: of
    `grassmann_step`. Parameters are float32 or float64; use autocast for half precision.

    Raises ValueError or TypeError that names the setting or the parameter's shape, ValueError also for bases that are
    not orthonormal at the start.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        momentum_mode: str = "official",
        *,
        subspace_dim: int | None = None,
        weight_decay: float = 0.0,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_mode": momentum_mode,
            "subspace_dim": subspace_dim,
            "weight_decay": weight_decay,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Optimizer.add_param_group`, with the checks of this class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            for parameter in group["params"]:
                _check_parameter(parameter, _subspace_dim(parameter, group))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check(group)
            settings = (float(group["lr"]), float(group["momentum"]), group["momentum_mode"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise TypeError("GrassmannSGD takes dense gradients, got a sparse one")
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                k = _subspace_dim(parameter, group)
                buffer = state["momentum_buffer"]
                grassmann_step_(parameter, buffer, parameter.grad, k, *settings, backend=group["backend"])
        return loss


def _subspace_dim(parameter: Tensor, group: dict[str, Any]) -> int:
    k = getattr(parameter, "subspace_dim", group["subspace_dim"])
    if k is None:
        raise ValueError(
            f"the parameter {tuple(parameter.shape)} has no subspace_dim mark; give GrassmannSGD a subspace_dim"
        )
    return k


def _check(group: dict[str, Any]) -> None:
    if group["weight_decay"] != 0:
        raise ValueError(
            f"weight_decay must be 0 on a manifold parameter, whose rows stay unit vectors; got {group['weight_decay']}"
        )
    if not 0 <= float(group["lr"]) < math.inf:
        raise ValueError(f"lr must be finite and >= 0, got {group['lr']}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
    if group["momentum_mode"] not in MODES:
        raise ValueError(f"momentum_mode must be one of {MODES}, got {group['momentum_mode']!r}")


def _check_parameter(parameter: nn.Parameter, k: int) -> None:
    shape = tuple(parameter.shape)
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a manifold parameter must be float32 or float64 (use autocast), got {parameter.dtype} {shape}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"subspace_dim must be a positive integer, got {k!r}")
    if parameter.dim() != 2 or shape[0] % k or shape[1] < k:
        raise ValueError(f"a manifold parameter must be (K k, n) with n >= k = {k}, got {shape}")
    bases = parameter.detach().unflatten(0, (-1, k))
    error = (bases @ bases.mT - torch.eye(k, dtype=bases.dtype, device=bases.device)).abs().max()
    if not (parameter.is_meta or float(error) <= TOLERANCE):
        raise ValueError(
            f"a manifold parameter must hold orthonormal bases of subspace_dim = {k} rows each, got {shape} with "
            f"max |S^T S - I| = {float(error):.1e}"
        )
