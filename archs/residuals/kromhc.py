"""KromHC: the residual mixing is a Kronecker product of small doubly stochastic matrices (arXiv 2601.21579)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.kronecker import kronecker_factors, kronecker_matrix, kronecker_pre, kronecker_projection, reference
from ...kernels.launch import without_autocast
from ..checks import check_positive
from ..registry import register_slot
from .hyper import Opened, check_joins, wide
from .manifold import CLOSED, Manifold
from .streams import StreamState


@register_slot("residual", "kromhc")
class KromHC(Manifold):
    """KromHC, arXiv 2601.21579: H_res = U^1 (x) … (x) U^K, doubly stochastic exactly.

    U^k = sum_m softmax(alpha_res x' W^k + b^k)_m P_m over the permutations P_m of factor k's size.

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
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(keep_streams=keep_streams)
        if factors is not None and not isinstance(factors, Sequence):
            raise ValueError(f"factors must be a sequence of 2, 3 or 4, or None, got {factors!r}")
        self.factors = kronecker_factors(num_streams, factors)
        self.keep_streams = keep_streams
        super().__init__(
            branch, dim, layer_index, num_streams=num_streams, init=init, dynamic=dynamic, expand=expand, reduce=reduce,
            disable=disable, transposed=transposed, norm=norm, norm_eps=norm_eps, dropout=dropout,
            num_layers=num_layers, device=device, dtype=dtype,
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
        """weight (2n + S', n dim) and bias (2n + S',) of the kernels."""
        statics = self.static_alpha, self.static_beta
        if not self.dynamic:
            bias = reference.bias(*(t.to(dtype) for t in statics), factors=self.factors, transposed=self.transposed)
            return bias.new_zeros(len(bias), self.num_streams * self.dim), bias
        weights = (
            self.dynamic_alpha_fn, self.dynamic_beta_fn, self.norm.gamma, self.pre_branch_scale, self.h_post_scale,
            self.residual_scale, *statics,
        )  # fmt: skip
        if any(t.dtype != dtype for t in weights):
            weights = [t.to(dtype) for t in weights]
        return kronecker_projection(*weights, factors=self.factors, transposed=self.transposed)

    def coefficients(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """h_pre (…, n), h_post (…, n) and H_res (…, n, n), the one that is applied, for streams x (…, n, dim)."""
        n = self.num_streams
        weight, bias = self.projection(wide(x).dtype)
        _, h = kronecker_pre(torch.clone(x), weight, bias, factors=self.factors)
        return h[..., :n], h[..., n : 2 * n], kronecker_matrix(h, n, factors=self.factors)

    def check(self, x: Any) -> None:
        super().check(x)
        if isinstance(x, StreamState):
            x.check_graph()

    def open(self, x: Any) -> Opened:
        if self.disabled:
            return super().open(x)
        self.check(x)
        given = isinstance(x, StreamState)
        state = x if given else StreamState(x, self.factors)
        full = torch.float64 if state.dtype == torch.float64 else torch.float32
        with without_autocast(state.device.type):
            settled, u, h = state.read(*self.projection(full))

        def join(y: Tensor) -> Any:
            check_joins(y, u)
            following = settled.add(y.to(u.dtype) if y.dtype != u.dtype else y, h)
            return following if given else following.tensor()

        return u, join

    def expand(self, x: Tensor) -> Any:
        """(…, dim) to the state of n streams, which behaves as the tensor (…, n, dim)."""
        streams = super().expand(x)
        return streams if self.disabled else StreamState(streams.contiguous(), self.factors, self.keep_streams)
