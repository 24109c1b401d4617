"""What every mixer's decoding state has in common: how much of each row it has seen."""

import torch
from torch import Tensor


class MixerState:
    """Progress of a batch of sequences: `seen` (B,) int64 tokens a row, and what the host knows of it without asking
    the device: no row has more than `extent` or fewer than `least`."""

    def __init__(self, batch_size: int, device: torch.device | str | None = None) -> None:
        self.seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.extent = self.least = 0

    @property
    def fresh(self) -> bool:
        """True until the first chunk; known without asking the device."""
        return self.extent == 0

    def check_rows(self, x: Tensor) -> None:
        """ValueError unless x (B, …) has as many rows as the state."""
        if x.shape[0] != self.seen.shape[0]:
            raise ValueError(f"x must have the {self.seen.shape[0]} rows of the state, got {x.shape[0]}")

    def positions(self, length: int) -> Tensor:
        """Absolute positions (B, length) of the next `length` tokens of every row."""
        return self.seen[:, None] + torch.arange(length, device=self.seen.device)

    def advance(self, length: int, lengths: Tensor | None) -> None:
        """Count a chunk of `length` tokens, of which row b has `lengths[b]` (all if None)."""
        self.seen = self.seen + (length if lengths is None else lengths)
        self.extent += length
        self.least += length if lengths is None else 0

    def reset(self) -> None:
        """Begin anew; what is kept of the tokens before is out of every row's reach."""
        self.seen, self.extent, self.least = torch.zeros_like(self.seen), 0, 0
