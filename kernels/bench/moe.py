"""What the mixture of experts is measured against: router to combination, forward and backward, nothing dropped.

The padded and the one-hot form have places for 1.2 T K / E tokens an expert, the paper's capacity, and drop the rest.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..moe import Routing, expert_capacity, moe_ffn, moe_route
from ..testing import normal
from . import moe_gpu
from .moe_gpu import Experts, gelu
from .rival import Benchmark, Rival, Setting, Step, Unavailable, Values, summary, without_check

Layer = Callable[..., Tensor]


def setting(tokens: int, experts: int = 4, calls: int = 1, dim: int = 768, inner: int = 3072) -> Setting:
    name = f"T{tokens} E{experts}" + (f" C{dim}" if dim != 768 else "") + (f" x{calls}" if calls > 1 else "")
    return Setting(name, {"tokens": tokens, "experts": experts, "calls": calls, "dim": dim, "inner": inner, "top_k": 2})


SETTINGS = [setting(32), setting(788), setting(788, experts=16), setting(788, experts=16, calls=4)]
# Memory against depth: experts that outweigh the activations of a call, and shapes that take seconds.
SETTINGS += [setting(200, experts=16, calls=calls, dim=192, inner=768) for calls in (1, 4)]
# Enough work for a large GPU.
GPU_SETTINGS = [setting(32), setting(788), setting(25216), setting(788, experts=16, calls=4)]


def inputs(v: Values, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x (T, H), then router, w_up, b_up, w_down, b_down, stacked."""
    e, h, i = v["experts"], v["dim"], v["inner"]
    tensors = [
        normal(v["tokens"], h),
        normal(e, h, seed=1, scale=h**-0.5),
        normal(e, i, h, seed=2, scale=h**-0.5),
        normal(e, i, seed=3, scale=0.1),
        normal(e, h, i, seed=4, scale=i**-0.5),
        normal(e, h, seed=5, scale=0.1),
    ]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def steps(
    layer: Layer, v: Values, arguments: Sequence[Tensor], merge: Callable[[Sequence[Tensor]], list[Tensor]] = list
) -> dict[str, Step]:
    """Modes of x + layer(x), `calls` times over; `merge` brings gradients into the form of `inputs`."""
    x, *weights = arguments
    grad = normal(*x.shape, seed=7).to(x.device, x.dtype)

    def run() -> Tensor:
        y = x
        for _ in range(v["calls"]):
            y = y + layer(y, *weights)
        return y

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), arguments, grad)

    @functools.cache
    def graph() -> Tensor:
        return run()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph(), arguments, grad, retain_graph=True)

    found = {"forward": forward, "forward+backward": both, "check": lambda: (forward(), *merge(both()))}
    return found | ({"backward": backward} if v["calls"] > 1 else {})


def choice(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and experts (T, K) in plain PyTorch."""
    found = torch.softmax(F.linear(x, router), -1, dtype=torch.float32).topk(top_k)
    return found.values.to(x.dtype), found.indices


def build_ours(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    backend = dispatch.fastest(dispatch.OPS["moe_ffn"], device, dtype)

    def layer(x: Tensor, router: Tensor, *weights: Tensor) -> Tensor:
        r: Routing = moe_route(F.linear(x, router), top_k=v["top_k"], backend=backend)
        return moe_ffn(x, r.gates, r.slots, r.order, r.offsets, *weights, backend=backend)

    return steps(layer, v, inputs(v, dtype, device))


def build_dense(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """One FFN of width K I: the same products in two large ones."""
    h, i = v["dim"], v["inner"] * v["top_k"]
    shapes = [(i, h), (i,), (h, i), (h,)]
    weights = [normal(*s, seed=k, scale=s[-1] ** -0.5).to(device, dtype).requires_grad_() for k, s in enumerate(shapes)]

    def layer(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(gelu(F.linear(x, w1, b1)), w2, b2)

    return without_check(steps(layer, v, [inputs(v, dtype, device)[0], *weights]))


def build_loop(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The eager loop of Hugging Face's models: `where`, index, `index_add_`; each expert has its own weights."""
    x, router, *stacked = inputs(v, dtype, device)
    count = v["experts"]
    separate = [w.detach()[e].clone().requires_grad_() for w in stacked for e in range(count)]

    def layer(x: Tensor, router: Tensor, *weights: Tensor) -> Tensor:
        gates, experts = choice(x, router, v["top_k"])
        hits = F.one_hot(experts, count).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for e in range(count):
            k, t = torch.where(hits[e])
            if t.numel():
                w1, b1, w2, b2 = weights[e::count]
                rows = F.linear(gelu(F.linear(x[t], w1, b1)), w2, b2) * gates[t, k, None]
                y = y.index_add(0, t, rows)
        return y

    def merge(grads: Sequence[Tensor]) -> list[Tensor]:
        return [*grads[:2], *(torch.stack(list(grads[k : k + count])) for k in range(2, len(grads), count))]

    return steps(layer, v, [x, router, *separate], merge)


def routed(experts: Experts, v: Values) -> Layer:
    """A layer of experts that are told gates and choice."""
    return lambda x, router, *weights: experts(x, *choice(x, router, v["top_k"]), *weights)


def sliced(activation: Callable[[Tensor], Tensor]) -> Experts:
    """The same loop on slices W[e] of stacked parameters, for which autograd makes zero-filled gradients."""

    def run(x: Tensor, gates: Tensor, experts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(len(w1)):
            t, k = torch.where(experts == e)
            rows = F.linear(activation(F.linear(x[t], w1[e], b1[e])), w2[e], b2[e]) * gates[t, k, None]
            y = y.index_add(0, t, rows)
        return y

    return run


def build_sliced(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return steps(routed(sliced(gelu), v), v, inputs(v, dtype, device))


def grouped_layer(v: Values, product: Callable[..., Tensor] = F.grouped_mm) -> Layer:
    def layer(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gates, experts = choice(x, router, v["top_k"])
        flat, order = experts.flatten().sort(stable=True)
        # Not of bincount, at which torch.compile breaks its graph.
        ends = torch.searchsorted(flat, torch.arange(v["experts"], device=x.device), right=True, out_int32=True)
        h = gelu(product(x[order // v["top_k"]], w1.mT, offs=ends) + b1[flat])
        rows = (product(h, w2.mT, offs=ends) + b2[flat]) * gates.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        return rows[back].view(*experts.shape, -1).sum(1)

    return layer


def build_grouped(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    try:
        return steps(grouped_layer(v), v, inputs(v, dtype, device))
    except (RuntimeError, AttributeError) as error:
        raise Unavailable(str(error).splitlines()[0]) from error


def keep_saved_tensors() -> None:
    """The backward alone is timed on one graph, again and again: a compiled one must leave the saved tensors be."""
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False


def build_grouped_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    keep_saved_tensors()
    # Before 2.15 torch traces no product in float32: what stands around it is compiled then.
    untraced: Any = torch.compiler.disable(F.grouped_mm)
    for product in (F.grouped_mm, untraced):
        found = steps(torch.compile(grouped_layer(v, product)), v, inputs(v, dtype, device))
        try:
            found["forward+backward"]()
            return found
        except Exception as error:
            failure = error
    raise Unavailable(summary(failure)) from failure


def places(experts: Tensor, count: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Each pair's place in its expert (T, K), and whether it has one."""
    hot = F.one_hot(experts, count).sum(1)
    rank = (hot.cumsum(0) - hot).gather(1, experts)
    return rank, rank < capacity


def within(capacity: int, count: int) -> Experts:
    """What the padded and the one-hot form compute: pairs beyond an expert's capacity count for nothing."""

    def run(x: Tensor, gates: Tensor, experts: Tensor, *weights: Tensor) -> Tensor:
        return sliced(gelu)(x, gates * places(experts, count, capacity)[1], experts, *weights)

    return run


def build_padded(
    v: Values, dtype: torch.dtype, device: torch.device, wrap: Callable[[Layer], Layer] = lambda f: f
) -> dict[str, Step]:
    """Rows padded to the capacity, so that two `baddbmm` serve all experts."""
    count, capacity = v["experts"], expert_capacity(v["tokens"], v["experts"], v["top_k"], 1.2)

    def layer(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gates, experts = choice(x, router, v["top_k"])
        rank, fits = places(experts, count, capacity)
        at = torch.where(fits, experts * capacity + rank, count * capacity)
        source = torch.full((count * capacity + 1,), len(x), device=x.device)
        source[at.flatten()] = torch.arange(at.numel(), device=x.device) // v["top_k"]
        rows = F.pad(x, (0, 0, 0, 1))[source[:-1]].view(count, capacity, -1)
        h = gelu(torch.baddbmm(b1[:, None], rows, w1.mT))
        out = torch.baddbmm(b2[:, None], h, w2.mT).flatten(0, 1)
        return (F.pad(out, (0, 0, 0, 1))[at] * (gates * fits)[..., None]).sum(1)

    arguments = inputs(v, dtype, device)
    return held_to(within(capacity, count), steps(wrap(layer), v, arguments), v, arguments, "check")


def build_padded_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    keep_saved_tensors()
    return build_padded(v, dtype, device, torch.compile)


def build_one_hot(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Dispatch and combination as products with a one-hot tensor (T, E, C), as in the official program."""
    count, capacity = v["experts"], expert_capacity(v["tokens"], v["experts"], v["top_k"], 1.2)

    def layer(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gates, experts = choice(x, router, v["top_k"])
        rank, fits = places(experts, count, capacity)
        place = F.one_hot(torch.where(fits, rank, capacity), capacity + 1)[..., :-1].to(x.dtype)
        pairs = torch.einsum("tke,tkc->tkec", F.one_hot(experts, count).to(x.dtype), place)
        rows = torch.einsum("tec,th->ech", pairs.sum(1), x)
        h = gelu(torch.einsum("ech,eih->eci", rows, w1) + b1[:, None])
        out = torch.einsum("eci,ehi->ech", h, w2) + b2[:, None]
        return torch.einsum("tec,ech->th", (pairs * gates[..., None, None]).sum(1), out)

    arguments = inputs(v, dtype, device)
    return held_to(within(capacity, count), steps(layer, v, arguments), v, arguments, "check")


def swiglu(x: Tensor) -> Tensor:
    """Gate and value stand in turn."""
    return F.silu(x[..., ::2]) * x[..., 1::2]


def held_to(
    experts: Experts, found: dict[str, Step], v: Values, arguments: Sequence[Tensor], mode: str
) -> dict[str, Step]:
    """With `mode` of the same experts in float64 as truth.

    Only the first call is checked: it decides the routing of the next ones, near a tie by its last bit. So the truth
    chooses in the dtype of the arguments, too.
    """
    if v["calls"] > 1:
        return without_check(found)
    chosen = choice(arguments[0], arguments[1], v["top_k"])[1]
    wide = [t.detach().double().requires_grad_() for t in arguments]

    def layer(x: Tensor, router: Tensor, *weights: Tensor) -> Tensor:
        return experts(x, F.linear(x, router).softmax(-1).gather(1, chosen), chosen, *weights)

    return found | {"truth": steps(layer, v, wide)[mode]}


def build_scattermoe(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return steps(routed(moe_gpu.scattermoe(device), v), v, inputs(v, dtype, device))


def build_triton_kernels(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Forward alone."""
    arguments = inputs(v, dtype, device)
    forward = steps(routed(moe_gpu.triton_kernels(device), v), v, arguments)["forward"]
    return held_to(sliced(gelu), {"forward": forward, "check": forward}, v, arguments, "forward")


def build_sonicmoe(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """It has gated activations alone: SwiGLU of two thirds the width, for equal FLOPs."""
    experts = moe_gpu.sonicmoe(device, v["top_k"])
    arguments = gated_inputs(v, dtype, device)
    return held_to(sliced(swiglu), steps(experts, v, arguments), v, arguments, "check")


def gated_inputs(v: Values, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`inputs` for experts of three matrices with as many weights: w_up (E, 2J, H), w_down (E, H, J), J = 2I/3."""
    width = v["inner"] * 2 // 3
    x, router, *_, b2 = inputs(v, dtype, device)
    _, _, w1, b1, _, _ = inputs({**v, "inner": 2 * width}, dtype, device)
    w2 = inputs({**v, "inner": width}, dtype, device)[4]
    return [x, router, w1, b1, w2, b2]


PASSES = {"forward": 1, "backward": 2, "forward+backward": 3}


def flops(v: Values, mode: str) -> float:
    products = 4.0 * v["dim"] * v["inner"] * v["top_k"] * v["tokens"] * v["calls"]
    return products * PASSES[mode]


def moved(v: Values, mode: str, itemsize: int) -> float:
    """The experts' weights, read once, in the backward once more, and their gradients written once."""
    weights = 2 * v["experts"] * v["dim"] * v["inner"]
    return float(weights * itemsize * PASSES[mode])


BENCHMARK = Benchmark(
    name="moe",
    title="Mixture of experts (router to combination), H 768, I 3072, K 2",
    ours="grassland",
    settings=SETTINGS,
    gpu_settings=GPU_SETTINGS,
    rivals=[
        Rival("grassland", build_ours),
        Rival("dense FFN, equal FLOPs", build_dense),
        Rival("eager loop, separate experts", build_loop, recordable=False),
        Rival("eager loop, stacked experts", build_sliced, recordable=False),
        Rival("F.grouped_mm", build_grouped),
        Rival("F.grouped_mm + torch.compile", build_grouped_compiled),
        Rival("padded baddbmm", build_padded),
        Rival("padded baddbmm + torch.compile", build_padded_compiled),
        Rival("one-hot einsum", build_one_hot),
        Rival("ScatterMoE", build_scattermoe, foreign=True, recordable=False),
        Rival("SonicMoE, SwiGLU of equal FLOPs", build_sonicmoe, foreign=True),
        Rival("triton_kernels", build_triton_kernels, foreign=True),
    ],
    flops=flops,
    moved=moved,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 5e-2},
)
