"""The mixture of experts that WideNet shares across depth."""

from __future__ import annotations

import math
from numbers import Real
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from ...kernels.dispatch import transformed
from ...kernels.launch import without_autocast
from ...kernels.moe import Routing, expert_capacity, moe_ffn, moe_route
from ..checks import check_dropout, check_input, check_positive
from ..init import INIT_STD
from ..registry import register_slot


@register_slot("ffn", "shared_moe")
class SharedMoE(nn.Module):
    """Top-k mixture of experts: (…, dim) → (y (…, dim), balance loss), for one block or for all of them.

    Each expert is Linear(dim, hidden_dim) → GELU(tanh) → Dropout → Linear(hidden_dim, dim) → Dropout. In training the
    router's logits get normal noise of standard deviation 1/E, and an expert takes its first
    int(T · capacity_factor · top_k // E) tokens, T being all tokens of the call; a pair that finds no place adds
    nothing. Source: arXiv 2107.11817.

    num_experts, top_k: E and the experts a token, 1 ≤ top_k ≤ E. capacity_factor: > 0, None drops nothing.
    balance_weight: factor of the balance loss E Σ m_e P_e, ≥ 0. noise: whether training perturbs the logits.
    renormalize: gates of a token sum to 1. official_capacity: one place an expert fewer, as in the official program.
    drop_at_eval: capacity holds in evaluation too, where by default nothing is dropped, so that a token's output does
    not depend on its batch. out_act: None, or "gelu" on the experts' outputs. dropout: both rates, in [0, 1).

    `routing` is that of the last call, and `load()` its statistics; calls under torch.compile and the transforms of
    torch.func leave both as they are. `tally` (2, E) int64 counts the assignments and the kept pairs of all calls in
    training, on the device, compiled ones too; who reads it may zero it. DistributedDataParallel overwrites it with the
    first process's unless broadcast_buffers=False. ValueError names a bad argument.

    With torch.distributed initialised, a call in training adds up the assignments of all processes (one all_reduce of
    E + 1 numbers) for the balance loss, so every process must make as many calls.
    """

    # The experts drop their own outputs; a residual around them need not do so again.
    drops = True
    takes_mask = True
    # Biases, of which each expert has a row.
    optim_groups: ClassVar[dict[str, str]] = {"b_up": "no_decay", "b_down": "no_decay"}
    group_options = ("num_experts", "top_k", "capacity_factor")

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float | None = 1.2,
        balance_weight: float = 0.01,
        noise: bool = True,
        renormalize: bool = False,
        official_capacity: bool = False,
        drop_at_eval: bool = False,
        out_act: str | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, top_k=top_k)
        _check_options(num_experts, top_k, capacity_factor, balance_weight, out_act, dropout)
        dd = {"device": device, "dtype": dtype}
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.balance_weight, self.noise, self.renormalize = balance_weight, noise, renormalize
        self.official_capacity, self.drop_at_eval = official_capacity, drop_at_eval
        self.out_act, self.dropout = out_act, dropout
        self.router = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **dd))
        self.b_up = nn.Parameter(torch.empty(num_experts, hidden_dim, **dd))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **dd))
        self.b_down = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.routing: Routing | None = None
        self.tally: Tensor
        self.register_buffer("tally", torch.empty(2, num_experts, dtype=torch.int64, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) for all weights, zero biases, an empty tally."""
        for weight in (self.router, self.w_up, self.w_down):
            nn.init.normal_(weight, std=INIT_STD)
        for zero in (self.b_up, self.b_down, self.tally):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (…, dim) → y (…, dim) and the balance loss, a scalar that is scaled already.

        mask (…) bool: False for padding, which is not routed and gets y = 0. ValueError for wrong shapes, a mask
        without a token (seen on the CPU only) and a capacity of no places.
        """
        check_input(x, self.router.shape[1], self.w_up)
        rows = x.reshape(-1, x.shape[-1])
        logits, live = self._logits(rows), None if mask is None else _flat(mask, x)
        routing = moe_route(
            logits,
            top_k=self.top_k,
            capacity=self._capacity(rows.shape[0]),
            renormalize=self.renormalize,
            mask=live,
        )
        drop = self.dropout if self.training else 0.0
        seed = torch.randint(2**31, (1,), device=x.device) if drop else None
        y = moe_ffn(
            rows,
            routing.gates.to(torch.promote_types(x.dtype, torch.float32)),
            routing.slots,
            routing.order,
            routing.offsets,
            self.w_up,
            self.b_up,
            self.w_down,
            self.b_down,
            dropout=drop,
            seed=seed,
            gelu_out=self.out_act == "gelu",
        )
        if not (torch.compiler.is_compiling() or transformed()):
            self.routing = Routing(*(t.detach() for t in routing))
        if self.training:
            self._count(routing)
        return y.view(x.shape), self.balance_weight * self._balance(routing, logits, live)

    def _balance(self, routing: Routing, logits: Tensor, live: Tensor | None) -> Tensor:
        """The balance loss; of training in several processes, one whose mean over them is that of all their tokens.

        E sum_e m_e P_e is no mean over tokens: each process takes m, which has no gradient, over all of them, and P
        over its own.
        """
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return routing.balance
        mask = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if live is None else live
        chosen = torch.cat([routing.counts.to(logits.dtype), mask.sum()[None].to(logits.dtype)])
        dist.all_reduce(chosen)
        share, tokens = chosen[:-1] / chosen[:-1].sum().clamp_min(1), chosen[-1].clamp_min(1)
        mass = (logits.softmax(-1) * mask[:, None]).sum(0) * (dist.get_world_size() / tokens)
        return self.num_experts * (share * mass).sum()

    def _logits(self, rows: Tensor) -> Tensor:
        """Router logits in float32 (float64 for float64), with the noise of training."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows.device.type):
            logits = F.linear(rows.to(wide), self.router.to(wide))
        return logits + torch.randn_like(logits) / self.num_experts if self.training and self.noise else logits

    def _capacity(self, tokens: int) -> int | None:
        if self.capacity_factor is None or tokens == 0 or not (self.training or self.drop_at_eval):
            return None
        places = expert_capacity(tokens, self.num_experts, self.top_k, self.capacity_factor)
        places -= self.official_capacity
        if places < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} leaves no place in any of {self.num_experts} experts for "
                f"{tokens} tokens: raise it, or use capacity_factor=None"
            )
        return places

    def _count(self, routing: Routing) -> None:
        # A checkpoint calls the layer again from within the backward, for tokens that have been counted; a selective
        # one expects the same operations then.
        first = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        self.tally.add_(torch.stack([routing.counts, routing.offsets.diff()]), alpha=int(first))

    def load(self) -> dict[str, Tensor]:
        """Statistics of the last call, each (E,) float32 but "dropped", a scalar: "share" of the assignments that chose
        an expert, "kept" share of those it took, "dropped" share of all pairs. Empty before the first call that is not
        compiled."""
        if self.routing is None:
            return {}
        counts, kept = self.routing.counts.float(), self.routing.offsets.diff().float()
        total = counts.sum().clamp_min(1)
        return {"share": counts / total, "kept": kept / counts.clamp_min(1), "dropped": 1 - kept.sum() / total}

    def outputs(self) -> list[Tensor]:
        """The weights that it ends in."""
        return [self.w_down]

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token whose pairs all find a place."""
        expert = (self.w_up.numel() + self.w_down.numel()) // self.num_experts
        return 2 * (self.router.numel() + self.top_k * expert)

    def extra_repr(self) -> str:
        _, hidden, dim = self.w_up.shape
        sizes = f"dim={dim}, hidden_dim={hidden}, num_experts={self.num_experts}, top_k={self.top_k}"
        return f"{sizes}, capacity_factor={self.capacity_factor}"


def _flat(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
    # Looking at values on a GPU would wait for it, and under torch.compile would break the graph.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.numel() and not mask.any():
        raise ValueError("mask must leave at least one token to route, got all False")
    return mask.reshape(-1)


def _check_options(
    num_experts: int,
    top_k: int,
    capacity_factor: float | None,
    balance_weight: float,
    out_act: str | None,
    dropout: float,
) -> None:
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
    if capacity_factor is not None and not (isinstance(capacity_factor, Real) and 0 < capacity_factor < math.inf):
        raise ValueError(f"capacity_factor must be > 0 and finite, or None, got {capacity_factor!r}")
    if not (isinstance(balance_weight, Real) and 0 <= balance_weight < math.inf):
        raise ValueError(f"balance_weight must be at least 0 and finite, got {balance_weight!r}")
    if out_act not in (None, "gelu"):
        raise ValueError(f"out_act must be None or 'gelu', got {out_act!r}")
    check_dropout(dropout)
