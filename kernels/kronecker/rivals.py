"""What a KromHC sublayer is measured against: coefficients, pre-mix, an identity branch, post-mix, and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..bench import Benchmark, Rival, Setting, Step, Unavailable, with_gradients
from ..testing import normal
from . import kronecker_open, kronecker_post, kronecker_pre, kronecker_step

Values = dict[str, Any]
SINKHORN = 20
SETTINGS = [
    Setting("2x1024 C768", {"tokens": 2048, "streams": 4, "dim": 768}),
    Setting("2x1024 C384", {"tokens": 2048, "streams": 4, "dim": 384}),
]


def inputs(v: Values, dtype: torch.dtype, device: torch.device, logits: int) -> list[Tensor]:
    """Streams (1, T, n, C), then gamma, dynamic alpha and beta, static alpha and beta of the official programs."""
    n, dim = v["streams"], v["dim"]
    width = n * dim
    streams = normal(1, v["tokens"], n, dim).to(device, dtype).requires_grad_()
    shapes = [(width,), (width, n + logits), (width, n), (n + logits,), (n,)]
    weights = [normal(*shape, seed=k + 1, scale=0.02).to(device, torch.float32) for k, shape in enumerate(shapes)]
    return [streams, *(weight.requires_grad_() for weight in weights)]


def gates(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor, b_alpha: Tensor, b_beta: Tensor) -> tuple[Tensor, ...]:
    """x' W for pre, post and mixing, as the official programs write it."""
    n, flat = x.shape[-2], x.flatten(-2).float()
    normed = F.normalize(flat, dim=-1) * flat.shape[-1] ** 0.5 * (1 + gamma)
    pre, mixing = (normed @ alpha + b_alpha).split([n, alpha.shape[1] - n], -1)
    return pre.sigmoid(), 2 * (normed @ beta + b_beta).sigmoid(), mixing


def sublayer(matrix: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The official formulation around an identity branch, H_res from its logits by `matrix`."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        pre, post, mixing = gates(x, *weights)
        y = torch.einsum("...n,...nc->...c", pre, x.float()).to(x.dtype)
        mixed = torch.einsum("...ij,...jc->...ic", matrix(mixing), x.float())
        return (mixed + torch.einsum("...n,...c->...nc", post, y.float())).to(x.dtype)

    return run


def permutation_sum(logits: Tensor, size: int) -> Tensor:
    orders = torch.tensor(list(itertools.permutations(range(size))), device=logits.device)
    return torch.einsum("...m,mij->...ij", logits.softmax(-1), torch.eye(size, device=logits.device)[orders])


def kromhc_matrix(logits: Tensor) -> Tensor:
    u = permutation_sum(logits.unflatten(-1, (-1, 2)), 2)
    product = u[..., 0, :, :]
    for k in range(1, u.shape[-3]):
        product = torch.einsum("...ab,...ij->...aibj", product, u[..., k, :, :]).flatten(-2).flatten(-3, -2)
    return product


def mhc_matrix(logits: Tensor) -> Tensor:
    n = int(logits.shape[-1] ** 0.5)
    h = logits.unflatten(-1, (n, n)).exp()
    for _ in range(SINKHORN):
        h = h / h.sum(-2, keepdim=True)
        h = h / h.sum(-1, keepdim=True)
    return h


def fold(
    x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor, b_alpha: Tensor, b_beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernels' weight and bias: logit differences, gamma and sqrt(nC) folded in."""
    n, scale = x.shape[-2], x[0, 0].numel() ** 0.5 * (1 + gamma)
    difference = alpha[:, n + 1 :: 2] - alpha[:, n::2]
    weight = (torch.cat([alpha[:, :n], beta, difference], 1) * scale[:, None]).T
    return weight, torch.cat([b_alpha[:n], b_beta, b_alpha[n + 1 :: 2] - b_alpha[n::2]])


def stages(v: Values) -> int:
    return v["streams"].bit_length() - 1


def build_ours(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    backend = dispatch.preferred(device.type)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        x, u, h = kronecker_open(x, *fold(x, *weights), backend=backend)
        return kronecker_post(x, u, h, backend=backend)

    return with_gradients(run, inputs(v, dtype, device, 2 * stages(v)))


def build_fused(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """A sublayer inside a deep network: its end and the beginning of the next in one kernel."""
    backend = dispatch.preferred(device.type)
    x, *weights = inputs(v, dtype, device, 2 * stages(v))
    with torch.no_grad():
        y, h = kronecker_pre(x, *fold(x, *weights), backend=backend)
    y, h = y.requires_grad_(), h.requires_grad_()

    grads = [torch.ones_like(x), torch.ones_like(y), torch.ones_like(h)]

    def both() -> tuple[Tensor, ...]:
        outs = kronecker_step(x, y, h, *fold(x, *weights), backend=backend)
        return torch.autograd.grad(outs, [x, y, h, *weights], grads)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return kronecker_step(x, y, h, *fold(x, *weights), backend=backend)

    return {"forward": forward, "forward+backward": both}


def build_official(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(sublayer(kromhc_matrix), inputs(v, dtype, device, 2 * stages(v)))


def build_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        return with_gradients(torch.compile(sublayer(kromhc_matrix)), inputs(v, dtype, device, 2 * stages(v)))
    except BackendCompilerFailed as error:
        raise Unavailable(str(error).splitlines()[0]) from error


def build_mhc(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    steps = with_gradients(sublayer(mhc_matrix), inputs(v, dtype, device, v["streams"] ** 2))
    return {mode: step for mode, step in steps.items() if mode != "check"}


def build_mhc_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    steps = with_gradients(torch.compile(sublayer(mhc_matrix)), inputs(v, dtype, device, v["streams"] ** 2))
    return {mode: step for mode, step in steps.items() if mode != "check"}


def build_peer(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """hyper-connections from PyPI: its mHC, streams packed into the batch."""
    try:
        from hyper_connections import mHC  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable(f"pip install hyper-connections: {error}") from error
    layer = mHC(v["streams"], dim=v["dim"], branch=torch.nn.Identity(), layer_index=0).to(device, dtype)
    x = normal(v["streams"], v["tokens"], v["dim"]).to(device, dtype).requires_grad_()
    steps = with_gradients(lambda x, *_: layer(x), [x, *layer.parameters()])
    return {mode: step for mode, step in steps.items() if mode != "check"}


def build_copy(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The bytes of the two-kernel form, copied: 14C elements a token forward, 37C with the backward."""
    source = {mode: normal(c * v["tokens"] * v["dim"] // 2).to(device, dtype) for mode, c in COPIED.items()}
    target = {mode: torch.empty_like(t) for mode, t in source.items()}
    return {mode: lambda mode=mode: target[mode].copy_(source[mode]) for mode in COPIED}


COPIED = {"forward": 14, "forward+backward": 37}


def flops(v: Values, mode: str) -> float:
    n, k = v["streams"], stages(v)
    products = 2 * n * v["dim"] * (2 * n + k) * (3 if "backward" in mode else 1)
    return float(v["tokens"] * products)


def moved(v: Values, mode: str, itemsize: int) -> float:
    """Elements of the two-kernel form at n = 4: 14C forward, 23C backward."""
    return float(v["tokens"] * v["dim"] * itemsize * COPIED[mode] * v["streams"] / 4)


BENCHMARK = Benchmark(
    name="kronecker",
    title="Hyper-connection sublayer, identity branch, four streams",
    ours="grassland",
    settings=SETTINGS,
    rivals=[
        Rival("grassland", build_ours),
        Rival("grassland, boundary-fused", build_fused),
        Rival("official KromHC, eager", build_official),
        Rival("official KromHC, torch.compile", build_compiled),
        Rival("mHC, eager", build_mhc),
        Rival("mHC, torch.compile", build_mhc_compiled),
        Rival("hyper-connections (PyPI) mHC", build_peer),
        Rival("copy of the same bytes", build_copy),
    ],
    flops=flops,
    moved=moved,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 3e-2},
)
