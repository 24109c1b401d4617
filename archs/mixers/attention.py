"""Causal multi-head attention, the baseline mixer."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_slot
from .multihead import MultiHead
from .state import MixerState, home

FLASH_INSTALLED = find_spec("flash_attn") is not None


class KVCache(MixerState):
    """Keys and values (B, H, max_len + 1, D/H) by absolute position; the last slot takes ragged chunks' padding."""

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(batch_size, device)
        self.max_len = max_len
        shape = (batch_size, num_heads, max_len + 1, head_dim)
        # Zeros rather than empty, here and in `reset`: a masked NaN in an unwritten slot would still poison 0 * NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self.keys = torch.zeros_like(self.keys)
        self.values = torch.zeros_like(self.values)

    def write(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
        """Store a chunk (B, H, T, D/H) and return its positions (B, T)."""
        length = keys.shape[2]
        if self.extent + length > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} tokens; {self.extent} + {length} do not fit")
        positions = self.positions(length)
        slots = positions
        if lengths is not None:
            valid = torch.arange(length, device=positions.device) < lengths[:, None]
            slots = torch.where(valid, positions, self.max_len)
        index = slots[:, None, :, None].expand(keys.shape)
        self.keys = _written(self.keys, index, keys.to(self.keys.dtype))
        self.values = _written(self.values, index, values.to(self.values.dtype))
        return positions


def _written(cache: Tensor, index: Tensor, chunk: Tensor) -> Tensor:
    """The cache with the chunk in it, in place unless the backward of earlier steps needs what they have read."""
    recorded = cache.requires_grad or (chunk.requires_grad and torch.is_grad_enabled())
    return cache.scatter(2, index, chunk) if recorded else cache.scatter_(2, index, chunk)


@register_slot("mixer", "attention")
class CausalAttention(MultiHead):
    """Causal multi-head softmax attention: x (B, T, dim) → (B, T, dim), biases everywhere.

    Runs `F.scaled_dot_product_attention`; on CUDA in float16 or bfloat16 it uses flash-attn if that is installed.
    ValueError if `num_heads` does not divide `dim`.
    """

    def forward(self, x: Tensor, state: KVCache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Mix (B, T, dim); with a state, continue the sequences it has seen (see `grassland.archs.mixers`)."""
        q, k, v = self.split(x)
        return self.merge(self._causal(q, k, v) if state is None else self._continue(q, k, v, state, lengths))

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if FLASH_INSTALLED and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            return _flash_attention()(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, state: KVCache, lengths: Tensor | None) -> Tensor:
        state.check(q, lengths)
        fresh, length = state.fresh, q.shape[2]
        positions = state.write(k, v, lengths)
        state.advance(length, lengths)
        if fresh:
            return self._causal(q, k, v)
        keys, values = (cache[:, :, : state.extent].to(q.dtype) for cache in (state.keys, state.values))
        # A slot is its token's position, so "not after me" also hides every slot that is still unwritten.
        visible = torch.arange(state.extent, device=q.device) <= positions[:, None, :, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty KV cache for `max_len` tokens a row."""
        own_device, own_dtype = home(self)
        head_dim = self.dim // self.num_heads
        return KVCache(batch_size, max_len, self.num_heads, head_dim, device or own_device, dtype or own_dtype)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token: four projections and, on average, (seq_len + 1) / 2 keys."""
        dim = self.out_proj.in_features
        return 8 * dim * dim + 2 * dim * (seq_len + 1)


def _flash_attention() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func
