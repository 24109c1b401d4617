"""Grassmann class representation: every class is a subspace, a logit the length of the feature's projection onto it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.subspace import subspace_cross_entropy, subspace_logits
from ..checks import check_positive
from ..registry import register_slot
from .classifier import checked_labels

# Deviation from orthonormal rows above which a checkpoint holds something else than class subspaces.
TOLERANCE = 1e-2
# Classes that are decomposed together, in float64: float32 decompositions are orthonormal to about 1e-6 only.
AT_ONCE = 1024
# Smallest over largest singular value of a basis below which it has lost a dimension.
RANK = 1e-6


class GrassmannHead(nn.Module):
    """Logits γ‖S_iᵀ x̂‖ of features (…, in_features) for num_classes subspaces (arXiv 2308.01547).

    `weight` (num_classes · subspace_dim, in_features): rows i·k … (i+1)·k − 1 are S_iᵀ, an orthonormal basis of class
    i, drawn uniformly (QR of a normal matrix). The bases must stay orthonormal, which an ordinary optimiser does not
    see to: `optim_groups` tells `grassland.train.optim` to give it to `GrassmannSGD`, which reads k from the mark
    `weight.subspace_dim`, and it must not be decayed. After anything else that writes it (an average of weights,
    rounding to half precision), call `reproject_`.

    in_features: n. num_classes: K. subspace_dim: k, 1 ≤ k ≤ n. scale: γ > 0. backend: of the kernels; None chooses by
    device. ValueError names a bad argument.
    """

    optim_groups: ClassVar[dict[str, str]] = {"weight": "manifold"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        subspace_dim: int = 8,
        scale: float = 25.0,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes, subspace_dim=subspace_dim)
        if subspace_dim > in_features:
            raise ValueError(f"subspace_dim must be at most in_features = {in_features}, got {subspace_dim}")
        if not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
        self.in_features, self.num_classes, self.subspace_dim = in_features, num_classes, subspace_dim
        self.scale, self.backend = float(scale), backend
        # For models that compute their loss with `loss`: the classifier hands on what it is given.
        self.features_only = False
        self.weight = nn.Parameter(torch.empty(num_classes * subspace_dim, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def _mark(self) -> None:
        """What `GrassmannSGD` reads. deepcopy, unpickling, `to_empty` and loading by assignment make a new Parameter
        without it."""
        weight: Any = self.weight
        weight.subspace_dim = self.subspace_dim

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            self._mark()

    def _apply(self, fn: Any, recurse: bool = True) -> "GrassmannHead":
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    @property
    def bases(self) -> Tensor:
        """The weight as (num_classes, subspace_dim, in_features)."""
        return self.weight.unflatten(0, (self.num_classes, self.subspace_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the subspaces anew, uniformly on the Grassmannian."""
        if self.weight.is_meta:
            return
        for bases in self.bases.split(AT_ONCE):
            normal = torch.randn(bases.mT.shape, dtype=torch.float64, device=bases.device)
            bases.copy_(torch.linalg.qr(normal)[0].mT)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, num_classes) of x (…, in_features), between 0 and scale; float32 or float64.

        x itself while `features_only` is set.
        """
        if self.features_only:
            return x
        return subspace_logits(x, self.weight, self.subspace_dim, self.scale, backend=self.backend)

    def logits(self, x: Tensor) -> Tensor:
        """As `forward`; the head protocol's name."""
        return self(x)

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        reduction: str = "mean",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        """Softmax cross entropy of x (…, in_features) without materialised logits, a float32 or float64 scalar.

        labels: (…) int64, `ignore_index` not counting, or (…, num_classes) probabilities. reduction: "mean" or "sum".
        """
        labels = checked_labels(x, labels, self.num_classes, reduction, label_smoothing, ignore_index)
        options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
        return subspace_cross_entropy(
            x, self.weight, labels, self.subspace_dim, self.scale, **options, backend=self.backend
        )

    def flops_per_token(self) -> int:
        """Forward FLOPs a token."""
        return 2 * self.weight.numel()

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """max |S_iᵀS_i − I| over all classes and entries, computed in float64."""
        bases = self.bases.double()
        gram = bases @ bases.mT
        return (gram - torch.eye(self.subspace_dim, dtype=gram.dtype, device=gram.device)).abs().max().item()

    @torch.no_grad()
    def reproject_(self) -> "GrassmannHead":
        """Replace every basis by the nearest orthonormal one (its polar factor), in place.

        The subspace stays where the rows are independent. ValueError if a basis has lost a dimension; those before it
        are then already replaced.
        """
        for first, bases in zip(range(0, self.num_classes, AT_ONCE), self.bases.split(AT_ONCE), strict=True):
            u, sigma, vt = torch.linalg.svd(bases.double(), full_matrices=False)
            flat = sigma.amin(-1) <= RANK * sigma.amax(-1)
            if bool(flat.any()):
                lost = first + int(flat.nonzero()[0])
                raise ValueError(f"weight: the basis of class {lost} does not span {self.subspace_dim} dimensions")
            bases.copy_(u @ vt)
        return self

    def load_official(self, state: Mapping[str, Any], key: str = "fc.weight") -> "GrassmannHead":
        """Take the subspaces from a checkpoint of the official program: `key` (K·k, n), rows i·k … being S_iᵀ.

        state: a state dict, or what wraps one under "state_dict" or "model"; a "module." before the key is allowed.
        Rounding is removed by `reproject_`. ValueError if the key is missing, its shape is not this head's, or its
        rows are not orthonormal in groups of `subspace_dim`.
        """
        for wrapper in ("state_dict", "model"):
            state = state[wrapper] if isinstance(state.get(wrapper), Mapping) else state
        found = next((state[name] for name in (key, f"module.{key}") if name in state), None)
        if found is None:
            raise ValueError(f"state has no {key!r}; it has {', '.join(list(state)[:8])}…")
        if found.shape != self.weight.shape:
            expected = f"{tuple(self.weight.shape)} = ({self.num_classes}·{self.subspace_dim}, {self.in_features})"
            raise ValueError(f"{key} must be {expected}, got {tuple(found.shape)}")
        before = self.weight.detach().clone()
        with torch.no_grad():
            self.weight.copy_(found)
        error = self.orthogonality_error()
        if not error <= TOLERANCE:
            with torch.no_grad():
                self.weight.copy_(before)
            raise ValueError(
                f"{key} does not hold orthonormal bases of subspace_dim = {self.subspace_dim} rows (error {error:.1e})"
            )
        return self.reproject_()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, subspace_dim={self.subspace_dim}, "
            f"scale={self.scale:g}"
        )


@register_slot("head", "grassmann")
class GrassmannTokenHead(GrassmannHead):
    """`GrassmannHead` as a model's head slot: tokens as subspaces. It has a weight of its own, not the embedding's."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        embedding: nn.Embedding | None = None,
        *,
        subspace_dim: int = 8,
        scale: float = 25.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_classes, subspace_dim, scale, backend=backend, device=device, dtype=dtype)


def grassmann_heads(model: nn.Module) -> list[GrassmannHead]:
    """The Grassmann heads in `model`, itself included, each once."""
    return [module for module in model.modules() if isinstance(module, GrassmannHead)]


def reproject_(model: nn.Module) -> nn.Module:
    """`reproject_` every Grassmann head of `model`: after an average of weights (EMA, SWA) or a change of dtype."""
    for head in grassmann_heads(model):
        head.reproject_()
    return model
