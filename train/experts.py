"""How evenly the experts of a model are used."""

from typing import Any

import torch
from torch import Tensor, nn

from ..archs import SharedMoE
from .parallel import is_main, total


class ExpertLoad:
    """What each expert of `model` was given in training since the last `take`, counted on the device by the layers."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SharedMoE)]

    def take(self) -> dict[str, Any]:
        """Shares of all processes' assignments: of each expert ("expert_share", a list for each set of experts), and of
        those that found no place ("expert_dropped"). Empty if nothing was counted. Starts anew; waits for the device.
        """
        if not self.layers:
            return {}
        counts, kept = total(torch.cat([layer.tally for layer in self.layers], 1)).tolist()
        for layer in self.layers:
            layer.tally.zero_()
        if not sum(counts):
            return {}
        shares, start = [], 0
        for layer in self.layers:
            chosen = counts[start : start + layer.num_experts]
            shares.append([count / max(sum(chosen), 1) for count in chosen])
            start += layer.num_experts
        return {"expert_share": shares, "expert_dropped": 1 - sum(kept) / sum(counts)}

    def state(self) -> list[Tensor]:
        """What all processes have counted, for a checkpoint between two looks."""
        return [total(layer.tally) for layer in self.layers]

    def load_state(self, tallies: list[Tensor]) -> None:
        """Take up what `state` returned."""
        for layer, tally in zip(self.layers, tallies, strict=True):
            layer.tally.copy_(tally if is_main() else torch.zeros_like(tally))
