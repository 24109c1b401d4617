"""Hyper-connections whose H_res is, or is near, doubly stochastic: mHC (arXiv 2512.24880), mHC-lite (arXiv 2601.05732).

The matrices are built: these are the baselines of KromHC, which has a file of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.kronecker.reference import permutations
from ...kernels.launch import without_autocast
from ..registry import register_slot
from .hyper import SCALE, Hyper, StreamNorm, wide

# Logit of every permutation but the identity at the start.
CLOSED = -8.0


class Manifold(Hyper):
    """What mHC, mHC-lite and KromHC share: sigmoid gates and mixing logits from the normed, flattened streams.

    x' = RMSNorm(vec X); h_pre = sigmoid(alpha_pre x' W_pre + b_pre); h_post = 2 sigmoid(alpha_post x' W_post + b_post).
    The parameters have the official programs' names and shapes.
    """

    @abstractmethod
    def mixing_logits(self) -> int:
        """How many logits H_res has."""

    @abstractmethod
    def first_mixing(self) -> Tensor:
        """The static mixing logits at the start: H_res is the identity, nearly."""

    def make_parameters(self, dd: dict[str, Any]) -> None:
        n, width = self.num_streams, self.num_streams * self.dim
        self.static_alpha = nn.Parameter(torch.empty(self.alpha_shape(), **dd))
        self.static_beta = nn.Parameter(torch.empty(n, **dd))
        if self.dynamic:
            self.norm = StreamNorm(width, **dd)
            self.dynamic_alpha_fn = nn.Parameter(torch.empty(width, n + self.mixing_logits(), **dd))
            self.dynamic_beta_fn = nn.Parameter(torch.empty(width, n, **dd))
            self.pre_branch_scale = nn.Parameter(torch.empty(1, **dd))
            self.residual_scale = nn.Parameter(torch.empty(1, **dd))
            self.h_post_scale = nn.Parameter(torch.empty((), **dd))

    def alpha_shape(self) -> tuple[int, ...]:
        return (self.num_streams + self.mixing_logits(),)

    def first_alpha(self) -> Tensor:
        """The static logits of h_pre and H_res at the start."""
        return torch.cat([self.first_pre(), self.first_mixing()])

    def reset_coefficients(self) -> None:
        self.static_alpha.copy_(self.first_alpha())
        self.static_beta.copy_(self.first_post())
        if self.dynamic:
            self.dynamic_alpha_fn.zero_()
            self.dynamic_beta_fn.zero_()
            for scale in (self.pre_branch_scale, self.residual_scale, self.h_post_scale):
                scale.fill_(SCALE)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of h_pre (…, n), h_post (…, n) and H_res (…, S)."""
        n = self.num_streams
        pre, mixing = self.static_alpha.to(x.dtype).split([n, self.mixing_logits()])
        post = self.static_beta.to(x.dtype)
        if self.dynamic:
            normed = self.norm(x.flatten(-2))
            moved = (normed @ self.dynamic_alpha_fn.to(x.dtype)).split([n, self.mixing_logits()], -1)
            pre = pre + self.pre_branch_scale.to(x.dtype) * moved[0]
            mixing = mixing + self.residual_scale.to(x.dtype) * moved[1]
            post = post + self.h_post_scale.to(x.dtype) * (normed @ self.dynamic_beta_fn.to(x.dtype))
        leading = x.shape[:-2]
        return pre.expand(*leading, -1), post.expand(*leading, -1), mixing.expand(*leading, -1)

    @abstractmethod
    def matrix(self, logits: Tensor) -> Tensor:
        """H_res (…, n, n) from its logits (…, S)."""

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device.type):
            pre, post, mixing = self.logits(wide(x))
            return pre.sigmoid(), 2 * post.sigmoid(), self.matrix(mixing)


@register_slot("residual", "mhc")
class MHC(Manifold):
    """mHC, arXiv 2512.24880: H_res is brought near the doubly stochastic matrices by 20 Sinkhorn steps (columns, rows).

    Arguments as in `Hyper`. The parameters hold, stream by stream, the pre logit and the n mixing logits of a row.
    """

    iterations = 20

    def mixing_logits(self) -> int:
        return self.num_streams**2

    def alpha_shape(self) -> tuple[int, ...]:
        return (self.num_streams, self.num_streams + 1)

    def first_mixing(self) -> Tensor:
        return CLOSED * (1 - torch.eye(self.num_streams, dtype=torch.float64))

    def first_alpha(self) -> Tensor:
        return torch.cat([self.first_pre()[:, None], self.first_mixing()], 1)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams
        alpha, post = self.static_alpha.to(x.dtype), self.static_beta.to(x.dtype)
        if self.dynamic:
            normed = self.norm(x.flatten(-2))
            scale = torch.cat([self.pre_branch_scale, self.residual_scale.expand(n)]).to(x.dtype)
            alpha = alpha + scale * (normed @ self.dynamic_alpha_fn.to(x.dtype)).unflatten(-1, (n, n + 1))
            post = post + self.h_post_scale.to(x.dtype) * (normed @ self.dynamic_beta_fn.to(x.dtype))
        leading = x.shape[:-2]
        alpha = alpha.expand(*leading, n, n + 1)
        return alpha[..., 0], post.expand(*leading, -1), alpha[..., 1:].flatten(-2)

    def matrix(self, logits: Tensor) -> Tensor:
        # In the log domain: exp would underflow whole columns of large logits, and 0/0 follows.
        log = logits.unflatten(-1, (self.num_streams, self.num_streams))
        for _ in range(self.iterations):
            log = log - log.logsumexp(-2, keepdim=True)
            log = log - log.logsumexp(-1, keepdim=True)
        return log.exp()


@register_slot("residual", "mhc_lite")
class MHCLite(Manifold):
    """mHC-lite, arXiv 2601.05732: H_res is the softmax-weighted sum of all n! permutations. Arguments as in `Hyper`."""

    def mixing_logits(self) -> int:
        if self.num_streams > 5:
            raise ValueError(f"num_streams must be at most 5 for mHC-lite's n! permutations, got {self.num_streams}")
        return math.factorial(self.num_streams)

    def first_mixing(self) -> Tensor:
        start = torch.full((self.mixing_logits(),), CLOSED, dtype=torch.float64)
        start[0] = 0
        return start

    def matrix(self, logits: Tensor) -> Tensor:
        return torch.einsum("...m,mij->...ij", logits.softmax(-1), permutations(self.num_streams, logits))
