"""Grassmann Plücker mixing inside windows, in both directions: for encoders' features (arXiv 2512.19428, §4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_input, check_positive, project
from ..init import reset_layers
from .grassmann import blended, mean_coordinates


class WindowGrassmannMixer(nn.Module):
    """Grassmann Plücker mixing of x (B, T, dim) → (B, T, dim) among the tokens of a window.

        z_t   = W_red x_t + b                                   reduce, num_heads groups of rank / num_heads
        g_t   = W_plu concat_h mean_s p̂(z_t^h, z_s^h) + b_plu    over the other tokens s of t's windows; 0 if none
        out_t = α_t ⊙ x_t + (1 − α_t) ⊙ g_t,   α_t = σ(W_gate [x_t; g_t] + b_gate)

    Windows of `window` tokens start every `stride` tokens; a pair that shares two windows counts twice. Padding is in
    no pair. All pairs of a token share z_t, so their mean is one wedge a head.

    rank: of all heads together. ValueError if num_heads does not divide it into groups of at least 2, or for stride
    outside [1, window].
    """

    carries_input = True
    causal = False
    takes_mask = True

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 64,
        num_heads: int = 4,
        window: int = 8,
        stride: int = 8,
        eps: float = 1e-6,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(dim=dim)
        if not isinstance(num_heads, int) or num_heads < 1 or rank % num_heads or rank // num_heads < 2:
            raise ValueError(f"num_heads must divide rank={rank} into groups of at least 2, got {num_heads!r}")
        if not isinstance(window, int) or window < 2:
            raise ValueError(f"window must be an integer of at least 2, got {window!r}")
        if not isinstance(stride, int) or not 1 <= stride <= window:
            raise ValueError(f"stride must be an integer in [1, window={window}], got {stride!r}")
        self.dim, self.num_heads, self.window, self.stride = dim, num_heads, window, stride
        self.eps, self.backend = eps, backend
        size = rank // num_heads
        self.reduce = nn.Linear(dim, rank, **dd)
        self.plucker = nn.Linear(num_heads * size * (size - 1) // 2, dim, **dd)
        self.gate = nn.Linear(2 * dim, dim, **dd)
        self.reset_parameters()

    reset_parameters = reset_layers

    def forward(self, x: Tensor, state: None = None, lengths: None = None, mask: Tensor | None = None) -> Tensor:
        """Mix (B, T, dim). mask (B, T) bool: False for padding, which no token sees; what padding gets means nothing.

        ValueError for a mask of another shape or dtype, or for a decoding state: there is none.
        """
        if state is not None or lengths is not None:
            raise ValueError("state and lengths must be None: mixing in windows does not decode")
        check_input(x, self.dim, self.reduce, sequence=True)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        elif mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        z = project(self.reduce, x).unflatten(-1, (self.num_heads, -1))
        times = self._times(x.shape[1], x.device) * self._neighbours(mask)
        others = self._neighbours(z).movedim(-1, -2)
        coordinates = mean_coordinates(z, others, times[:, :, None], self.eps).flatten(2).to(x.dtype)
        g = project(self.plucker, coordinates) * times.any(-1, keepdim=True)
        return blended(x, g, self.gate, self.backend)

    def _neighbours(self, x: Tensor) -> Tensor:
        """(B, T, …) → (B, T, …, 2·window − 1): x at t − window + 1 … t + window − 1, zeros outside."""
        reach = self.window - 1
        padding = [0, 0] * (x.dim() - 2) + [reach, reach]
        # Of a view whose strides repeat, torch.export asks whether the text is longer than the windows.
        return F.pad(x, padding).unfold(1, 2 * reach + 1, 1).contiguous()

    def _times(self, length: int, device: torch.device) -> Tensor:
        """How many windows t shares with each of `_neighbours`, (length, 2·window − 1) int64; none with itself.

        The windows go on past the end, so that more padding changes nothing.
        """
        reach = self.window - 1
        t = torch.arange(length, device=device)[:, None]
        s = t + torch.arange(-reach, reach + 1, device=device)
        first = (torch.maximum(t, s) - reach).clamp_min(0)
        last = torch.minimum(t, s)
        shared = last // self.stride + (-first).div(self.stride, rounding_mode="floor") + 1
        return torch.where((s == t) | (s < 0), 0, shared.clamp_min(0))

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token, whatever the sequence length; the wedges are left out."""
        return 2 * (self.reduce.weight.numel() + self.plucker.weight.numel() + self.gate.weight.numel())
