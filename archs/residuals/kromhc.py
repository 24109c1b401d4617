"""KromHC: the residual mixing is a Kronecker product of small doubly stochastic matrices (arXiv 2601.21579)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.kronecker import kronecker_factors, kronecker_matrix, kronecker_pre
from ..registry import register_slot
from .hyper import Opened, wide
from .manifold import CLOSED, Manifold
from .streams import StreamState


@register_slot("residual", "kromhc")
class KromHC(Manifold):
    """H_res = U^1 (x) … (x) U^K with U^k = sum_m softmax(alpha_res x' W^k + b^k)_m P_m, doubly stochastic exactly.

    The streams run through `grassland.kernels.kronecker`. `expand` gives a `StreamState`, and a sublayer that is given
    one leaves its addition to the next sublayer, so that one kernel does both. Given a tensor, it returns a tensor.

    Args:
        factors: of n, each 2, 3 or 4; None for 2s and 3s.
        keep_streams: how many sublayers apart the streams are stored for the backward; the others are computed again
            from the branches' outputs. 1 stores all; more need `expand`'s state and do nothing under torch.compile.
        The rest: as in `Hyper`.
    """

    def __init__(
        self,
        branch: Callable[..., Any] | None,
        dim: int,
        layer_index: int = 0,
        *,
        num_streams: int = 4,
        factors: Sequence[int] | None = None,
        keep_streams: int = 1,
        init: str = "paper",
        dynamic: bool = True,
        expand: str = "repeat",
        reduce: str | None = None,
        disable: bool = False,
        transposed: bool = False,
        norm: str | None = None,
        dropout: float = 0.0,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(keep_streams, bool) or not isinstance(keep_streams, int) or keep_streams < 1:
            raise ValueError(f"keep_streams must be a positive integer, got {keep_streams!r}")
        self.factors = kronecker_factors(num_streams, factors)
        self.keep_streams = keep_streams
        super().__init__(
            branch, dim, layer_index, num_streams=num_streams, init=init, dynamic=dynamic, expand=expand, reduce=reduce,
            disable=disable, transposed=transposed, norm=norm, dropout=dropout, num_layers=num_layers, device=device,
            dtype=dtype,
        )  # fmt: skip

    def mixing_flops(self) -> int:
        return 2 * sum(self.factors) * self.num_streams * self.dim

    def mixing_logits(self) -> int:
        return sum(map(math.factorial, self.factors))

    def first_mixing(self) -> Tensor:
        start = [torch.full((math.factorial(size),), CLOSED, dtype=torch.float64) for size in self.factors]
        for group in start:
            group[0] = 0
        return torch.cat(start)

    def projection(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """weight (2n + S', n dim) and bias (2n + S',) of the kernels: gamma, the alphas and sqrt(n dim) in one matrix,
        and for each 2×2 factor the difference of its two columns."""
        n = self.num_streams
        pre, mixing = self.static_alpha.to(dtype).split([n, self.mixing_logits()])
        bias = torch.cat([pre, self.static_beta.to(dtype), self._differences(mixing)])
        if not self.dynamic:
            return bias.new_zeros(bias.shape[0], n * self.dim), bias
        pre, mixing = self.dynamic_alpha_fn.to(dtype).split([n, self.mixing_logits()], -1)
        columns = [
            pre * self.pre_branch_scale.to(dtype),
            self.dynamic_beta_fn.to(dtype) * self.h_post_scale.to(dtype),
            self._differences(mixing) * self.residual_scale.to(dtype),
        ]
        scale = math.sqrt(n * self.dim) * (1 + self.norm.gamma.to(dtype))
        return (torch.cat(columns, -1) * scale[:, None]).T.contiguous(), bias

    def _differences(self, logits: Tensor) -> Tensor:
        """(…, S) to the kernels' columns (…, S'); transposed, a permutation's column goes to its inverse."""
        groups = []
        for size, group in zip(self.factors, logits.split([math.factorial(i) for i in self.factors], -1), strict=True):
            if size == 2:
                groups.append(group[..., 1:] - group[..., :1])
            else:
                groups.append(group[..., inverses(size)] if self.transposed else group)
        return torch.cat(groups, -1)

    def coefficients(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """h_pre (…, n), h_post (…, n) and H_res (…, n, n), the one that is applied, for streams x (…, n, dim)."""
        n = self.num_streams
        weight, bias = self.projection(wide(x).dtype)
        _, h = kronecker_pre(torch.clone(x), weight, bias, factors=self.factors)
        return h[..., :n], h[..., n : 2 * n], kronecker_matrix(h, n, factors=self.factors)

    def open(self, x: Any) -> Opened:
        if self.disabled:
            return super().open(x)
        self.check(x)
        given = isinstance(x, StreamState)
        state = x if given else StreamState(x, self.factors)
        full = torch.float64 if state.dtype == torch.float64 else torch.float32
        with torch.autocast(state.device.type, enabled=False):
            settled, u, h = state.read(*self.projection(full))

        def join(y: Tensor) -> Any:
            following = settled.add(y.to(u.dtype) if y.dtype != u.dtype else y, h)
            return following if given else following.tensor()

        return u, join

    def expand(self, x: Tensor) -> Any:
        """(…, dim) to the state of n streams, which behaves as the tensor (…, n, dim)."""
        streams = super().expand(x)
        return streams if self.disabled else StreamState(streams.contiguous(), self.factors, self.keep_streams)


def inverses(size: int) -> list[int]:
    """Index of each permutation's inverse, in lexicographic order."""
    orders = list(itertools.permutations(range(size)))
    return [orders.index(tuple(sorted(range(size), key=order.__getitem__))) for order in orders]
