"""Reliability: where keypoints are matched right, told from the descriptor map.

Not in the paper. The detector is trained on what its keypoints match, but sees the map of
descriptors through a few channels of a small head. What the map itself tells about matches is a
factor on the score. It is fitted after the training (`scfeat train fit`), and is part of the
weights.
"""

from __future__ import annotations

import torch
from torch import nn


class Reliability(nn.Module):
    """A factor on keypoint scores out of F_cn; its numbers are buffers, which are not trained.

    At the start it is 1 everywhere.

    Args:
        dim: channels of F_cn.

    Attributes:
        weight: (D,): the direction of F_cn in which matches are more often right, as long as the
            factor is strong.
        bias: (): of the factor's logarithm.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(dim))
        self.register_buffer("bias", torch.zeros(()))

    def unfitted(self) -> Reliability:
        """One of the same size at the start, on the same device."""
        return Reliability(len(self.weight)).to(self.weight.device)

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) F_cn -> (B, 1, h, w) fp32, positive."""
        bridged = bridged.float()
        length = torch.linalg.vector_norm(bridged, dim=1, keepdim=True).clamp_min(1e-12)
        along = (bridged * self.weight[:, None, None]).sum(dim=1, keepdim=True)
        return (along / length + self.bias).exp()
