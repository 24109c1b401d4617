"""Causal Grassmann Plücker mixing (arXiv 2512.19428, §3.2)."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.plucker import checked_offsets, gated_blend, plucker_coordinates, plucker_mix
from ..checks import check_input, check_positive, is_plain, project
from ..init import reset_layers
from ..registry import register_slot
from .state import MixerState, home


class ReducedHistory(MixerState):
    """The last `span` reduced vectors z of every row, oldest first: (B, span, rank)."""

    def __init__(
        self, batch_size: int, span: int, rank: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(batch_size, device)
        self.z = torch.zeros(batch_size, span, rank, device=device, dtype=dtype)

    def check_reach(self, x: Tensor, offsets: Sequence[int], lengths: Tensor | None) -> None:
        """As `check`; ValueError, too, unless the history reaches back to all offsets."""
        self.check(x, lengths)
        if max(offsets) > self.z.shape[1]:
            raise ValueError(f"offsets must be at most {self.z.shape[1]}, the span of the state, got {tuple(offsets)}")

    def extend(self, z: Tensor, lengths: Tensor | None) -> Tensor:
        """Append a chunk z (B, T, rank), keep the last `span` valid vectors, and return history and chunk together."""
        length, span = z.shape[1], self.z.shape[1]
        window = torch.cat([self.z.to(z.dtype), z], dim=1)
        if lengths is None:
            kept = window[:, length:]
        else:
            index = lengths[:, None] + torch.arange(span, device=z.device)
            kept = window.gather(1, index[..., None].expand(-1, -1, z.shape[2]))
        self.z = kept.to(self.z.dtype)
        return window

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        # Out of every row's reach, but a masked NaN would still poison 0 * NaN.
        self.z = torch.zeros_like(self.z)


@register_slot("mixer", "grassmann")
class CausalGrassmannMixer(nn.Module):
    """Causal Grassmann Plücker mixing of x (B, T, dim) → (B, T, dim).

        z_t   = W_red x_t + b                                        reduce, (B, T, rank)
        g_t   = mean over Δ ≤ t of W_plu p̂(z_t, z_{t−Δ}) + b_plu      normalised Plücker coordinates; 0 where no Δ ≤ t
        g_t   = W_out g_t + b_out                                    only with out_proj
        α_t   = σ(W_gate [x_t; g_t] + b_gate)
        out_t = α_t ⊙ x_t + (1 − α_t) ⊙ g_t

    Source: arXiv 2512.19428, section 3.2. Its formula pairs t with t + Δ, which shows position t its own target; this
    layer pairs t with t − Δ. The paper's text has no W_out, but its parameter counts do.

    rank: r ≥ 2; K = r(r−1)/2 coordinates, the columns of `plucker.weight` (dim, K) in the order (0,1), (0,2), ….
    offsets: the Δs, positive integers, any iterable of them. A model also takes one entry a layer, such as
    `((1,), (2,), (4,))`, of which layer i has entry i modulo their number. eps: lower bound of ‖p‖. backend: of the
    kernels; None chooses by device; the mixer can be differentiated twice with "reference" alone. ValueError names a
    bad argument.
    """

    carries_input = True
    layer_options = ("offsets",)

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 32,
        offsets: Iterable[int] = (1, 2, 4, 8, 12, 16),
        out_proj: bool = True,
        eps: float = 1e-6,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(dim=dim)
        if not isinstance(rank, int) or rank < 2:
            raise ValueError(f"rank must be an integer of at least 2, got {rank!r}")
        if not (isinstance(eps, Real) and 0 < eps < math.inf):
            raise ValueError(f"eps must be positive and finite, got {eps!r}")
        self.dim, self.rank, self.offsets, self.eps, self.backend = dim, rank, checked_offsets(offsets), eps, backend
        self.reduce = nn.Linear(dim, rank, **dd)
        self.plucker = nn.Linear(rank * (rank - 1) // 2, dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd) if out_proj else None
        self.gate = nn.Linear(2 * dim, dim, **dd)
        self.reset_parameters()

    reset_parameters = reset_layers

    def forward(
        self,
        x: Tensor,
        state: ReducedHistory | None = None,
        lengths: Tensor | None = None,
        offsets: Iterable[int] | None = None,
    ) -> Tensor:
        """Mix (B, T, dim); with a state, continue the sequences it has seen (see `grassland.archs.mixers`)."""
        check_input(x, self.dim, self.reduce, sequence=True)
        offsets = self.offsets if offsets is None else checked_offsets(offsets)
        z = project(self.reduce, x)
        g = self._mix(z, offsets) if state is None else self._continue(z, state, lengths, offsets)
        if self.out_proj is not None:
            g = project(self.out_proj, g)
        return blended(x, g, self.gate, self.backend)

    def _mix(self, z: Tensor, offsets: Sequence[int], context: int = 0) -> Tensor:
        if is_plain(self.plucker):
            weight, bias = self.plucker.weight, self.plucker.bias
            settings: Any = {"eps": self.eps, "context": context, "backend": self.backend}
            return plucker_mix(z, weight, bias, offsets=offsets, **settings)
        positions = torch.arange(z.shape[1], device=z.device)[None]
        return self._project(z, F.pad(z, (0, 0, max(offsets), 0)), positions, offsets)

    def _continue(self, z: Tensor, state: ReducedHistory, lengths: Tensor | None, offsets: Sequence[int]) -> Tensor:
        state.check_reach(z, offsets, lengths)
        length, seen, fresh, least = z.shape[1], state.seen, state.fresh, state.least
        window = state.extend(z, lengths)
        state.advance(length, lengths)
        if fresh:
            return self._mix(z, offsets)
        if least >= max(offsets) and is_plain(self.plucker):
            return self._mix(window, offsets, context=window.shape[1] - length)
        positions = seen[:, None] + torch.arange(length, device=z.device)
        return self._project(z, window, positions, offsets)

    def _project(self, z: Tensor, window: Tensor, positions: Tensor, offsets: Sequence[int]) -> Tensor:
        """g (B, T, dim) of z (B, T, rank) at `positions`; window (B, ≥ max Δ + T, rank): what came before, and z."""
        length = z.shape[1]
        first = window.shape[1] - length
        past = torch.stack([window[:, first - delta : first - delta + length] for delta in offsets], dim=2)
        valid = positions[..., None] >= torch.tensor(offsets, device=z.device)
        coordinates = mean_coordinates(z, past, valid, self.eps).to(z.dtype)
        return project(self.plucker, coordinates) * valid.any(-1, keepdim=True)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offsets: Iterable[int] | None = None,
    ) -> ReducedHistory:
        """An empty history of max Δ reduced vectors a row; its size does not depend on `max_len`."""
        span = max(self.offsets if offsets is None else checked_offsets(offsets))
        own_device, own_dtype = home(self)
        return ReducedHistory(batch_size, span, self.rank, device or own_device, dtype or own_dtype)

    def flops_per_token(self, seq_len: int, offsets: Iterable[int] | None = None) -> int:
        """Forward FLOPs a token of the collapsed form: the projections, one wedge, and 8·rank for each offset."""
        deltas = self.offsets if offsets is None else offsets
        matrices = [self.reduce, self.plucker, self.gate, *([] if self.out_proj is None else [self.out_proj])]
        pairs = 3 * self.plucker.in_features + 8 * self.rank * sum(delta < seq_len for delta in deltas)
        return 2 * sum(matrix.weight.numel() for matrix in matrices) + pairs

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}, offsets={self.offsets}"


def blended(x: Tensor, g: Tensor, gate: Any, backend: str | None) -> Tensor:
    """α ⊙ x + (1 − α) ⊙ g with α = σ(gate([x; g])), in the dtype of x (…, dim)."""
    if is_plain(gate):
        return gated_blend(x, g, gate.weight, gate.bias, backend=backend)
    alpha = torch.sigmoid(gate(torch.cat([x, g], dim=-1)))
    return (alpha * x + (1 - alpha) * g).to(x.dtype)


def mean_coordinates(z: Tensor, past: Tensor, valid: Tensor, eps: float) -> Tensor:
    """Mean of the normalised Plücker coordinates of z (…, r) with each valid past vector (…, m, r): (…, K).

    valid: (…, m) bool, or int for how often a vector counts.

    All pairs share z, so the mean of wedges is one wedge z ∧ y. The part δ of a past vector that is orthogonal to z
    spans the same wedge and has ‖z ∧ δ‖ = ‖z‖‖δ‖ without the cancellation of the direct form.
    """
    z, past = (t if t.dtype is torch.float64 else t.float() for t in (z, past))
    # Clamped before the root too, whose derivative at zero is infinite.
    square = z.square().sum(-1, keepdim=True)[..., None].clamp_min(torch.finfo(z.dtype).tiny)
    along = (past * z[..., None, :]).sum(-1, keepdim=True) / square
    delta = past - along * z[..., None, :]
    norm = square.sqrt() * delta.norm(dim=-1, keepdim=True)
    weight = valid.to(z.dtype) / valid.sum(-1, keepdim=True).clamp_min(1)
    y = (delta * (weight[..., None] / norm.clamp_min(eps))).sum(-2)
    return plucker_coordinates(z, y)
