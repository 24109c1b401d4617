"""The plain residual connection with pre- or post-norm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import branch_output, check_eps, check_input, check_positive
from ..init import init_weights
from ..registry import register_slot


@register_slot("residual", "plain")
class PlainResidual(nn.Module):
    """Plain residual around a branch f, with a LayerNorm of its own.

        norm="pre":   x + Dropout(f(LN(x)))
        norm="post":  LN(x + Dropout(f(x)));  Dropout(LN(f(x))) if f has `carries_input`, because a blending mixer has
                      x in its output already (arXiv 2512.19428, §3.2)

    x (…, dim); further arguments go to the branch. If the branch returns a tuple, its first entry joins the
    stream and the rest is passed on.
    """

    def __init__(
        self,
        branch: Callable[..., Any],
        dim: int,
        layer_index: int = 0,
        *,
        norm: str = "post",
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        check_positive(dim=dim)
        check_eps(norm_eps)
        self.dim, self.branch = dim, branch
        self.norm_first = norm == "pre"
        self.norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """First values of the norm; those of the branch stay."""
        self.norm.apply(init_weights)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stream after the branch, or `(stream, *rest)` if the branch returns a tuple."""
        check_input(x, self.dim)
        out = self.branch(self.norm(x) if self.norm_first else x, *args, **kwargs)
        x = self._join(x, branch_output(out))
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        if self.norm_first:
            return x + self.dropout(y)
        if getattr(self.branch, "carries_input", False):
            return self.dropout(self.norm(y))
        return self.norm(x + self.dropout(y))

    def expand(self, x: Tensor) -> Tensor:
        """(…, dim) to the stream: the same."""
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """The stream to (…, dim): the same."""
        return x

    def flops_per_token(self) -> int:
        """Forward FLOPs a token of the residual itself: none, norms and additions left out."""
        return 0
