"""What a KromHC sublayer is measured against: coefficients, pre-mix, an identity branch, post-mix, and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..kronecker import kronecker_open, kronecker_post, kronecker_pre, kronecker_step
from ..testing import normal
from . import kronecker_gpu
from .rival import Benchmark, Rival, Setting, Step, Values, of_kind, package, with_gradients

SINKHORN = 20
SETTINGS = [
    Setting("2x1024 C768", {"kind": "sublayer", "tokens": 2048, "streams": 4, "dim": 768}),
    Setting("2x1024 C384", {"kind": "sublayer", "tokens": 2048, "streams": 4, "dim": 384}),
    Setting("12 layers 2x512 C768", {"kind": "model", "batch": 2, "length": 512, "depth": 12, "dim": 768}),
]
# Enough work for a large GPU.
GPU_SETTINGS = [
    Setting("8192 C768", {"kind": "sublayer", "tokens": 8192, "streams": 4, "dim": 768}),
    Setting("8192 C2560", {"kind": "sublayer", "tokens": 8192, "streams": 4, "dim": 2560}),
    Setting("12 layers 16x512 C768", {"kind": "model", "batch": 16, "length": 512, "depth": 12, "dim": 768}),
]
VOCABULARY = 512
of_a_sublayer = of_kind("sublayer")


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
    if v["kind"] == "model":
        return training(v, dtype, device, residual="kromhc", init="identity")
    backend = dispatch.fastest(dispatch.OPS["kronecker_pre"], device, dtype)

    def run(x: Tensor, *weights: Tensor, backend: str = backend) -> Tensor:
        x, u, h = kronecker_open(x, *fold(x, *weights), backend=backend)
        return kronecker_post(x, u, h, backend=backend)

    return with_gradients(run, inputs(v, dtype, device, 2 * stages(v)), partial(run, backend="reference"))


@of_kind("model")
def build_plain(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return training(v, dtype, device, residual="plain")


def training(v: Values, dtype: torch.dtype, device: torch.device, **options: Any) -> dict[str, Step]:
    """A training step of the paper's model of this depth; `init="identity"` makes the first loss the plain model's."""
    from ...archs import create_model

    torch.manual_seed(0)
    model = create_model(f"kromhc_lm_{v['depth']}l", vocab_size=VOCABULARY, max_len=v["length"], **options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda")
    ids = torch.randint(VOCABULARY, (v["batch"], v["length"] + 1), device=device)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(ids[:, :-1], labels=ids[:, 1:])

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"training step": step, "check": loss}


def build_fused(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """A sublayer inside a deep network: its end and the beginning of the next in one kernel."""
    backend = dispatch.fastest(dispatch.OPS["kronecker_pre"], device, dtype)
    x, *weights = inputs(v, dtype, device, 2 * stages(v))
    with torch.no_grad():
        y, h = kronecker_pre(x, *fold(x, *weights), backend=backend)

    def run(x: Tensor, y: Tensor, h: Tensor, *weights: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
        return kronecker_step(x, y, h, *fold(x, *weights), backend=backend)

    tensors = [x, y.requires_grad_(), h.requires_grad_(), *weights]
    return with_gradients(run, tensors, partial(run, backend="reference"))


def build_official(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(sublayer(kromhc_matrix), inputs(v, dtype, device, 2 * stages(v)))


def build_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(torch.compile(sublayer(kromhc_matrix)), inputs(v, dtype, device, 2 * stages(v)))


def build_mhc(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return with_gradients(sublayer(mhc_matrix), inputs(v, dtype, device, v["streams"] ** 2), mhc_layer)


def build_mhc_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    compiled = torch.compile(sublayer(mhc_matrix))
    return with_gradients(compiled, inputs(v, dtype, device, v["streams"] ** 2), mhc_layer)


def mhc_layer(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor, b_alpha: Tensor, b_beta: Tensor) -> Tensor:
    """grassland's own mHC with the weights of the rivals."""
    from ...archs import MHC

    n, one = x.shape[-2], x.new_ones(1)

    def by_stream(columns: Tensor) -> Tensor:
        return torch.cat([columns[..., :n, None], columns[..., n:].unflatten(-1, (n, n))], -1)

    names = {"static_alpha": by_stream(b_alpha), "static_beta": b_beta, "norm.gamma": gamma}
    names |= {"dynamic_alpha_fn": by_stream(alpha).flatten(-2), "dynamic_beta_fn": beta}
    names |= {"pre_branch_scale": one, "residual_scale": one, "h_post_scale": one[0]}
    layer = MHC(torch.nn.Identity(), x.shape[-1], num_streams=n, device="meta")
    return torch.func.functional_call(layer, names, (x,))


def build_peer(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """hyper-connections from PyPI: its mHC, streams packed into the batch."""
    peer = package("hyper_connections", "hyper-connections")
    layer = peer.mHC(v["streams"], dim=v["dim"], branch=torch.nn.Identity(), layer_index=0).to(device, dtype)
    names = [name for name, _ in layer.named_parameters()]
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter += normal(*parameter.shape, seed=seed, scale=0.02).to(parameter)
    x = normal(v["streams"], v["tokens"], v["dim"]).to(device, dtype).requires_grad_()

    def truth(x: Tensor, *weights: Tensor) -> Tensor:
        return peer_layer(x, **{name.replace(".", "_"): w for name, w in zip(names, weights, strict=True)})

    return with_gradients(lambda x, *_: layer(x), [x, *layer.parameters()], truth)


def peer_layer(
    x: Tensor,
    static_alpha: Tensor,
    dynamic_alpha_fn: Tensor,
    pre_branch_scale: Tensor,
    residual_scale: Tensor,
    static_beta: Tensor,
    dynamic_beta_fn: Tensor,
    h_post_scale: Tensor,
    norm_gamma: Tensor,
) -> Tensor:
    """What that package computes for streams (n, T, C): every stream norms itself and has its own row of the mixing,
    which is applied transposed."""
    n = x.shape[0]
    x = x.movedim(0, -2)
    normed = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (1 + norm_gamma)
    scale = torch.cat([pre_branch_scale, residual_scale.expand(n)])
    alpha = static_alpha + scale * (normed @ dynamic_alpha_fn[0])
    beta = 2 * (static_beta + h_post_scale * (normed @ dynamic_beta_fn)).sigmoid()
    y = (alpha[..., :1].sigmoid() * x).sum(-2, keepdim=True)
    return (mhc_matrix(alpha[..., 1:].flatten(-2)).mT @ x + beta.unsqueeze(-1) * y).movedim(-2, 0)


def build_copy(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The bytes of the two-kernel form, copied: 14C elements a token forward, 37C with the backward."""
    source = {mode: normal(c * v["tokens"] * v["dim"] // 2).to(device, dtype) for mode, c in COPIED.items()}
    target = {mode: torch.empty_like(t) for mode, t in source.items()}
    return {mode: lambda mode=mode: target[mode].copy_(source[mode]) for mode in COPIED}


COPIED = {"forward": 14, "forward+backward": 37}


def flops(v: Values, mode: str) -> float:
    if v["kind"] == "model":
        return 6.0 * v["batch"] * v["length"] * block_weights(v)
    n, k = v["streams"], stages(v)
    products = 2 * n * v["dim"] * (2 * n + k) * (3 if "backward" in mode else 1)
    return float(v["tokens"] * products)


def moved(v: Values, mode: str, itemsize: int) -> float:
    """Elements of the two-kernel form at n = 4: 14C forward, 23C backward. Of a training step: the blocks' weights and
    AdamW's moments read and written, the gradients written and read."""
    if v["kind"] == "model":
        return 8.0 * itemsize * block_weights(v)
    return float(v["tokens"] * v["dim"] * itemsize * COPIED[mode] * v["streams"] / 4)


def block_weights(v: Values) -> int:
    """Those of attention (4 C^2) and a four times as wide ffn (8 C^2)."""
    return 12 * v["depth"] * v["dim"] ** 2


BENCHMARK = Benchmark(
    name="kronecker",
    title="Hyper-connection sublayer, identity branch, four streams; a training step",
    ours="grassland",
    settings=SETTINGS,
    gpu_settings=GPU_SETTINGS,
    rivals=[
        Rival("grassland", build_ours),
        Rival("plain residual", build_plain),
        Rival("grassland, boundary-fused", of_a_sublayer(build_fused)),
        Rival("official KromHC, eager", of_a_sublayer(build_official)),
        Rival("official KromHC, torch.compile", of_a_sublayer(build_compiled)),
        Rival("mHC, eager", of_a_sublayer(build_mhc)),
        Rival("mHC, torch.compile", of_a_sublayer(build_mhc_compiled)),
        Rival("hyper-connections (PyPI) mHC", of_a_sublayer(build_peer), foreign=True),
        *(Rival(name, of_a_sublayer(builder), foreign=True) for name, builder in kronecker_gpu.BUILDERS.items()),
        Rival("copy of the same bytes", of_a_sublayer(build_copy)),
    ],
    flops=flops,
    moved=moved,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 3e-2},
)
