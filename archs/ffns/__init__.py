"""Feed-forward networks: channels to channels, (…, dim) → (…, dim).

An ffn is constructed as `FFN(dim, hidden_dim, *, options…, device, dtype)` and has `forward(x)`, which returns y or
`(y, auxiliary loss)` (already scaled; the model adds it to its training loss), and `flops_per_token(seq_len)`.
"""

from .mlp import MLP

__all__ = ["MLP"]
