"""Reliability: predicts from the descriptor map where keypoints are matched correctly.

Not in the paper. The detector is rewarded for correct matches, but sees the descriptor map only
through a few channels of a small head. The reliability is a factor on the score, predicted from
the map itself. It is fitted after the training (`scfeat train fit`), and is part of the weights.
"""

from __future__ import annotations

import torch
from torch import nn


class Reliability(nn.Module):
    """A factor on keypoint scores, log-linear in the normalized F_cn.

    Its weight and bias are buffers, which are not trained with the network. Unfitted, the factor is
    1 everywhere.

    Args:
        dim: channels of F_cn.

    Attributes:
        weight: (D,): the direction of F_cn in which matches are more often right; its length is the
            strength of the factor.
        bias: (): added to the factor's logarithm.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(dim))
        self.register_buffer("bias", torch.zeros(()))

    def unfitted(self) -> Reliability:
        """An unfitted reliability of the same size, on the same device."""
        return Reliability(len(self.weight)).to(self.weight.device)

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) F_cn -> (B, 1, h, w) fp32, positive."""
        bridged = bridged.float()
        length = torch.linalg.vector_norm(bridged, dim=1, keepdim=True).clamp_min(1e-12)
        along = (bridged * self.weight[:, None, None]).sum(dim=1, keepdim=True)
        return (along / length + self.bias).exp()
