"""What causal and bidirectional attention have in common: the projections into heads and back."""

import torch
from torch import Tensor, nn

from ..checks import check_input, check_positive, project
from ..init import reset_layers


class MultiHead(nn.Module):
    """Queries, keys and values of `num_heads` heads, and the way back: biases everywhere.

    ValueError if `num_heads` does not divide `dim`.
    """

    carries_input = False
    layer_options: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(dim=dim)
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be a positive divisor of dim={dim}, got {num_heads!r}")
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    reset_parameters = reset_layers

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, dim) → q, k, v of (B, H, T, dim/H)."""
        check_input(x, self.dim, self.qkv, sequence=True)
        q, k, v = project(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def outputs(self) -> list[Tensor]:
        """The weights that it ends in."""
        return [self.out_proj.weight]

    def merge(self, y: Tensor) -> Tensor:
        """(B, H, T, dim/H) → (B, T, dim), projected."""
        return project(self.out_proj, y.transpose(1, 2).flatten(2))
