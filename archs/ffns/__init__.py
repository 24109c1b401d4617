"""Feed-forward networks: channels to channels, (…, dim) → (…, dim).

An ffn is constructed as `FFN(dim, hidden_dim, *, options…, device, dtype)` and has `forward(x)`, which returns y or
`(y, auxiliary loss)` (already scaled; the model adds it to its training loss), `flops_per_token(seq_len)`, and for
models with `scaled_init` `outputs()`: the weights that it ends in. One with `takes_mask` has `forward(x, mask=None)`,
mask (…) bool, False for padding; one with `drops` applies the dropout that it is constructed with to its own output.
`group_options` names options that a model may give as one entry a group.
"""

from .mlp import MLP
from .shared_moe import SharedMoE

__all__ = ["MLP", "SharedMoE"]
