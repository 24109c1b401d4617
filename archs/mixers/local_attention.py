"""Causal attention within a window, as a control for Grassmann mixing."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_positive, project
from ..registry import register_slot
from .controls import Control


@register_slot("mixer", "local_attention")
class LocalAttention(Control):
    """Causal softmax attention to the token itself and the last max Δ ones, `width` channels in `num_heads` heads.

    Its cost is linear in the length: blocks of max Δ queries see their own keys and those of the block before.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        rank: int = 32,
        offsets: Iterable[int] = (1, 2, 4, 8, 12, 16),
        out_proj: bool = True,
        width: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(num_heads=num_heads)
        if isinstance(width, int) and width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads={num_heads}, got {width}")
        self.num_heads = num_heads
        frame: dict[str, Any] = {"rank": rank, "offsets": offsets, "out_proj": out_proj, "width": width}
        super().__init__(dim, **frame, backend=backend, device=device, dtype=dtype)

    def build(self, dd: dict[str, Any]) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.width, **dd)
        self.project = nn.Linear(self.width, self.dim, **dd)

    def parameters_of(self, width: int) -> int:
        return 3 * width * (self.dim + 1) + (width + 1) * self.dim

    @property
    def unit(self) -> int:
        return self.num_heads

    @property
    def kept(self) -> int:
        return 2 * self.width

    def reduced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own, kept = project(self.qkv, x).split((self.width, 2 * self.width), dim=-1)
        return own, kept

    def pair(self, own: Tensor, window: Tensor, positions: Tensor, offsets: tuple[int, ...]) -> Tensor:
        length, span = own.shape[1], window.shape[1] - own.shape[1]
        block = max(1, min(span, length))
        # No tokens make a block of padding alone, since there must be one to unfold.
        rest = -length % block if length else block
        queries = F.pad(own, (0, 0, 0, rest)).unflatten(1, (-1, block))
        # (B, blocks, span + block, 2·width): the keys and values that each block of queries may see.
        seen = F.pad(window, (0, 0, 0, rest)).unfold(1, span + block, block).transpose(-1, -2)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(2, 3) for t in (queries, *seen.chunk(2, dim=-1))]
        visible = self._visible(positions, span, block, rest).expand(len(own), -1, -1, -1, -1)
        # A block is a row of the batch: torch's fused kernels take four dimensions, and its compiler fails on five.
        q, k, v, mask = (t.flatten(0, 1) for t in (*heads, visible))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, queries.shape[:2])
        return project(self.project, mixed.transpose(2, 3).flatten(3).flatten(1, 2)[:, :length])

    def _visible(self, positions: Tensor, span: int, block: int, rest: int) -> Tensor:
        """(B or 1, blocks, 1, block, span + block) bool: keys at most `span` before the query and inside the text."""
        first = F.pad(positions, (0, rest)).unflatten(1, (-1, block))[..., :1]
        keys = torch.arange(span + block, device=positions.device)
        distance = torch.arange(block, device=positions.device)[:, None] + span - keys
        near = (distance >= 0) & (distance <= span)
        return near & (first + keys - span >= 0)[:, :, None, None, :]

    def pairing_flops(self, deltas: Sequence[int]) -> int:
        return 4 * self.width * (1 + max(deltas, default=0))
