"""Controls for Grassmann mixing: something plainer where the wedge is, all else and the number of parameters equal.

Each keeps the Grassmann mixer's frame,

    g_t = pairing of x_t with the tokens at t − Δ, then W_out g_t + b_out with out_proj
    α_t = σ(W_gate [x_t; g_t] + b_gate),   out_t = α_t ⊙ x_t + (1 − α_t) ⊙ g_t,

and has an inner width that brings its pairing as near as whole units get to the r(d + 1) + (K + 1)d parameters of
reduction and Plücker projection, K = r(r − 1)/2. `width` overrules that.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.plucker import checked_offsets
from ..checks import check_input, check_positive, project
from ..init import init_weights, reset_layers
from ..registry import register_slot
from .grassmann import ReducedHistory, blended
from .state import home


class Control(nn.Module, ABC):
    """The frame: x (B, T, dim) → (B, T, dim), causal.

    rank: r of the Grassmann mixer that this one stands beside. offsets: the Δs, positive integers; a model also takes
    one entry a layer. width: inner width, None for the one of equal parameters. backend: of the gate's kernel.
    ValueError names a bad argument.
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
        width: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        for name, value, least in (("rank", rank, 2), ("width", width, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.rank, self.offsets, self.backend = dim, rank, checked_offsets(offsets), backend
        self.width = self.matched_width() if width is None else width
        self.build(dd)
        self.out_proj = nn.Linear(dim, dim, **dd) if out_proj else None
        self.gate = nn.Linear(2 * dim, dim, **dd)
        self.reset_parameters()

    reset_parameters = reset_layers

    @abstractmethod
    def build(self, dd: dict[str, Any]) -> None:
        """Make the pairing's own parameters."""

    @abstractmethod
    def parameters_of(self, width: int) -> int:
        """How many parameters the pairing has at that width."""

    @abstractmethod
    def reduced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the pairing takes of a token itself, and what later tokens take of it: (B, T, ·) each."""

    @abstractmethod
    def pair(self, own: Tensor, window: Tensor, positions: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """g (B, T, dim). window (B, span + T, ·): what is taken of the last `span` tokens, zeros where there are none,
        and of these. positions (B or 1, T)."""

    @property
    def unit(self) -> int:
        """What the width must be a multiple of."""
        return 1

    @property
    def kept(self) -> int:
        """Numbers that later tokens take of a token."""
        return self.width

    def matched_width(self) -> int:
        """The width whose parameters are nearest to those of a Grassmann mixer of this rank."""
        coordinates = self.rank * (self.rank - 1) // 2
        wanted = self.rank * (self.dim + 1) + (coordinates + 1) * self.dim
        least = self.parameters_of(0)
        return self.unit * max(1, round((wanted - least) / (self.parameters_of(self.unit) - least)))

    def forward(
        self,
        x: Tensor,
        state: ReducedHistory | None = None,
        lengths: Tensor | None = None,
        offsets: Iterable[int] | None = None,
    ) -> Tensor:
        """Mix (B, T, dim); with a state, continue the sequences it has seen (see `grassland.archs.mixers`)."""
        check_input(x, self.dim, self.gate, sequence=True)
        chosen, length = self.offsets if offsets is None else checked_offsets(offsets), x.shape[1]
        own, kept = self.reduced(x)
        if state is None:
            positions = torch.arange(length, device=x.device)[None]
            window = F.pad(kept, (0, 0, max(chosen), 0))
        else:
            state.check_reach(x, chosen, lengths)
            positions = state.positions(length)
            window = state.extend(kept, lengths)
            state.advance(length, lengths)
        g = self.pair(own, window, positions, chosen)
        if self.out_proj is not None:
            g = project(self.out_proj, g)
        return blended(x, g, self.gate, self.backend)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offsets: Iterable[int] | None = None,
    ) -> ReducedHistory:
        """An empty history of max Δ vectors a row; its size does not depend on `max_len`."""
        span = max(self.offsets if offsets is None else checked_offsets(offsets))
        own_device, own_dtype = home(self)
        return ReducedHistory(batch_size, span, self.kept, device or own_device, dtype or own_dtype)

    def flops_per_token(self, seq_len: int, offsets: Iterable[int] | None = None) -> int:
        """Forward FLOPs a token: the matrices, and what the pairing does for each offset below `seq_len`."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        deltas = self.offsets if offsets is None else offsets
        return 2 * matrices + self.pairing_flops([delta for delta in deltas if delta < seq_len])

    @abstractmethod
    def pairing_flops(self, deltas: Sequence[int]) -> int:
        """FLOPs a token apart from the matrices, for offsets that reach into the sequence."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}, offsets={self.offsets}, width={self.width}"


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    return reduce(torch.add, tensors)


def pasts(window: Tensor, length: int, offsets: Sequence[int]) -> list[Tensor]:
    """For each Δ, what the window has of the tokens Δ before the last `length`: (B, length, ·)."""
    first = window.shape[1] - length
    return [window[:, first - delta : first - delta + length] for delta in offsets]


def present(positions: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which pasts exist, (B or 1, T, m) bool, and max(1, their number), (B or 1, T, 1) int64."""
    valid = positions[..., None] >= torch.tensor(offsets, device=positions.device)
    return valid, valid.sum(-1, keepdim=True).clamp_min(1)


@register_slot("mixer", "convolution")
class CausalConvolution(Control):
    """g_t = W Σ_Δ c_Δ ⊙ u_{t−Δ} + b, u = W_red x + b_red of `width` channels: a depthwise convolution whose taps are
    the offsets, without any product of tokens. Taps start as 1/m.

    Blocks that share one such mixer must have as many offsets each (ValueError).
    """

    # A depthwise convolution's weight, whose rows no product of matrices mixes.
    optim_groups: ClassVar[dict[str, str]] = {"taps": "decay"}

    def build(self, dd: dict[str, Any]) -> None:
        self.reduce = nn.Linear(self.dim, self.width, **dd)
        self.taps = nn.Parameter(torch.empty(len(self.offsets), self.width, **dd))
        self.project = nn.Linear(self.width, self.dim, **dd)

    def reset_parameters(self) -> None:
        """Draw all weights anew; taps of 1/m."""
        for layer in self.children():
            layer.apply(init_weights)
        nn.init.constant_(self.taps, 1 / len(self.taps))

    def parameters_of(self, width: int) -> int:
        return width * (self.dim + 1) + width * len(self.offsets) + (width + 1) * self.dim

    def reduced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = project(self.reduce, x)
        return u, u

    def pair(self, own: Tensor, window: Tensor, positions: Tensor, offsets: tuple[int, ...]) -> Tensor:
        if len(offsets) != len(self.taps):
            raise ValueError(f"offsets must be {len(self.taps)}, as many as the convolution has taps, got {offsets}")
        shifted = pasts(window, own.shape[1], offsets)
        mixed = total(tap * past for tap, past in zip(self.taps.to(own.dtype), shifted, strict=True))
        return project(self.project, mixed)

    def pairing_flops(self, deltas: Sequence[int]) -> int:
        return 2 * self.width * len(deltas)


@register_slot("mixer", "hadamard")
class HadamardMixer(Control):
    """Element-wise products in place of the wedge, normalised in the same way:

    g_t = mean over Δ ≤ t of W p̂ + b,   p = z_t ⊙ z_{t−Δ},   p̂ = p / max(‖p‖₂, 1e-6),   z of `width` entries.
    """

    eps = 1e-6

    def build(self, dd: dict[str, Any]) -> None:
        self.reduce = nn.Linear(self.dim, self.width, **dd)
        self.project = nn.Linear(self.width, self.dim, **dd)

    def parameters_of(self, width: int) -> int:
        return width * (self.dim + 1) + (width + 1) * self.dim

    def reduced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = project(self.reduce, x)
        return z, z

    def pair(self, own: Tensor, window: Tensor, positions: Tensor, offsets: tuple[int, ...]) -> Tensor:
        valid, number = present(positions, offsets)
        z = own if own.dtype is torch.float64 else own.float()
        # A past that does not exist is zero, and so is its product.
        products = [z * past for past in pasts(window, own.shape[1], offsets)]
        mean = total(p / p.norm(dim=-1, keepdim=True).clamp_min(self.eps) for p in products) / number
        return project(self.project, mean.to(own.dtype)) * valid.any(-1, keepdim=True)

    def pairing_flops(self, deltas: Sequence[int]) -> int:
        return 5 * self.width * len(deltas)


@register_slot("mixer", "concatenation")
class ConcatenationMixer(Control):
    """A two-layer perceptron on both tokens in place of the wedge:

    g_t = mean over Δ ≤ t of W₂ GELU(A z_t + B z_{t−Δ} + b₁) + b₂,   z of `rank` entries, `width` hidden units.
    """

    def build(self, dd: dict[str, Any]) -> None:
        self.reduce = nn.Linear(self.dim, self.rank, **dd)
        self.hidden = nn.Linear(self.rank, self.width, **dd)
        self.hidden_past = nn.Linear(self.rank, self.width, bias=False, **dd)
        self.project = nn.Linear(self.width, self.dim, **dd)

    def parameters_of(self, width: int) -> int:
        return self.rank * (self.dim + 1) + width * (2 * self.rank + 1) + (width + 1) * self.dim

    @property
    def kept(self) -> int:
        return self.rank

    def reduced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = project(self.reduce, x)
        return project(self.hidden, z), z

    def pair(self, own: Tensor, window: Tensor, positions: Tensor, offsets: tuple[int, ...]) -> Tensor:
        valid, number = present(positions, offsets)
        # The past's half of the first layer is the same whichever token looks back at it.
        shifted = pasts(project(self.hidden_past, window), own.shape[1], offsets)
        hidden = [F.gelu(own + past) * valid[..., k, None] for k, past in enumerate(shifted)]
        # The mean of the second layer's outputs is its output for the mean.
        return project(self.project, total(hidden) / number) * valid.any(-1, keepdim=True)

    def pairing_flops(self, deltas: Sequence[int]) -> int:
        return 2 * self.width * len(deltas)
