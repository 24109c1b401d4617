"""Torch's counter of FLOPs, for models that do not count their own."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flop_counter() -> FlopCounterMode:
    """Torch's counter, that also sees the attention of a CPU, of which it has no formula. All keys count."""
    return FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: _attention})


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, out_shape: object = None, **options: object
) -> int:
    return sdpa_flop_count(query, key, value)
