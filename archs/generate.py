"""Text generation with a decoding state: prompts of different length in one batch, streaming, a sliding window."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .modes import evaluating
from .sampling import Sampling

if TYPE_CHECKING:
    from .lm import LanguageModel


class Window:
    """The tokens of a batch so far, and each row's part of them that the model has in view.

    The positions are learned, so a row may hold at most `max_len` tokens in view. A row that is full keeps the newest
    half of them and is encoded again from position 0; each row on its own, so that a batch gives what its rows give
    alone.
    """

    def __init__(self, prompt: Tensor, lengths: Tensor, max_len: int, room: int, pad_id: int) -> None:
        # Whatever stands in the padding is replaced: it must be a token the embedding knows.
        columns = torch.arange(prompt.shape[1], device=prompt.device)
        padded = torch.where(columns < lengths[:, None], prompt, pad_id)
        self.tokens = torch.cat([padded, padded.new_full((prompt.shape[0], room), pad_id)], dim=1)
        self.ends, self.max_len = lengths.clone(), max_len
        self.starts = (lengths - max_len).clamp_min(0)

    def append(self, tokens: Tensor) -> None:
        """Add one token to every row."""
        self.tokens.scatter_(1, self.ends[:, None], tokens[:, None])
        self.ends += 1

    def last(self) -> Tensor:
        """The newest token of every row (B, 1)."""
        return self.tokens.gather(1, self.ends[:, None] - 1)

    def slide(self) -> None:
        """Halve the view of every row that has more than `max_len` tokens in it."""
        full = self.ends - self.starts > self.max_len
        self.starts = torch.where(full, self.ends - max(self.max_len // 2, 1), self.starts)

    def view(self) -> tuple[Tensor, Tensor]:
        """The tokens in view (B, T), right-padded, and how many each row has."""
        lengths = self.ends - self.starts
        columns = self.starts[:, None] + torch.arange(int(lengths.max()), device=lengths.device)
        return self.tokens.gather(1, columns.clamp_max(self.tokens.shape[1] - 1)), lengths


@torch.no_grad()
def stream(
    model: "LanguageModel",
    window: Window,
    steps: int,
    sampling: Sampling,
    eos_id: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Yield one token a row (B,) a step and append it to the window; stops when every row has produced `eos_id`."""
    with evaluating(model):
        done = torch.zeros_like(window.ends, dtype=torch.bool)
        state, used = None, 0
        for _ in range(steps):
            if state is None or used == model.config.max_len:
                window.slide()
                ids, lengths = window.view()
                state = model.init_state(ids.shape[0])
                logits, used = model.decode(ids, state, lengths), ids.shape[1]
            else:
                logits, used = model.decode(window.last(), state), used + 1
            token = sampling(logits, generator)
            if eos_id is not None:
                token = torch.where(done, eos_id, token)
                done |= token == eos_id
            window.append(token)
            yield token
            if eos_id is not None and bool(done.all()):
                return


def checked_lengths(prompt: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """Row lengths (B,) of a prompt batch; ValueError for a wrong shape, an empty row or one longer than the prompt."""
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"input_ids must be (B, T) with T ≥ 1, got {tuple(prompt.shape)}")
    if prompt_lengths is None:
        return prompt.new_full((prompt.shape[0],), prompt.shape[1], dtype=torch.int64)
    lengths = torch.as_tensor(prompt_lengths).to(device=prompt.device, dtype=torch.int64)
    if lengths.shape != prompt.shape[:1] or bool(((lengths < 1) | (lengths > prompt.shape[1])).any()):
        wanted = f"{prompt.shape[0]} integers in [1, {prompt.shape[1]}]"
        raise ValueError(f"prompt_lengths must be {wanted}, got {lengths.tolist()}")
    return lengths
