"""Bidirectional multi-head attention, for images and masked language models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_slot
from .multihead import MultiHead


@register_slot("mixer", "bidirectional")
class BidirectionalAttention(MultiHead):
    """Softmax attention of every token to every token: x (B, T, dim) → (B, T, dim), biases everywhere.

    ValueError if `num_heads` does not divide `dim`. Not a mixer for the causal language model.
    """

    causal = False
    takes_mask = True

    def forward(self, x: Tensor, state: None = None, lengths: None = None, mask: Tensor | None = None) -> Tensor:
        """Mix (B, T, dim). mask (B, T) bool: False for padding, which no token sees; what padding gets means nothing.

        ValueError for a mask of another shape, or for a decoding state: there is none.
        """
        if state is not None or lengths is not None:
            raise ValueError("state and lengths must be None: bidirectional attention does not decode")
        q, k, v = self.split(x)
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
            # A row of padding alone sees itself, since a softmax over nothing is NaN.
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token: four projections and seq_len keys."""
        dim = self.out_proj.in_features
        return 8 * dim * dim + 4 * dim * seq_len
