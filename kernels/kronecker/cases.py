"""Shapes and inputs of the KromHC ops for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..testing import Case, Spec, Tensors, normal
from . import EPS, kronecker_open, kronecker_post, kronecker_pre, kronecker_projection, kronecker_step, op
from . import projection as registration
from .reference import coefficients


def columns(streams: int) -> int:
    return 2 * streams + streams.bit_length() - 1


def projection(streams: int, dim: int, seed: int = 10) -> Tensors:
    """weight and bias of ordinary size: the input is normalised to length 1."""
    return {
        "weight": normal(columns(streams), streams * dim, seed=seed),
        "bias": normal(columns(streams), seed=seed + 1),
    }


def h(*leading: int, streams: int, seed: int = 20) -> Tensor:
    return coefficients(normal(*leading, columns(streams), seed=seed), [2] * (streams.bit_length() - 1))


def make_pre(*leading: int, streams: int, dim: int) -> Tensors:
    return {"x": normal(*leading, streams, dim)} | projection(streams, dim)


def make_post(*leading: int, streams: int, dim: int) -> Tensors:
    x, y = normal(*leading, streams, dim), normal(*leading, dim, seed=1)
    return {"x": x, "y": y, "h": h(*leading, streams=streams)}


def make_step(*leading: int, streams: int, dim: int) -> Tensors:
    return make_post(*leading, streams=streams, dim=dim) | projection(streams, dim)


def short(make: Any) -> Tensors:
    """Some tokens whose streams and branch are zero, and some shorter than eps."""
    tensors = make(6, streams=4, dim=5)
    for name in tensors.keys() & {"x", "y"}:
        tensors[name][2:4] = 0
        tensors[name][4:] *= 1e-5
    return tensors


def strided(make: Any) -> Tensors:
    """Every input non-contiguous."""
    return {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in make(3, 5, streams=4, dim=6).items()}


def build(make: Any) -> list[Case]:
    return [
        Case("small", partial(make, 2, 3, streams=4, dim=3)),
        Case("two-streams", partial(make, 7, streams=2, dim=17)),
        Case("eight-streams", partial(make, 5, streams=8, dim=9)),
        Case("one-token", partial(make, 1, streams=4, dim=32)),
        Case("one-channel", partial(make, 9, streams=4, dim=1)),
        Case("empty", partial(make, 0, streams=4, dim=8)),
        Case("no-leading", partial(make, streams=4, dim=8)),
        Case("short-tokens", partial(short, make), {"eps": 1e-3} if make is not make_post else {}),
        Case("strided", partial(strided, make)),
        Case("ragged", partial(make, 2, 37, streams=4, dim=150)),
        Case("many-tokens", partial(make, 301, streams=4, dim=16)),
    ]


def full(tensors: Tensors) -> Tensors:
    return {name: t.detach() for name, t in tensors.items()}


def registered_pre(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    x, weight, bias = tensors["x"].flatten(0, -3).detach(), tensors["weight"], tensors["bias"]
    x = x.requires_grad_()
    u, coefs, saved = (t.detach() for t in op.kronecker_pre(x, weight, bias, EPS, backend))
    plain = (torch.ones_like(u), torch.ones_like(coefs), x.detach(), weight.detach(), coefs, saved)
    return [
        (op.kronecker_pre, (x, weight, bias, EPS, backend)),
        (op.kronecker_pre_backward, (*plain, EPS, backend)),
    ]


def registered_open(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    operator, arguments = registered_pre(tensors, options, backend)[1]
    return [(operator, (*arguments, torch.ones_like(arguments[2])))]


def registered_post(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    t = full(tensors)
    x, y, coefs = t["x"].flatten(0, -3), t["y"].flatten(0, -2), t["h"].flatten(0, -2)
    live = tuple(v.clone().requires_grad_() for v in (x, y, coefs))
    return [
        (op.kronecker_post, (*live, backend)),
        (op.kronecker_post_backward, (torch.ones_like(x), x, y, coefs, backend)),
    ]


def registered_step(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    t = full(tensors)
    x, y, coefs = t["x"].flatten(0, -3), t["y"].flatten(0, -2), t["h"].flatten(0, -2)
    weight, bias = t["weight"], t["bias"]
    following, u, after, saved = op.kronecker_step(x, y, coefs, weight, bias, EPS, backend)
    grads = (torch.ones_like(following), torch.ones_like(u), torch.ones_like(after))
    live = tuple(v.clone().requires_grad_() for v in (x, y, coefs, weight, bias))
    return [
        (op.kronecker_step, (*live, EPS, backend)),
        (op.kronecker_step_backward, (*grads, x, y, coefs, weight, after, saved, EPS, backend)),
    ]


def make_projection(*, streams: int, dim: int) -> Tensors:
    width, logits = streams * dim, streams + 2 * (streams.bit_length() - 1)
    shapes = {
        "alpha": (width, logits), "beta": (width, streams), "gamma": (width,), "pre_scale": (1,), "post_scale": (),
        "mixing_scale": (1,), "static_alpha": (logits,), "static_beta": (streams,),
    }  # fmt: skip
    return {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def projection_case(id: str, streams: int, dim: int, change: Any = None) -> Case:
    def make() -> Tensors:
        tensors = make_projection(streams=streams, dim=dim)
        return {name: change(t) for name, t in tensors.items()} if change else tensors

    return Case(id, make, {"factors": [2] * (streams.bit_length() - 1)})


PROJECTIONS = [
    projection_case("small", 4, 3),
    projection_case("two-streams", 2, 17),
    projection_case("eight-streams", 8, 9),
    projection_case("one-channel", 4, 1),
    projection_case("many-channels", 4, 150),
    projection_case("strided", 4, 6, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t),
    projection_case("zeros", 4, 5, torch.zeros_like),
]


def registered_projection(tensors: Tensors, options: dict[str, Any], backend: str) -> list[tuple[Any, tuple]]:
    plain = tuple(full(tensors).values())
    weight, bias = registration.kronecker_projection(*plain, backend)
    live = tuple(t.clone().requires_grad_() for t in plain)
    return [
        (registration.kronecker_projection, (*live, backend)),
        (
            registration.kronecker_projection_backward,
            (torch.ones_like(weight), torch.ones_like(bias), *plain[:6], backend),
        ),
    ]


def spec(name: str, call: Any, make: Any, registered: Any, cases: Sequence[str] = ()) -> Spec:
    paper = Case("paper", partial(make, 2, 128, streams=4, dim=768))
    # The product is byte-bound and thin: whether it meets the tensor cores is the compiler's choice.
    chosen = [case for case in build(make) if case.id in cases or not cases]
    return Spec(name, call, chosen, registered, paper, ("cpp", "triton"), gemm=False)


SPECS = [
    Spec(
        "kronecker_projection",
        kronecker_projection,
        PROJECTIONS,
        registered_projection,
        projection_case("paper", 4, 768),
        ("cpp", "triton"),
        gemm=False,
    ),
    spec("kronecker_pre", kronecker_pre, make_pre, registered_pre),
    # The same kernels but for what joins in the backward.
    spec("kronecker_open", kronecker_open, make_pre, registered_open, ("small", "empty", "strided", "ragged")),
    spec("kronecker_post", kronecker_post, make_post, registered_post),
    spec("kronecker_step", kronecker_step, make_step, registered_step),
]
