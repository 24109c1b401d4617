"""Hyper-connections: n residual streams, X' = H_res X + H_post^T F(H_pre X). What all share, and HC.

Source of HC: arXiv 2409.19606.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.launch import without_autocast
from ..checks import branch_output, check_eps, check_input, check_positive
from ..init import init_weights
from ..registry import register_slot

INITS = ("paper", "identity")
EXPANDS = ("repeat", "learned")
REDUCES = ("sum", "mean", "learned")
# Factor of the dynamic part at the start.
SCALE = 0.01
Opened = tuple[Tensor, Callable[[Tensor], Any]]


class StreamNorm(nn.Module):
    """sqrt(d) (1 + gamma) x / max(|x|, 1e-12), gamma = 0 at the start."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * (math.sqrt(x.shape[-1]) * (1 + self.gamma.to(x.dtype)))


class Hyper(nn.Module):
    """What all hyper-connections share: streams (…, n, dim) around a branch that sees (…, dim).

    Args:
        branch: a module or any callable from (…, dim), and further arguments, to (…, dim) or a tuple whose
            first entry that is; the rest of the tuple is passed on. None: `forward` returns (branch input, function
            from the branch's output to the streams).
        dim: width of a stream.
        layer_index: number of the sublayer, from 0; decides which stream it starts with.
        num_streams: n. With n = 1 or `disable` this is the plain residual on (…, dim).
        init: "paper", or "identity", which equals the plain pre-norm residual network at the start.
        dynamic: whether the coefficients depend on the streams; if not, they are parameters alone.
        expand: "repeat", or "learned" with an embedding (n, dim) added to the copies; made for layer 0.
        reduce: "sum", "mean" or "learned" weights (n,); None for "sum" under init="paper", else "mean".
        transposed: mix by the transpose of H_res, as the official programs do; the papers write H_res X.
        norm: "pre" or "post" for a LayerNorm before the branch (the streams themselves are never normalised, so the two
            are the same); None for none. norm_eps: of the LayerNorm.
        dropout: of the branch's output.
        num_layers: number of sublayers, so that the last one alone makes a learned reduce; None: each does.

    Coefficients are float32 whatever the dtype and under autocast, float64 in float64. AdamW's weight decay and
    `grassland.train.optim` see `dynamic_*_fn` as decayed and everything else here as not decayed.

    Raises ValueError that names the argument.
    """

    norm: StreamNorm
    decayed = ("dynamic_alpha_fn", "dynamic_beta_fn")
    # Vectors need no entry: they are not decayed anywhere.
    optim_groups: ClassVar[dict[str, str]] = {
        **dict.fromkeys(decayed, "decay"),
        **dict.fromkeys(("static_alpha", "stream_embed"), "no_decay"),
    }

    def __init__(
        self,
        branch: Callable[..., Any] | None,
        dim: int,
        layer_index: int = 0,
        *,
        num_streams: int = 4,
        init: str = "paper",
        dynamic: bool = True,
        expand: str = "repeat",
        reduce: str | None = None,
        disable: bool = False,
        transposed: bool = False,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_streams=num_streams, dim=dim)
        if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 0:
            raise ValueError(f"layer_index must be an integer of at least 0, got {layer_index!r}")
        reduce = reduce or ("sum" if init == "paper" else "mean")
        for name, value, allowed in (("init", init, INITS), ("expand", expand, EXPANDS), ("reduce", reduce, REDUCES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if norm not in ("pre", "post", None):
            raise ValueError(f"norm must be 'pre', 'post' or None, got {norm!r}")
        check_eps(norm_eps)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branch = branch
        self.dim, self.num_streams, self.layer_index = dim, num_streams, layer_index
        self.init, self.dynamic, self.transposed = init, dynamic, transposed
        self.disabled = disable or num_streams == 1
        self.reduce_kind = reduce
        self.branch_norm = nn.LayerNorm(dim, eps=norm_eps, **dd) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        if self.disabled:
            return
        self.make_parameters(dd)
        if expand == "learned" and layer_index == 0:
            self.stream_embed = nn.Parameter(torch.empty(num_streams, dim, **dd))
        if reduce == "learned" and num_layers in (None, layer_index + 1):
            self.reduce_weight = nn.Parameter(torch.empty(num_streams, **dd))
        self.reset_parameters()

    @abstractmethod
    def make_parameters(self, dd: dict[str, Any]) -> None:
        """Allocate the coefficients' parameters."""

    @abstractmethod
    def reset_coefficients(self) -> None:
        """Give the coefficients' parameters their first values."""

    @abstractmethod
    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h_pre (…, n), h_post (…, n) and H_res (…, n, n) for streams x (…, n, dim); float32, or float64."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First values of this layer's own parameters and norms'; those of the branch stay."""
        self.branch_norm.apply(init_weights)
        if self.disabled:
            return
        if self.dynamic:
            self.norm.reset_parameters()
        self.reset_coefficients()
        if hasattr(self, "stream_embed"):
            self.stream_embed.zero_()
        if hasattr(self, "reduce_weight"):
            self.reduce_weight.fill_(1.0 if self.init == "paper" else 1 / self.num_streams)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The streams after the branch, or `(streams, *rest)` if the branch returns a tuple. ValueError for x without
        the streams' dimension, TypeError for a branch that returns no tensor."""
        u, join = self.open(x)
        if self.branch is None:
            return self.branch_norm(u), lambda y: join(self.dropout(y))
        out = self.branch(self.branch_norm(u), *args, **kwargs)
        x = join(self.dropout(branch_output(out)))
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def open(self, x: Any) -> Opened:
        """The branch's input, and the function that takes the branch's output to the new streams."""
        if self.disabled:
            check_input(x, self.dim)
            return x, lambda y: x + y
        self.check(x)
        h_pre, h_post, mixing = self.coefficients(x)
        mixing = mixing.mT if self.transposed else mixing
        with without_autocast(x.device.type):
            u = (h_pre.unsqueeze(-2) @ x.to(h_pre.dtype)).squeeze(-2).to(x.dtype)

        def join(y: Tensor) -> Tensor:
            check_joins(y, u)
            with without_autocast(x.device.type):
                mixed = mixing @ x.to(mixing.dtype) + h_post.unsqueeze(-1) * y.to(mixing.dtype).unsqueeze(-2)
                return mixed.to(x.dtype)

        return u, join

    def check(self, x: Any) -> None:
        if len(x.shape) < 2 or x.shape[-2] != self.num_streams or x.shape[-1] != self.dim:
            wanted = f"(…, num_streams={self.num_streams}, dim={self.dim})"
            raise ValueError(f"x must be streams {wanted}, got {tuple(x.shape)}; expand(x) makes them of (…, dim)")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")

    def expand(self, x: Tensor) -> Any:
        """(…, dim) to n streams (…, n, dim); (…, dim) itself if this is the plain residual."""
        if self.disabled:
            return x
        check_input(x, self.dim)
        if hasattr(self, "stream_embed"):
            return x.unsqueeze(-2) + self.stream_embed
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.num_streams, self.dim)

    def reduce(self, x: Any) -> Tensor:
        """Streams (…, n, dim) to (…, dim)."""
        if self.disabled:
            return x
        self.check(x)
        if self.reduce_kind == "learned":
            if not hasattr(self, "reduce_weight"):
                raise ValueError(f"reduce='learned' is the last sublayer's, layer_index={self.layer_index} is not")
            with without_autocast(x.device.type):
                return torch.einsum("...nc,n->...c", torch.clone(x), self.reduce_weight.to(x.dtype))
        total = x.sum(-2)
        return total if self.reduce_kind == "sum" else total / self.num_streams

    def flops_per_token(self) -> int:
        """Forward FLOPs a token of the connections themselves: the projections of the streams to coefficients, the
        branch's input, its output into n streams, and the mixing. Norms and activations are left out."""
        if self.disabled:
            return 0
        return self.projection_flops() + 4 * self.num_streams * self.dim + self.mixing_flops()

    def projection_flops(self) -> int:
        return 2 * sum(weight.numel() for name, weight in self.named_parameters(recurse=False) if name in self.decayed)

    def mixing_flops(self) -> int:
        return 2 * self.num_streams**2 * self.dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_streams={self.num_streams}, init={self.init!r}, disable={self.disabled}"

    def first_pre(self) -> Tensor:
        """b_pre: sigmoid of it is 0.73 at the layer's own stream; elsewhere 0.27, or what makes the sum 1."""
        others = -1.0
        if self.init == "identity":
            share = (1 - 1 / (1 + math.exp(-1))) / (self.num_streams - 1)
            others = math.log(share / (1 - share))
        start = torch.full((self.num_streams,), others, dtype=torch.float64)
        start[self.layer_index % self.num_streams] = 1
        return start

    def first_post(self) -> Tensor:
        """b_post: twice the sigmoid of it is 1.46 and 0.54, or 1."""
        if self.init == "identity":
            return torch.zeros(self.num_streams)
        return self.first_pre()


def check_joins(y: Tensor, u: Tensor) -> None:
    """ValueError unless a branch's output has the shape of its input."""
    if y.shape != u.shape:
        raise ValueError(f"y must be {tuple(u.shape)}, as the branch's input, got {tuple(y.shape)}")


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@register_slot("residual", "hc")
class HyperConnection(Hyper):
    """HC, arXiv 2409.19606: unconstrained coefficients [A_m | A_r] + s tanh(norm(X) W), the norm per stream.

    u = A_m^T X, X' = A_r^T X + B y. Starts with A_m = e_k, A_r = 1, B = 1: a pre-norm residual in every stream.
    Arguments as in `Hyper`.
    """

    def make_parameters(self, dd: dict[str, Any]) -> None:
        n = self.num_streams
        self.static_alpha = nn.Parameter(torch.empty(n, n + 1, **dd))
        self.static_beta = nn.Parameter(torch.empty(n, **dd))
        if self.dynamic:
            self.norm = StreamNorm(self.dim, **dd)
            self.dynamic_alpha_fn = nn.Parameter(torch.empty(self.dim, n + 1, **dd))
            self.dynamic_alpha_scale = nn.Parameter(torch.empty((), **dd))
            self.dynamic_beta_fn = nn.Parameter(torch.empty(self.dim, **dd))
            self.dynamic_beta_scale = nn.Parameter(torch.empty((), **dd))

    def reset_coefficients(self) -> None:
        n = self.num_streams
        self.static_alpha.copy_(torch.cat([torch.eye(n)[:, [self.layer_index % n]], torch.eye(n)], 1))
        self.static_beta.fill_(1)
        if self.dynamic:
            for weight, scale in (
                (self.dynamic_alpha_fn, self.dynamic_alpha_scale),
                (self.dynamic_beta_fn, self.dynamic_beta_scale),
            ):
                weight.zero_()
                scale.fill_(SCALE)

    def projection_flops(self) -> int:
        # One projection serves every stream.
        return self.num_streams * super().projection_flops()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = wide(x)
        with without_autocast(x.device.type):
            alpha, beta = self.static_alpha.to(x.dtype), self.static_beta.to(x.dtype)
            if self.dynamic:
                normed = self.norm(x)
                moved = torch.tanh(normed @ self.dynamic_alpha_fn.to(x.dtype))
                alpha = alpha + self.dynamic_alpha_scale.to(x.dtype) * moved
                moved = torch.tanh(normed @ self.dynamic_beta_fn.to(x.dtype))
                beta = beta + self.dynamic_beta_scale.to(x.dtype) * moved
            leading = x.shape[:-2]
            alpha = alpha.expand(*leading, *alpha.shape[-2:])
            return alpha[..., 0], beta.expand(*leading, -1), alpha[..., 1:].mT
