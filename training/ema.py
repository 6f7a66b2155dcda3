"""Moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Keeps an exponential moving average of a model's floating-point state.

    Args:
        model: the network that trains.
        decay: of the average, after a rise from 0 over the first steps.

    Attributes:
        model: a copy with the averaged weights, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for kept, new in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if kept.is_floating_point():
                kept.lerp_(new, 1 - decay)
            else:
                kept.copy_(new)
