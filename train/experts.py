"""How evenly the experts of a model are used."""

from typing import Any

import torch
from torch import Tensor, nn

from ..archs import SharedMoE
from . import parallel


class ExpertLoad:
    """What each expert of `model` was given in training since the last `take`, in all processes.

    The layers count on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SharedMoE)]

    def take(self) -> dict[str, Any]:
        """ "expert_share": for each set of experts, the share of the assignments that chose each; "expert_dropped": the
        share of all assignments that found no place. Empty without experts, or if nothing was counted. Starts anew.

        Waits for the device.
        """
        if not self.layers:
            return {}
        counts, kept = parallel.total(torch.cat(self._tallies(), 1)).tolist()
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
        """What has been counted, for a checkpoint between two looks."""
        return [parallel.total(tally) for tally in self._tallies()]

    def load_state(self, tallies: list[Tensor]) -> None:
        """Take up what `state` returned."""
        for own, tally in zip(self._tallies(), tallies, strict=True):
            own.copy_(tally) if parallel.is_main() else own.zero_()

    def _tallies(self) -> list[Tensor]:
        return [layer.tally for layer in self.layers]
