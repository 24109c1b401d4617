"""What Grassmann mixing is measured against: the whole mixer, from reduce to blend, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..plucker import eager, gated_blend, plucker_mix, reference
from ..plucker.blend import OP as BLEND
from ..plucker.cases import PAPER_OFFSETS
from ..plucker.op import OP
from ..testing import normal
from .rival import Benchmark, Rival, Setting, Step, Unavailable, Values, package, with_gradients, without_check

Mixer = Callable[..., Tensor]


def setting(name: str, batch: int, length: int, dim: int = 256, rank: int = 32) -> Setting:
    return Setting(name, {"batch": batch, "length": length, "dim": dim, "rank": rank, "offsets": list(PAPER_OFFSETS)})


SETTINGS = [
    setting("B8 L256", 8, 256),
    setting("B1 L2048", 1, 2048),
    setting("B2 L4096", 2, 4096),
]


# Enough work for a large GPU.
GPU_SETTINGS = [
    setting("B32 L256", 32, 256),
    setting("B8 L4096", 8, 4096),
    setting("B8 L4096 d1024 r64", 8, 4096, dim=1024, rank=64),
]


def inputs(v: Values, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, then the mixer's weights: reduce, Plücker projection, gate."""
    dim, rank = v["dim"], v["rank"]
    pairs = rank * (rank - 1) // 2
    shapes = [(rank, dim), (rank,), (dim, pairs), (dim,), (dim, 2 * dim), (dim,)]
    weights = [normal(*shape, seed=k, scale=shape[-1] ** -0.5) for k, shape in enumerate(shapes)]
    x = normal(v["batch"], v["length"], dim, seed=9)
    return [t.to(device, dtype).requires_grad_() for t in (x, *weights)]


def mixer(mix: Mixer, blend: Mixer, v: Values) -> Mixer:
    """The mixer as a function of `inputs`, from its two parts."""

    def run(x: Tensor, wr: Tensor, br: Tensor, wp: Tensor, bp: Tensor, wg: Tensor, bg: Tensor) -> Tensor:
        return blend(x, mix(F.linear(x, wr, br), wp, bp, v["offsets"], 1e-6), wg, bg)

    return run


def fused_mix(backend: str) -> Mixer:
    def run(z: Tensor, weight: Tensor, bias: Tensor, offsets: list[int], eps: float) -> Tensor:
        return plucker_mix(z, weight, bias, offsets=offsets, eps=eps, backend=backend)

    return run


def fused_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gated_blend(x, g, weight, bias, backend=dispatch.fastest(BLEND, x.device, g.dtype))


def build_ours(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    mix = fused_mix(dispatch.fastest(OP, device, dtype))
    return with_gradients(mixer(mix, fused_blend, v), inputs(v, dtype, device))


def build_triton(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Ours where the extension is not built."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    return with_gradients(mixer(fused_mix("triton"), fused_blend, v), inputs(v, dtype, device))


def eager_blend(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager.gated_blend(x, g, weight, bias)[0]


def build_literal(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(mixer(reference.literal_mix, reference.literal_blend, v), inputs(v, dtype, device))


def build_collapsed(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(mixer(eager.plucker_mix, eager_blend, v), inputs(v, dtype, device))


def build_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(torch.compile(mixer(eager.plucker_mix, eager_blend, v)), inputs(v, dtype, device))


Heads = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(heads: Heads) -> Mixer:
    """A causal attention sublayer with heads of 64: qkv, `heads` on (B, L, heads, 64), output projection."""

    def run(x: Tensor, wi: Tensor, bi: Tensor, wo: Tensor, bo: Tensor) -> Tensor:
        q, k, value = F.linear(x, wi, bi).unflatten(-1, (3, -1, 64)).unbind(2)
        return F.linear(heads(q, k, value).reshape(x.shape), wo, bo)

    return run


def sdpa(q: Tensor, k: Tensor, value: Tensor) -> Tensor:
    q, k, value = (t.transpose(1, 2) for t in (q, k, value))
    return F.scaled_dot_product_attention(q, k, value, is_causal=True).transpose(1, 2)


def attention_inputs(v: Values, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    dim = v["dim"]
    weights = [normal(3 * dim, dim), normal(3 * dim), normal(dim, dim), normal(dim)]
    x = normal(v["batch"], v["length"], dim, seed=9)
    return [(t * dim**-0.5).to(device, dtype).requires_grad_() for t in (x, *weights)]


def build_attention(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return without_check(with_gradients(attention(sdpa), attention_inputs(v, dtype, device)))


def build_flash(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The same sublayer with the attention of the flash-attn package."""
    flash = package("flash_attn", "flash-attn", device)
    if dtype == torch.float32:
        raise Unavailable("flash-attn has half precision alone")
    layer = attention(lambda q, k, value: flash.flash_attn_func(q, k, value, causal=True))
    return with_gradients(layer, attention_inputs(v, dtype, device), attention(sdpa))


def build_linear_attention(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The gated linear attention layer of flash-linear-attention, of equal width and with its own defaults."""
    layers = package("fla.layers", "flash-linear-attention", device)
    return layer_steps(layers.GatedLinearAttention(hidden_size=v["dim"]), v, dtype, device)


def build_mamba(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The Mamba-2 layer of flash-linear-attention, of equal width and with its own defaults.

    It takes its kernels from two more packages, and is slow PyTorch without them.
    """
    layers = package("fla.layers", "flash-linear-attention", device)
    package("causal_conv1d", "causal-conv1d", device)
    package("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm", device)
    return layer_steps(layers.Mamba2(hidden_size=v["dim"]), v, dtype, device)


def layer_steps(layer: torch.nn.Module, v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The modes of a layer of flash-linear-attention, whose result comes first of several."""
    layer.to(device, dtype)
    x = normal(v["batch"], v["length"], v["dim"], seed=9).to(device, dtype).requires_grad_()
    return without_check(with_gradients(lambda x, *_: layer(x)[0], [x, *layer.parameters()]))


def build_convolution(
    v: Values, dtype: torch.dtype, device: torch.device, wrap: Callable[[Mixer], Mixer] = lambda f: f
) -> dict[str, Step]:
    """Causal depthwise convolution over the same offsets, then the same gate: what a mixer costs without wedges."""
    dim, offsets = v["dim"], v["offsets"]
    x, *_, wg, bg = inputs(v, dtype, device)
    taps = normal(len(offsets), dim, seed=3).to(device, dtype).requires_grad_()

    def run(x: Tensor, taps: Tensor, wg: Tensor, bg: Tensor) -> Tensor:
        g = torch.zeros_like(x)
        for tap, offset in zip(taps, offsets, strict=True):
            g = g + tap * eager.shift(x, offset)
        return eager_blend(x, g, wg, bg)

    return without_check(with_gradients(wrap(run), [x, taps, wg, bg]))


def build_convolution_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return build_convolution(v, dtype, device, torch.compile)


def build_roof(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The mixer's matrix products and nothing else, three for each in forward and backward."""
    x, wr, _, wp, _, wg, _ = (t.detach() for t in inputs(v, dtype, device))
    rows = x.flatten(0, 1)
    operands = []
    for weight in (wr, wp, *wg.chunk(2, dim=1)):
        a = normal(rows.shape[0], weight.shape[1]).to(device, dtype)
        g = normal(rows.shape[0], weight.shape[0]).to(device, dtype)
        operands.append((a, weight.contiguous(), g))

    def forward() -> list[Tensor]:
        return [a @ w.T for a, w, _ in operands]

    def both() -> list[Tensor]:
        return forward() + [g @ w for _, w, g in operands] + [g.T @ a for a, _, g in operands]

    return {"forward": forward, "forward+backward": both}


def flops(v: Values, mode: str) -> float:
    dim, rank = v["dim"], v["rank"]
    matrices = dim * rank + dim * rank * (rank - 1) // 2 + 2 * dim * dim
    return 2.0 * matrices * v["batch"] * v["length"] * (3 if "backward" in mode else 1)


def moved(v: Values, mode: str, itemsize: int) -> float:
    """x in, the mixture out; in the backward its gradient in, that of x out, and x again."""
    return float(v["batch"] * v["length"] * v["dim"] * itemsize * (5 if "backward" in mode else 2))


BENCHMARK = Benchmark(
    name="plucker",
    title="Grassmann mixer (reduce to blend), six offsets",
    ours="grassland",
    settings=SETTINGS,
    gpu_settings=GPU_SETTINGS,
    rivals=[
        Rival("grassland", build_ours),
        Rival("grassland, Triton", build_triton),
        Rival("literal eager", build_literal),
        Rival("collapsed eager", build_collapsed),
        Rival("torch.compile, collapsed", build_compiled),
        Rival("causal SDPA sublayer", build_attention),
        Rival("flash-attn sublayer", build_flash, foreign=True),
        Rival("gated linear attention (fla)", build_linear_attention, foreign=True),
        Rival("Mamba-2 (fla)", build_mamba, foreign=True),
        Rival("depthwise convolution", build_convolution),
        Rival("depthwise convolution, torch.compile", build_convolution_compiled),
        Rival("GEMM roof", build_roof),
    ],
    flops=flops,
    moved=moved,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 5e-2},
)
