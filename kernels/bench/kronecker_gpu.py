"""The mHC of other people's packages on an NVIDIA GPU, each around an identity branch, as rivals of KromHC's sublayer.

All three compute the published equations, and differ in the order of their axes and in which way H_res is applied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..testing import normal
from .rival import Builder, Step, Unavailable, Values, package, with_gradients

SINKHORN, EPS = 20, 1e-6


def equations(x: Tensor, phi: Tensor, bias: Tensor, scales: Tensor, transposed: bool) -> Tensor:
    """mHC (arXiv 2512.24880) around an identity branch for streams (…, n, C).

    phi (nC, 2n + n²), bias and the three scales stand for pre, post and H_res, in this order. transposed: H_resᵀ is
    applied. Rows come first in Sinkhorn's steps.
    """
    n = x.shape[-2]
    flat = x.flatten(-2)
    projected = flat @ phi * (flat.square().mean(-1, keepdim=True) + EPS).rsqrt()
    sizes = [n, n, n * n]
    logits = zip(projected.split(sizes, -1), bias.split(sizes), scales, strict=True)
    pre, post, mixing = (scale * part + shift for part, shift, scale in logits)
    h = mixing.unflatten(-1, (n, n)).softmax(-1)
    for _ in range(SINKHORN - 1):
        h = h / h.sum(-2, keepdim=True)
        h = h / h.sum(-1, keepdim=True)
    h = h / h.sum(-2, keepdim=True)
    y = (pre.sigmoid().unsqueeze(-1) * x).sum(-2, keepdim=True)
    return (h.mT if transposed else h) @ x + 2 * post.sigmoid().unsqueeze(-1) * y


def liger_truth(x: Tensor, phi: Tensor, bias: Tensor, *scales: Tensor) -> Tensor:
    return equations(x, phi, bias, torch.stack(scales), transposed=False)


def tile_kernels_truth(x: Tensor, phi: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
    return equations(x, phi.T, bias, scales, transposed=True)


def transformer_engine_truth(x: Tensor, phi: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
    """Streams last: x is (T, 1, C, n), and so are the rows of phi."""
    rows = phi.unflatten(-1, x.shape[-2:]).mT.flatten(-2)
    return equations(x.mT, rows.T, bias[0], scales, transposed=True).mT


def coefficients(v: Values, device: torch.device) -> list[Tensor]:
    """phi (2n + n², nC), bias (2n + n²) and three scales, in float32."""
    n, dim = v["streams"], v["dim"]
    rows = 2 * n + n * n
    tensors = [normal(rows, n * dim, seed=1, scale=0.02), normal(rows, seed=2, scale=0.02), torch.ones(3)]
    return [t.to(device, torch.float32).requires_grad_() for t in tensors]


def streams(v: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    return normal(1, v["tokens"], v["streams"], v["dim"]).to(device, dtype).requires_grad_()


def build_liger(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """LigerMHC, its projection in the dtype of the streams, as its documentation advises."""
    liger = package("liger_kernel.transformers", "liger-kernel", device)
    single = dtype == torch.float32
    layer = liger.LigerMHC(torch.nn.Identity(), hc=v["streams"], c=v["dim"], phi_dtype=dtype, allow_fp32=single)
    phi, bias, _ = coefficients(v, device)
    with torch.no_grad():
        layer.phi.copy_(phi.T)
        layer.b.copy_(bias)
    tensors = [streams(v, dtype, device), *layer.to(device).parameters()]
    modes = with_gradients(lambda x, *_: layer(x), tensors, liger_truth)
    return modes | {name: scales_together(modes[name]) for name in ("check", "truth")}


def scales_together(step: Step) -> Step:
    """The gradients of the three scales, which come last, as one tensor: one alone can all but cancel."""

    def run() -> tuple[Tensor, ...]:
        *others, pre, post, mixing = step()
        return (*others, torch.stack([pre, post, mixing]))

    return run


def build_transformer_engine(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The functions of transformer_engine.pytorch.triton.mhc, which have streams last and float32 coefficients."""
    mhc = package("transformer_engine.pytorch.triton.mhc", "'transformer-engine[pytorch]>=2.20'", device)
    only_four(v)
    phi, bias, scales = coefficients(v, device)
    reduced = dtype != torch.float32

    def run(x: Tensor, phi: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
        u, post, mixing = mhc.mhc_generate_mix_and_aggregate(x, phi, scales, bias, use_tf32=reduced)
        return mhc.mhc_fused_expand_combine(u, None, post, x, mixing, v["streams"], use_tf32=reduced)

    x = streams(v, dtype, device).detach().movedim(0, 1).mT.contiguous().requires_grad_()
    return with_gradients(run, [x, phi, bias.detach()[None].requires_grad_(), scales], transformer_engine_truth)


def build_tile_kernels(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """mhc_pre and mhc_post of tile_kernels.modeling.mhc, which version 2 has no more."""
    modeling = package("tile_kernels.modeling.mhc.functional", "'tile-kernels<2'", device)
    only_four(v)
    if dtype != torch.bfloat16:
        raise Unavailable("tile-kernels has mHC for bfloat16 alone")

    def run(x: Tensor, phi: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
        options = {"pre_eps": 0.0, "post_mult_value": 2.0, "sinkhorn_repeat": SINKHORN}
        u, (post, mixing) = modeling.mhc_pre(x, phi, scales, bias, **options)
        return modeling.mhc_post(u, x, post, mixing)

    return with_gradients(run, [streams(v, dtype, device), *coefficients(v, device)], tile_kernels_truth)


def only_four(v: Values) -> None:
    if v["streams"] != 4:
        raise Unavailable(f"has four streams alone, not {v['streams']}")


BUILDERS: dict[str, Builder] = {
    "LigerMHC": build_liger,
    "TransformerEngine mHC": build_transformer_engine,
    "TileKernels mHC": build_tile_kernels,
}
