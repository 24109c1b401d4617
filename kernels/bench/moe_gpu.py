"""The experts of other people's packages on an NVIDIA GPU, as rivals of ours.

Each function checks that its package is there, and gives (x (T, H), gates, choice (T, K), w_up, b_up, w_down, b_down)
-> (T, H); but SonicMoE routes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rival import package

Experts = Callable[..., Tensor]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def scattermoe(device: torch.device) -> Experts:
    """ScatterMoE's two linear maps, which gather and scatter as they multiply."""
    scatter = package("scattermoe", "git+https://github.com/shawntan/scattermoe", device)
    # As torch multiplies by default.
    scatter.kernels.ops.ALLOW_TF32 = False

    def run(x: Tensor, gates: Tensor, experts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        order = scatter.flatten_sort_count(experts, num_experts=len(w1))
        h = scatter.parallel_linear(x, w1.mT, experts.shape[1], *order, expert_biases=b1, grouped_out=True)
        return scatter.parallel_linear(gelu(h), w2.mT, 1, *order, expert_biases=b2, gates=gates, grouped_in=True)

    return run


def triton_kernels(device: torch.device) -> Experts:
    """Triton's own ragged matrix product, which has no backward; triton-kernels on PyPI is another package."""
    install = "'git+https://github.com/triton-lang/triton#subdirectory=python/triton_kernels'"
    product = package("triton_kernels.matmul", install, device)
    tensor = package("triton_kernels.tensor", install, device)

    def run(x: Tensor, gates: Tensor, experts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        pairs = experts.flatten()
        order = pairs.sort(stable=True).indices
        counts = (pairs == torch.arange(len(w1), device=x.device)[:, None]).sum(1, dtype=torch.int32)
        common: dict[str, Any] = {"a_ragged_metadata": tensor.make_ragged_tensor_metadata(counts, len(pairs))}
        common["precision_config"] = product.PrecisionConfig(allow_tf32=False)
        at, weights = order.int(), gates.flatten()[order].float()
        h = product.matmul(x, w1.mT, b1.float(), gather_indx=at // experts.shape[1], **common)
        rows = product.matmul(gelu(h), w2.mT, b2.float(), scatter_indx=at, gammas=weights, **common)
        return rows.view(*experts.shape, -1).sum(1)

    return run


def sonicmoe(device: torch.device, top_k: int) -> Experts:
    """SonicMoE from router to combination: (x, router, weights) -> (T, H), with the raw probabilities as gates."""
    sonic = package("sonicmoe", "sonic-moe", device)
    kind = package("sonicmoe.enums", "sonic-moe", device).ActivationType.SWIGLU

    def run(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        # It wants the experts last in shape and first in memory.
        up, down = w1.permute(1, 2, 0), w2.permute(1, 2, 0)
        stream = torch.cuda.current_stream(device).cuda_stream
        options = {"is_softmax_over_topk": False, "is_inference_mode_enabled": not torch.is_grad_enabled()}
        return sonic.moe_TC_softmax_topk_layer(x, router, up, b1, down, b2, top_k, stream, kind, **options)[0]

    return run
