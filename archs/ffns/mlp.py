"""The two-layer perceptron, the baseline ffn."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_input, check_positive, project
from ..init import reset_layers
from ..registry import register_slot


@register_slot("ffn", "mlp")
class MLP(nn.Module):
    """W₂ GELU(W₁ x + b₁) + b₂ with the exact GELU: (…, dim) → (…, hidden_dim) → (…, dim)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.dim = dim
        self.up = nn.Linear(dim, hidden_dim, **dd)
        self.down = nn.Linear(hidden_dim, dim, **dd)
        self.reset_parameters()

    reset_parameters = reset_layers

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim). ValueError for another width, TypeError for another dtype than the weights'."""
        check_input(x, self.dim, self.up)
        return project(self.down, F.gelu(project(self.up, x)))

    def outputs(self) -> list[Tensor]:
        """The weights that it ends in."""
        return [self.down.weight]

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs a token, whatever the sequence length."""
        return 2 * (self.up.weight.numel() + self.down.weight.numel())
