"""Cross entropy of a linear head over a large vocabulary, in chunks of tokens.

`F.linear_cross_entropy` (torch ≥ 2.14) is not used: its chunked form adds the targets' part of the weight's
gradient by `index_add_`, which is not deterministic on CUDA, and warns or falls back under `torch.compile`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import dispatch
from ...kernels.autograd import differentiable, once, scaled
from ...kernels.launch import without_autocast
from ...kernels.products import boost, product

# Logits alive at a time: 2²⁴ float32 are 64 MiB, enough rows of a 30 k vocabulary for an efficient matrix product. A
# GPU, which has more to fill, gets four times as many.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 24, 1 << 26
# For rows of 30,522 numbers cuBLAS took kernels of an older chip on an H200, at a quarter of its rate.
ALIGNMENT = 64
IGNORE = -100
# Losses and gradients of a chunk's rows; without Triton, or where these backends are asked for, they are PyTorch's.
PLAIN = ("reference", "eager")
ROWS = dispatch.register("linear_cross_entropy", triton=(torch.float32, torch.bfloat16, torch.float16))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of logits x Wᵀ that are never all in memory: equal to `F.cross_entropy(x @ weight.T, labels)`.

    x (…, D), weight (V, D), labels (…) int64 with −100 ignored; reduction "mean" (over labels that count; NaN if none
    does) or "sum"; label_smoothing in [0, 1] as in PyTorch. Gradients are computed chunk by chunk in the forward pass.
    Products run in x's dtype, or in autocast's; softmax, loss and the weight's gradient in float32 (float64 for
    float64). Deterministic. A second derivative raises RuntimeError; the transforms of torch.func and forward mode get
    the whole logits. ValueError for another reduction or smoothing, or shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if x.shape[:-1] != labels.shape or x.shape[-1] != weight.shape[-1]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"x (…, D), weight (V, D) and labels (…) must fit, got {shapes}")
    labels = labels.reshape(-1)
    if dispatch.transformed():
        logits = F.linear(x.reshape(-1, x.shape[-1]), weight)
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    compute = torch.float64 if x.dtype is torch.float64 else compute
    differentiate = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total = _total(x.reshape(-1, x.shape[-1]), weight, labels, label_smoothing, compute, differentiate)[0]
    return total if reduction == "sum" else total / (labels != IGNORE).sum()


@torch.library.custom_op("grassland::linear_cross_entropy", mutates_args=())
def _summed(
    x: Tensor, weight: Tensor, labels: Tensor, smoothing: float, compute: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss of x (N, D) and its gradients by x and weight, float32 or wider; empty unless `differentiate`."""
    accumulate = torch.float64 if x.dtype is torch.float64 else torch.float32
    total = x.new_zeros((), dtype=accumulate)
    grad_x = x.new_empty(x.shape if differentiate else 0, dtype=accumulate)
    larger = boost(compute, 1.0)
    matrix = _padded(weight.to(compute))
    grad_matrix: Tensor | None = None
    fused = dispatch.requested(None) not in PLAIN and dispatch.pick(ROWS, matrix) == "triton"
    # The op's own dtypes hold inside it, not autocast's.
    with without_autocast(x.device.type):
        for rows in _chunks(x.shape[0], matrix):
            features = x[rows].to(compute)
            logits = features @ matrix.t()
            if fused:
                losses, grad = _fused_chunk(logits, labels[rows], weight.shape[0], smoothing, larger, differentiate)
            else:
                losses, grad = _chunk(logits.to(accumulate), labels[rows], weight.shape[0], smoothing, differentiate)
                grad = grad if larger == 1 else grad.mul_(larger)
            total += losses.sum()
            if differentiate:
                grad = grad.to(compute)
                grad_x[rows] = product(grad, matrix)
                grad_matrix = _plus_product(grad_matrix, grad.t(), features, accumulate)
    if not differentiate:
        return total, grad_x, weight.new_empty(0, dtype=accumulate)
    if grad_matrix is None:  # no tokens
        grad_matrix = torch.zeros_like(matrix, dtype=accumulate)
    if larger != 1:
        grad_x /= larger
        grad_matrix /= larger
    return total, grad_x, grad_matrix.resize_(weight.shape)  # without the padding


def _padded(matrix: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of what a GPU's fast products want; a CPU's do without."""
    missing = -matrix.shape[0] % ALIGNMENT
    return matrix if matrix.device.type == "cpu" or not missing else F.pad(matrix, (0, 0, 0, missing))


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`, in place but for the first one."""
    if total is None:
        return product(a, b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(product(a, b))


def _chunks(tokens: int, matrix: Tensor) -> list[slice]:
    elements = CHUNK_ELEMENTS if matrix.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    count = -(-tokens * matrix.shape[0] // elements)
    step = max(1, -(-tokens // max(count, 1)))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _chunk(whole: Tensor, labels: Tensor, vocab: int, smoothing: float, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Losses (n,), and softmax − smoothed onehot (n, V), zero in ignored rows; overwrites the logits `whole`, whose
    columns from `vocab` on are zero and stay so."""
    logits, counted = whole[:, :vocab], labels != IGNORE
    target = torch.where(counted, labels, 0)[:, None]
    normaliser = logits.logsumexp(-1, keepdim=True)
    aimed = logits.gather(1, target)
    if smoothing:
        aimed = aimed.lerp(logits.mean(-1, keepdim=True), smoothing)
    losses = torch.where(counted, (normaliser - aimed)[:, 0], 0)
    if differentiate:
        logits.sub_(normaliser).exp_()
        if smoothing:
            logits.sub_(smoothing / vocab)
        logits.scatter_(1, target, logits.gather(1, target) - (1 - smoothing))
        logits.mul_(counted[:, None])
    return losses, whole


def _fused_chunk(
    logits: Tensor, labels: Tensor, vocab: int, smoothing: float, larger: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """As `_chunk`; the gradient is in the dtype of the logits, and `larger` by that factor."""
    from .fused_cross_entropy import row_losses

    return row_losses(logits, labels, vocab, smoothing, IGNORE, larger, differentiate), logits


@_summed.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, smoothing: float, compute: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    shapes = ((), x.shape, weight.shape) if differentiate else ((), 0, 0)
    total, grad_x, grad_weight = (x.new_empty(shape, dtype=wide) for shape in shapes)
    return total, grad_x, grad_weight


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    # Without this, autograd would write zeros of the weight's size for the two outputs that nobody uses.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [t.dtype for t in inputs[:2]]


def _backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    found = (scaled(saved, grad, dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    return (*once("linear_cross_entropy", *found), None, None, None, None)


_total = differentiable(_summed, _backward, _save)
