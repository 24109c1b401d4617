"""Looking into a Grassmann head: how far apart the classes' subspaces are, and how features vary within a class."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .grassmann import GrassmannHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def principal_angles(head: GrassmannHead, first: int | Tensor, second: int | Tensor) -> Tensor:
    """Principal angles in radians, ascending, between the subspaces of two classes (or two lists of classes).

    first, second: class indices, or int64 tensors (…) of one shape. Returns (…, subspace_dim), float64. Exact for
    small angles too, where the arc cosine is not. IndexError for a class that does not exist.
    """
    bases = head.bases.double()
    a, b = bases[first], bases[second]
    cosines = torch.linalg.svdvals(a @ b.mT).clamp(0, 1)
    # sin θ are the singular values of what of b is outside a, in ascending order as the cosines descend
    sines = torch.linalg.svdvals(b - (b @ a.mT) @ a).clamp(0, 1).flip(-1)
    return torch.atan2(sines, cosines)


@torch.no_grad()
def class_angles(head: GrassmannHead, kind: str = "smallest") -> Tensor:
    """One angle for each pair of classes: (num_classes, num_classes), radians, float64, zero on the diagonal.

    kind: "smallest" or "largest" principal angle, or "distance", the geodesic distance (root of the sum of squares).
    Works through one class at a time: memory num_classes · subspace_dim · in_features. ValueError for another kind.
    """
    if kind not in ("smallest", "largest", "distance"):
        raise ValueError(f"kind must be 'smallest', 'largest' or 'distance', got {kind!r}")
    everyone = torch.arange(head.num_classes, device=head.weight.device)
    rows = []
    for index in range(head.num_classes):
        angles = principal_angles(head, torch.full_like(everyone, index), everyone)
        if kind == "distance":
            rows.append(torch.linalg.vector_norm(angles, dim=-1))
        else:
            rows.append(angles[:, 0] if kind == "smallest" else angles[:, -1])
    matrix = torch.stack(rows)
    return matrix.fill_diagonal_(0)


@torch.no_grad()
def feature_variability(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Within-class variability of directions: the mean angle in radians of a class's features to their mean direction.

    features (N, n), labels (N,) int64 in [0, num_classes). Returns (num_classes,) float64, NaN for a class without
    features. ValueError for shapes or labels that do not fit.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"features (N, n) and labels (N,) must fit, got {shapes}")
    if labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {low} to {high}")
    units = F.normalize(features.double(), dim=-1)
    sums = units.new_zeros(num_classes, units.shape[1]).index_add_(0, labels, units)
    centres = F.normalize(sums, dim=-1)[labels]
    # atan2 of |u - c (u·c)| and u·c: exact for nearly equal directions
    along = (units * centres).sum(-1, keepdim=True)
    angles = torch.atan2(torch.linalg.vector_norm(units - along * centres, dim=-1), along[:, 0])
    counts = torch.bincount(labels, minlength=num_classes)
    return angles.new_zeros(num_classes).index_add_(0, labels, angles) / torch.where(counts > 0, counts, torch.nan)


def plot_class_angles(head: GrassmannHead, kind: str = "smallest", names: list[str] | None = None) -> "Figure":
    """The matrix of `class_angles` in degrees beside their histogram. Needs matplotlib; the caller saves the figure.

    names: a label for each class, shown up to 30 classes.
    """
    from matplotlib.figure import Figure

    angles = class_angles(head, kind).rad2deg().cpu()
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(angles.numpy(), cmap="viridis")
    figure.colorbar(image, ax=left, label="degrees")
    left.set(title=f"{kind} angle between classes", xlabel="class", ylabel="class")
    if names is not None and len(names) <= 30:
        left.set_xticks(range(len(names)), names, rotation=90)
        left.set_yticks(range(len(names)), names)
    pairs = torch.triu_indices(head.num_classes, head.num_classes, offset=1)
    right.hist(angles[pairs[0], pairs[1]].numpy(), bins=50, color="#2f7d4f")
    right.set(title=f"{pairs.shape[1]} pairs, subspace_dim {head.subspace_dim}", xlabel="degrees", ylabel="pairs")
    return figure


def plot_feature_variability(variability: Tensor, names: list[str] | None = None) -> "Figure":
    """Bars of `feature_variability` in degrees, ascending. Needs matplotlib; the caller saves the figure."""
    from matplotlib.figure import Figure

    known = (~variability.isnan()).nonzero()[:, 0]
    order = known[variability[known].argsort()].cpu()
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(order)), variability.cpu()[order].rad2deg().numpy(), color="#2f7d4f")
    axis.set(title="mean angle of a feature to its class's mean direction", ylabel="degrees", xlabel="class")
    if len(order) <= 30:
        axis.set_xticks(range(len(order)), [names[i] if names else str(int(i)) for i in order], rotation=90)
    return figure
