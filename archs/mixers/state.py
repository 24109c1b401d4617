"""What every mixer's decoding state has in common: how much of each row it has seen."""

import torch
from torch import Tensor, nn


def home(mixer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of what it computes, as far as its parameters tell: a quantised one may have none, or keep them
    in single bytes."""
    parameters = list(mixer.parameters())
    wide = (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1)
    return next((p.device for p in parameters), None), next(wide, None)


def check_lengths(lengths: Tensor | None, rows: int, length: int) -> None:
    """TypeError or ValueError unless lengths is None or `rows` integers, on the CPU of at most `length` each."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int64 tensor ({rows},), got {found}")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths must be ({rows},), one a row, got {tuple(lengths.shape)}")
    # Looking at values on a GPU would wait for it, and under torch.compile would break the graph.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and lengths.numel():
        low, high = (int(end) for end in lengths.aminmax())
        if low < 0 or high > length:
            raise ValueError(f"lengths must be in [0, {length}], got values from {low} to {high}")


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

    def check(self, x: Tensor, lengths: Tensor | None) -> None:
        """ValueError unless x (B, …, T, ·) has as many rows as the state; for `lengths`, as `check_lengths`."""
        if x.shape[0] != self.seen.shape[0]:
            raise ValueError(f"x must have the {self.seen.shape[0]} rows of the state, got {x.shape[0]}")
        check_lengths(lengths, x.shape[0], x.shape[-2])

    def positions(self, length: int) -> Tensor:
        """Absolute positions (B, length) of the next `length` tokens of every row."""
        return self.seen[:, None] + torch.arange(length, device=self.seen.device)

    def advance(self, length: int, lengths: Tensor | None) -> None:
        """Count a chunk of `length` tokens, of which row b has `lengths[b]` (all if None)."""
        self.seen = self.seen + (length if lengths is None else lengths)
        self.extent += length
        self.least += length if lengths is None else 0

    def reset(self) -> None:
        """Begin anew."""
        self.seen, self.extent, self.least = torch.zeros_like(self.seen), 0, 0
