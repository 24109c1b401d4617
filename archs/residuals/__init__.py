"""Residuals: how a branch joins the stream.

A residual is constructed as `Residual(branch, dim, layer_index, *, norm, dropout, options…, device, dtype)`, where
`layer_index` counts sublayers from 0, and has

- `forward(x, *args)`: x is the stream, (B, T, dim) or (B, T, n, dim) with n streams; the branch gets (B, T, dim) and
  `*args`. It owns the norms. A branch may return `(y, auxiliary loss)`; then so does the residual.
- `expand(x)`, called on the first sublayer's residual, and `reduce(x)`, called on the last one's: from (B, T, dim) to
  the stream and back.
- `branch`: any callable. It is registered only if it is a module; a branch shared across depth is given to all blocks
  but the first as a plain callable, so that a state dict has it once.
"""

from .plain import PlainResidual

__all__ = ["PlainResidual"]
