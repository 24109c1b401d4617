"""Bidirectional multi-head attention, for images and masked language models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..init import init_weights
from ..registry import register_slot


@register_slot("mixer", "bidirectional")
class BidirectionalAttention(nn.Module):
    """Softmax attention of every token to every token: x (B, T, dim) → (B, T, dim), biases everywhere.

    ValueError if `num_heads` does not divide `dim`. Not a mixer for the causal language model.
    """

    carries_input = False
    causal = False
    takes_mask = True
    layer_options: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be a positive divisor of dim={dim}, got {num_heads!r}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.apply(init_weights)

    def forward(self, x: Tensor, state: None = None, lengths: None = None, mask: Tensor | None = None) -> Tensor:
        """Mix (B, T, dim). mask (B, T) bool: False for padding, which no token sees; what padding gets means nothing.

        ValueError for a mask of another shape, or for a decoding state: there is none.
        """
        if state is not None or lengths is not None:
            raise ValueError("state and lengths must be None: bidirectional attention does not decode")
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
            # A row of padding alone sees itself, since a softmax over nothing is NaN.
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token: four projections and seq_len keys."""
        dim = self.out_proj.in_features
        return 8 * dim * dim + 4 * dim * seq_len
