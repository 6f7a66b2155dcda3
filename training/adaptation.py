"""Stage 3: the detector learns to find in every view what it finds in other views.

After stage 2 the score of a place still varies with its sub-pixel position, scale, light and noise,
and so do keypoints. The mean score over many views of a photo varies less; SuperPoint's homographic
adaptation (DeTone, Malisiewicz and Rabinovich 2018, Sec. 5) uses it as a label. Here it is learned
directly: the target of a view's score map is the warped score map of another view, by the detector
of stage 2. As the other view is a new one every time, and the divergence a Bregman divergence, the
optimum is a mean over views, in which a view with larger scores in total has less weight.
"""

from __future__ import annotations

from types import EllipsisType

import torch

from scfeat_ros.model.sampling import sample
from scfeat_training.geometry import transform_points

MARGIN = 8
"""Scores closer than this to the border of either view do not count, pixels."""
LEAST = 1e-3
"""Added to scores before their logarithm is taken."""


def seen_from(scores: torch.Tensor, H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A score map as another view sees it.

    Args:
        scores: (h, w) of the second view.
        H: (3, 3), pixels of the first view to pixels of the second; both are of one size.

    Returns:
        (h, w) float scores, bilinearly sampled, and (h, w) bool: where they are valid.
    """
    height, width = scores.shape
    sides = (torch.arange(side, device=scores.device) for side in (width, height))
    here = torch.stack(torch.meshgrid(*sides, indexing="xy"), dim=-1).view(-1, 2).to(scores)
    there = transform_points(H.to(scores), here)
    seen = sample(scores[None, None], there[None], stride=1)
    last = scores.new_tensor([width, height]) - 1 - MARGIN
    inside = ((here >= MARGIN) & (here <= last) & (there >= MARGIN) & (there <= last)).all(dim=1)
    return seen.view(height, width), inside.view(height, width)


def divergence(
    scores: torch.Tensor, target: torch.Tensor, counts: torch.Tensor | EllipsisType = ...
) -> torch.Tensor:
    """Generalized Kullback-Leibler divergence, divided by the target's sum.

    Args:
        scores, target: (h, w), not negative.
        counts: (h, w) bool, `...` for everywhere.

    Returns:
        A scalar; 0 if nothing counts.
    """
    scores, target = scores[counts] + LEAST, target[counts] + LEAST
    total = (target * (target.log() - scores.log()) - target + scores).sum()
    return total / target.sum().clamp_min(LEAST)
