"""Residuals: how a branch joins the stream.

A residual is constructed as `Residual(branch, dim, layer_index, *, norm, dropout, options…, device, dtype)`, where
`layer_index` counts sublayers from 0, and has

- `forward(x, *args, **kwargs)`: x is the stream, (B, T, dim) or (B, T, n, dim) with n streams; the branch gets (B, T,
  dim), `*args` and `**kwargs`. It owns the norms. A branch may return `(y, auxiliary loss)`; then so does the residual.
- `num_layers`, if its constructor takes it: the number of sublayers of the model.
- `expand(x)`, called on the first sublayer's residual, and `reduce(x)`, called on the last one's: from (B, T, dim) to
  the stream and back.
- `flops_per_token()`: forward FLOPs a token of the residual itself, the branch not counted.
- `branch`: any callable. It is registered only if it is a module; a branch shared across depth is given to all blocks
  but the first as a plain callable, so that a state dict has it once.
"""

from .hyper import HyperConnection
from .kromhc import KromHC
from .manifold import MHC, MHCLite
from .official import get_init_and_expand_reduce_stream_functions
from .plain import PlainResidual
from .streams import StreamState

__all__ = [
    "MHC",
    "HyperConnection",
    "KromHC",
    "MHCLite",
    "PlainResidual",
    "StreamState",
    "get_init_and_expand_reduce_stream_functions",
]
