"""An exponential moving average of a model's weights."""

import copy
from typing import Any

import torch
from torch import nn

from .spread import load_into


class WeightAverage:
    """A copy of `model` whose floating-point weights and buffers follow it: average += (1 − d) (weight − average).

    d rises to `decay` as (1 + t) / (10 + t) after t updates, so that short runs are not judged by their first weights.
    model: the average as it is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0
        # A copy to judge, so that how often a run is judged changes nothing of the average.
        on_manifold = any(hasattr(module, "reproject_") for module in model.modules())
        self._judged = copy.deepcopy(self.model) if on_manifold else self.model

    def models(self) -> list[nn.Module]:
        """The models in it."""
        return [self.model] if self._judged is self.model else [self.model, self._judged]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours, theirs = self.model.state_dict(keep_vars=True), model.state_dict()
        # A tensor with several names is one, and moves once.
        for name in {id(tensor): name for name, tensor in ours.items()}.values():
            if ours[name].is_floating_point():
                ours[name].lerp_(theirs[name], 1 - decay)
            else:
                ours[name].copy_(theirs[name])

    @torch.no_grad()
    def judged(self) -> nn.Module:
        """The model to evaluate and save: modules with a `reproject_` method are on their manifold."""
        if self._judged is not self.model:
            self._judged.load_state_dict(self.model.state_dict())
        for module in self._judged.modules():
            reproject: Any = getattr(module, "reproject_", None)
            if reproject is not None:
                reproject()
        return self._judged

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        load_into(self.model, state["model"])
        self.updates = state["updates"]
