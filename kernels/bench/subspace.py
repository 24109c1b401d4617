"""What the subspace ops are measured against: `python -m grassland.kernels.bench subspace`.

Settings of kind "step" time the optimiser's step on one class weight, those of kind "head" the loss with its gradients;
a rival of one kind has nothing to say about the other. Steps run in place, again and again on the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..subspace import eager, grassmann_step_, reference, subspace_cross_entropy
from ..subspace.cases import SCALE, orthonormal
from ..subspace.op import CROSS_ENTROPY, STEP
from ..testing import normal
from .rival import Benchmark, Builder, Rival, Setting, Step, Values, of_kind, package

LR, MOMENTUM = 0.1, 0.9

SETTINGS = [
    Setting("step n=2048", {"kind": "step", "classes": 1000, "k": 8, "n": 2048}),
    Setting("step n=384", {"kind": "step", "classes": 1000, "k": 8, "n": 384}),
    Setting("head n=384", {"kind": "head", "classes": 1000, "k": 8, "n": 384, "batch": 1024}),
    Setting("head n=2048", {"kind": "head", "classes": 1000, "k": 8, "n": 2048, "batch": 1024}),
]


def draw(rows: int, width: int, seed: int, device: torch.device) -> Tensor:
    return normal(rows, width, seed=seed).to(device, torch.float32)


def stepping(v: Values, device: torch.device) -> list[Tensor]:
    """Weight, momentum and gradient in float32, as in training; a step turns a subspace by some hundredths."""
    rows, n = v["classes"] * v["k"], v["n"]
    weight = orthonormal(v["classes"], v["k"], n).float().to(device)
    return [weight, 0.3 * draw(rows, n, 1, device) / n**0.5, 0.03 * draw(rows, n, 2, device) / n**0.5]


def stepper(
    v: Values, device: torch.device, step: Callable[[Tensor, Tensor, Tensor], None], comparable: bool = True
) -> dict[str, Step]:
    """The modes of a step (weight, buffer, grad) that overwrites weight and buffer."""
    tensors = stepping(v, device)

    def check() -> Tensor:
        fresh = stepping(v, device)
        step(*fresh)
        return fresh[0]

    return {"step": lambda: step(*tensors)} | ({"check": check} if comparable else {})


def step_rival(step: Callable[[Tensor, Tensor, Tensor, int], None], comparable: bool = True) -> Builder:
    @of_kind("step")
    def build(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
        return stepper(v, device, lambda w, b, g: step(w, b, g, v["k"]), comparable)

    return build


def our_step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
    backend = dispatch.fastest(STEP, weight.device, weight.dtype)
    grassmann_step_(weight, buffer, grad, k, LR, MOMENTUM, backend=backend)


def eager_step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
    grassmann_step_(weight, buffer, grad, k, LR, MOMENTUM, backend="eager")


def build_compiled_step(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    compiled = torch.compile(eager.grassmann_step)

    def step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
        moved, stored = compiled(weight, buffer, grad, k, LR, MOMENTUM, "official")
        weight.copy_(moved)
        buffer.copy_(stored)

    return step_rival(step)(v, dtype, device)


def official_step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
    """The official program's mathematics: project, SVD, geodesic."""
    moved, stored = reference.grassmann_step(weight, buffer, grad, k, LR, MOMENTUM, "official")
    weight.copy_(moved)
    buffer.copy_(stored)


def pogo_step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
    """A step of POGO's kind: the relative gradient, then a proximal step to the Stiefel manifold, by batched products.

    With wide orthonormal rows X: F = (X X^T M - X M^T X) / 2, Y = X - lr F, X+ = Y + (I - Y Y^T) Y / 2.
    """
    buffer.mul_(MOMENTUM).add_(grad)
    x, m = weight.view(-1, k, weight.shape[1]), buffer.view(-1, k, weight.shape[1])
    gram, cross = torch.bmm(x, x.mT), torch.bmm(x, m.mT)
    y = torch.baddbmm(x, gram, m, alpha=-LR / 2)
    y.baddbmm_(cross, x, alpha=LR / 2)
    moved = torch.baddbmm(y, torch.bmm(y, y.mT), y, beta=1.5, alpha=-0.5)
    x.copy_(moved)


def momentum_sgd_step(weight: Tensor, buffer: Tensor, grad: Tensor, k: int) -> None:
    """Plain momentum SGD on the same tensors: what no step on them undercuts."""
    buffer.mul_(MOMENTUM).add_(grad)
    weight.add_(buffer, alpha=-LR)


@of_kind("step")
def build_momentum_sgd(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """torch.optim.SGD, fused."""
    weight, _, grad = stepping(v, device)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = grad
    optimizer = torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, fused=True)
    return {"step": optimizer.step}


@of_kind("step")
def build_pogo(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The optimiser of pogo-torch, with the same momentum."""
    pogo = package("pogo", "pogo-torch")
    weight, _, grad = (t.view(-1, v["k"], v["n"]) for t in stepping(v, device))
    parameter = torch.nn.Parameter(weight)
    parameter.grad = grad
    base = package("pogo.base", "pogo-torch").SGD(momentum=MOMENTUM)
    return {"step": pogo.POGO([parameter], base, lr=LR).step}


@of_kind("step")
def build_geoopt(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """geoopt's RiemannianSGD on its Euclidean Stiefel manifold, with the same momentum."""
    geoopt = package("geoopt", "geoopt")
    weight, _, grad = stepping(v, device)
    columns = [t.view(-1, v["k"], v["n"]).mT.contiguous() for t in (weight, grad)]
    parameter = geoopt.ManifoldParameter(columns[0], manifold=geoopt.EuclideanStiefel())
    parameter.grad = columns[1]
    optimizer = geoopt.optim.RiemannianSGD([parameter], lr=LR, momentum=MOMENTUM)
    return {"step": optimizer.step}


def head_inputs(v: Values, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = draw(v["batch"], v["n"], 3, device).to(dtype).requires_grad_()
    weight = orthonormal(v["classes"], v["k"], v["n"]).to(device, dtype).requires_grad_()
    labels = torch.randint(v["classes"], (v["batch"],), generator=torch.Generator(device).manual_seed(4), device=device)
    return x, weight, labels


def head_rival(loss: Callable[[Tensor, Tensor, Tensor, int], Tensor], comparable: bool = True) -> Builder:
    """loss(x, weight, labels, k)."""

    @of_kind("head")
    def build(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
        x, weight, labels = head_inputs(v, dtype, device)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(x, weight, labels, v["k"]), (x, weight))

        return {"forward+backward": both} | ({"check": both} if comparable else {})

    return build


def our_loss(x: Tensor, weight: Tensor, labels: Tensor, k: int) -> Tensor:
    backend = dispatch.fastest(CROSS_ENTROPY, weight.device, weight.dtype)
    return subspace_cross_entropy(x, weight, labels, k, SCALE, backend=backend)


def composed_loss(x: Tensor, weight: Tensor, labels: Tensor, k: int) -> Tensor:
    z = (F.normalize(x, dim=-1) @ weight.T).unflatten(-1, (-1, k))
    return F.cross_entropy(SCALE * torch.linalg.vector_norm(z, dim=-1), labels)


def vector_rival(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Builder:
    """loss(x, weight, labels) of one row a class: another function, k times smaller."""
    build = head_rival(lambda x, weight, labels, _: loss(x, weight, labels), comparable=False)
    return lambda v, dtype, device: build({**v, "k": 1}, dtype, device)


def linear_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels)


def cosine_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * F.linear(F.normalize(x), F.normalize(weight)), labels)


@of_kind("head")
def build_liger(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The linear head with liger-kernel's fused cross entropy, which writes no logits; held to the same in float64."""
    liger = package("liger_kernel.transformers", "liger-kernel", device)
    fused = liger.LigerFusedLinearCrossEntropyLoss()
    x, weight, labels = head_inputs({**v, "k": 1}, dtype, device)
    a, b = (t.detach().double().requires_grad_() for t in (x, weight))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(weight, x, labels), (x, weight))

    def truth() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_loss(a, b, labels), (a, b))

    return {"forward+backward": both, "check": both, "truth": truth}


def metric_loss_rival(name: str, centres: str) -> Builder:
    """A loss of pytorch-metric-learning with k centres a class; `centres` is what it calls their number."""

    @of_kind("head")
    def build(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
        losses = package("pytorch_metric_learning.losses", "pytorch-metric-learning")
        options = {"num_classes": v["classes"], "embedding_size": v["n"], centres: v["k"]}
        loss = getattr(losses, name)(**options).to(device, dtype)
        x, _, labels = head_inputs(v, dtype, device)
        return {"forward+backward": lambda: torch.autograd.grad(loss(x, labels), (x, *loss.parameters()))}

    return build


def build_compiled(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    return head_rival(torch.compile(composed_loss))(v, dtype, device)


@of_kind("head")
def build_roof(v: Values, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The head's three matrix products and nothing else."""
    x, weight, _ = (t.detach() for t in head_inputs(v, dtype, device))
    z = x @ weight.T
    return {"forward+backward": lambda: (x @ weight.T, z @ weight, z.T @ x)}


def flops(v: Values, mode: str) -> float:
    rows = v["classes"] * v["k"]
    if v["kind"] == "step":
        # the Gram matrix of 2k rows, by symmetry, and k rows made of 2k
        return 2.0 * rows * v["n"] * (2 * v["k"] + 0.5 + 2 * v["k"])
    return 6.0 * v["batch"] * rows * v["n"]


def moved(v: Values, mode: str, itemsize: int) -> float:
    weight = v["classes"] * v["k"] * v["n"]
    if v["kind"] == "step":
        return 5.0 * 4 * weight
    return float(itemsize * (2 * weight + 2 * v["batch"] * v["n"]))


BENCHMARK = Benchmark(
    name="subspace",
    title="Grassmann class head: optimiser step, and loss with gradients",
    ours="grassland",
    settings=SETTINGS,
    rivals=[
        Rival("grassland", lambda *a: step_rival(our_step)(*a) | head_rival(our_loss)(*a)),
        Rival("composed eager", lambda *a: step_rival(eager_step)(*a) | head_rival(composed_loss)(*a)),
        Rival("torch.compile, composed head", build_compiled),
        Rival("torch.compile, composed step", build_compiled_step),
        Rival("official SVD geodesic", step_rival(official_step), recordable=False),
        Rival("geoopt EuclideanStiefel SGD", build_geoopt, foreign=True, recordable=False),
        Rival("POGO, batched products", step_rival(pogo_step, comparable=False)),
        Rival("pogo-torch", build_pogo, foreign=True, recordable=False),
        Rival("momentum SGD, eager", step_rival(momentum_sgd_step, comparable=False)),
        Rival("momentum SGD, torch fused", build_momentum_sgd),
        Rival("GEMM roof", build_roof),
        Rival("linear head", vector_rival(linear_loss)),
        Rival("Liger fused linear cross entropy", build_liger, foreign=True),
        Rival("cosine head", vector_rival(cosine_loss)),
        *(
            Rival(f"{name}, k centres", metric_loss_rival(f"{name}Loss", centres), foreign=True, recordable=False)
            for name, centres in {"SubCenterArcFace": "sub_centers", "SoftTriple": "centers_per_class"}.items()
        ),
    ],
    flops=flops,
    moved=moved,
)
