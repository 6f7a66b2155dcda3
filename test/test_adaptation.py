"""Stage 3's target and loss; the stage itself is run in test_train.py."""

import numpy as np
import torch

from scfeat_training.adaptation import MARGIN, divergence, seen_from

SHIFT = torch.tensor([[1.0, 0, 3], [0, 1, -2], [0, 0, 1]])


def test_scores_are_seen_where_the_homography_says():
    scores = torch.rand(40, 60)
    seen, counts = seen_from(scores, SHIFT)
    torch.testing.assert_close(seen[2:, :-3], scores[:-2, 3:], atol=1e-5, rtol=0)
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[MARGIN + 2 : -MARGIN, MARGIN : -MARGIN - 3] = True  # of both views
    assert torch.equal(counts, expected)


def test_scores_between_pixels_are_interpolated():
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    H = torch.tensor([[0.9, 0.1, 4.0], [-0.05, 1.1, 1.0], [1e-3, -5e-4, 1.0]])
    scale = 1e-3 * columns - 5e-4 * rows + 1
    x, y = (0.9 * columns + 0.1 * rows + 4) / scale, (-0.05 * columns + 1.1 * rows + 1) / scale
    seen, counts = seen_from(2 * columns + 3 * rows, H)  # a plane: interpolation is exact
    assert counts.float().mean() > 0.3
    torch.testing.assert_close(seen[counts], (2 * x + 3 * y)[counts], atol=1e-3, rtol=1e-4)


def test_divergence_is_smallest_for_the_mean_of_the_targets():
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    targets = torch.tensor([[[0.2, 4.0, 0.0, 1.0]], [[0.6, 2.0, 0.5, 1.0]]])
    mean = targets.mean(dim=0).requires_grad_()
    # each is a share of its target's sum: weighed by it they add up
    total = sum(divergence(mean, t, everywhere) * (t.sum() + 4e-3) for t in targets)
    (gradient,) = torch.autograd.grad(total, mean)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert divergence(targets[0], targets[0], everywhere).abs() < 1e-6
    for factor in (0.5, 2.0):
        assert divergence(factor * targets[0], targets[0], everywhere) > 0.1


def test_what_does_not_count_changes_nothing():
    scores, target = torch.rand(2, 5, 6)
    counts = torch.rand(5, 6) > 0.5
    whole = divergence(scores, target, counts)
    changed = torch.where(counts, scores, 7.0)
    assert divergence(changed, target, counts) == whole
    assert divergence(scores, target, torch.zeros(5, 6, dtype=torch.bool)) == 0


def test_whole_maps_are_compared_without_a_look_at_values():
    """For which a GPU would have to be waited for."""
    maps = torch.rand(2, 5, 6)
    everywhere = torch.ones(5, 6, dtype=torch.bool)
    assert divergence(*maps) == divergence(*maps, everywhere)
    assert divergence(*maps.to("meta")).shape == ()
