"""The interface of the official hyper-connection programs: batch-packed streams `(b s) … d` and their state dicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .hyper import Hyper, HyperConnection, Opened
from .kromhc import KromHC
from .manifold import MHC, MHCLite


class Packed(Hyper):
    """A hyper-connection on streams `(b s) … d`."""

    def open(self, x: Tensor) -> Opened:
        if self.disabled:
            return super().open(x)
        # (b s) … d to b … s d
        u, join = super().open(_rows(x, self.num_streams).movedim(1, -2).contiguous())
        return u, lambda y: join(y).movedim(-2, 1).flatten(0, 1)


class PackedKromHC(Packed, KromHC):
    pass


class PackedMHC(Packed, MHC):
    pass


class PackedMHCLite(Packed, MHCLite):
    pass


class PackedHyperConnection(Packed, HyperConnection):
    pass


KINDS: dict[str, type[Packed]] = {
    "kromhc": PackedKromHC,
    "mhc": PackedMHC,
    "mhc_lite": PackedMHCLite,
    "hc": PackedHyperConnection,
}
Functions = tuple[Callable[..., Hyper], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def get_init_and_expand_reduce_stream_functions(
    num_streams: int, *, dim: int | None = None, disable: bool | None = None, kind: str = "kromhc", **defaults: Any
) -> Functions:
    """What the official programs export: `init`, `expand` and `reduce` for streams packed into the batch, `(b s) … d`.

        init, expand, reduce = get_init_and_expand_reduce_stream_functions(4, dim=512)
        residual = init(branch=attention)          # a module; its state dict has the official names
        x = reduce(residual(expand(x)))

    Args:
        num_streams: n.
        dim: width of the streams; may be given to `init` instead.
        disable: True for plain residuals and streams that are x itself; None for True at n = 1.
        kind: "kromhc", "mhc", "mhc_lite" or "hc".
        defaults: further options of the class (`init="identity"`, `norm="pre"`, …). reduce: "sum" or "mean"; None for
            "sum" under init="paper", else "mean". expand: "repeat".

    Returns:
        init(branch=None, *, dim, layer_index, **options): a module; with branch None, calling it gives the branch's
        input and a function that adds the branch's output. layer_index counts the calls unless it is given.
        expand: (b, …, d) to (b n, …, d), n copies of each row. reduce: their sum or mean.
        As the official programs do, and unlike the papers, the mixing is by H_res transposed.

    Raises:
        ValueError: naming the argument.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    total = defaults.pop("reduce", None) or ("sum" if defaults.get("init", "paper") == "paper" else "mean")
    # What is learned would be a layer's parameter, and these functions belong to none.
    for name, value, allowed in (
        ("reduce", total, ("sum", "mean")),
        ("expand", defaults.pop("expand", "repeat"), ("repeat",)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed} for packed streams, got {value!r}")
    off = num_streams == 1 if disable is None else disable
    count = itertools.count()

    def init(
        branch: Callable[..., Any] | None = None,
        *,
        dim: int | None = dim,
        layer_index: int | None = None,
        **options: Any,
    ) -> Hyper:
        if dim is None:
            raise ValueError("dim must be given here or to get_init_and_expand_reduce_stream_functions, got None")
        for name in ("init", "expand", "reduce"):
            if name in options:
                raise ValueError(f"{name} must be given to get_init_and_expand_reduce_stream_functions, not to init")
        index = next(count) if layer_index is None else layer_index
        chosen = {"transposed": kind != "hc", **defaults, **options}
        return KINDS[kind](branch, dim, index, num_streams=num_streams, disable=off, **chosen)

    def expand(x: Tensor) -> Tensor:
        return x if off else x.repeat_interleave(num_streams, 0)

    def reduce(x: Tensor) -> Tensor:
        if off:
            return x
        rows = _rows(x, num_streams)
        return rows.sum(1) if total == "sum" else rows.mean(1)

    return init, expand, reduce


def _rows(x: Tensor, streams: int) -> Tensor:
    """(b s) … d to b s … d."""
    if x.dim() < 2 or x.shape[0] % streams:
        raise ValueError(f"x must be (batch · {streams} streams, …, dim), got {tuple(x.shape)}")
    return x.unflatten(0, (-1, streams))
