"""The batched eight-point algorithm, the error of fundamental matrices, and Algorithm 1."""

import numpy as np
import pytest
import torch

from scfeat_training.geometry import (
    eight_point,
    epipolar_distance,
    fundamental_error,
    fundamental_from_pose,
    project,
)
from scfeat_training.keypoint_policy import fundamental_matrix_error, resample

SIZE = (320, 240)


@pytest.fixture
def view():
    """Two cameras, 60 points seen by both (pixels, float64) and their fundamental matrix."""
    generator = torch.Generator().manual_seed(3)
    K = torch.tensor([[250.0, 0, 160], [0, 250, 120], [0, 0, 1]], dtype=torch.float64)
    angle = 0.2
    R = torch.tensor(
        [
            [np.cos(angle), 0, np.sin(angle)],
            [0, 1, 0],
            [-np.sin(angle), 0, np.cos(angle)],
        ],
        dtype=torch.float64,
    )
    t = torch.tensor([-1.0, 0.1, 0.2], dtype=torch.float64)
    points = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    points = points * torch.tensor([3.0, 2.0, 4.0]) + torch.tensor([-1.5, -1.0, 4.0])
    identity = torch.eye(3, dtype=torch.float64)
    first, _ = project(K, identity, torch.zeros(3, dtype=torch.float64), points)
    second, _ = project(K, R, t, points)
    return first, second, fundamental_from_pose(K, K, R, t)


def test_exact_matches_give_the_exact_matrix(view):
    first, second, true = view
    assert fundamental_error(eight_point(first, second), true) < 1e-6
    assert fundamental_error(eight_point(first[:8], second[:8]), true) < 1e-6


def test_result_has_rank_two_and_unit_norm(view):
    first, second, _ = view
    noisy = second + torch.randn(second.shape, generator=torch.Generator().manual_seed(0))
    found = eight_point(first, noisy)
    assert found.norm() == pytest.approx(1, abs=1e-12)
    assert torch.linalg.matrix_rank(found, rtol=1e-12) == 2
    assert epipolar_distance(found, first, second).median() < 2


def test_batch_agrees_with_single_calls(view):
    first, second, _ = view
    sets = torch.stack([torch.arange(8) + 5 * k for k in range(6)])
    together = eight_point(first[sets], second[sets])
    for k, chosen in enumerate(sets):
        assert torch.allclose(together[k], eight_point(first[chosen], second[chosen]))


def test_error_grows_with_noise(view):
    first, second, true = view
    noise = torch.randn(second.shape, generator=torch.Generator().manual_seed(1)).double()
    errors = [
        float(
            fundamental_matrix_error(
                first, second + sigma * noise, true, SIZE, 20, torch.Generator().manual_seed(5)
            )
        )
        for sigma in (0.0, 0.5, 2.0, 8.0)
    ]
    assert errors[0] < 1e-6
    assert errors == sorted(errors)
    assert errors[-1] > 100 * max(errors[1], 1e-6) or errors[-1] > 0.01


@pytest.mark.parametrize("factor", [-1.0, 1e-4, 37.0])
def test_error_ignores_scale_and_sign(view, factor):
    first, second, true = view
    other = eight_point(first, second + 0.5)
    expected = pytest.approx(float(fundamental_error(other, true)), abs=1e-12)
    assert float(fundamental_error(other, factor * true)) == expected
    assert float(fundamental_error(factor * other, true)) == expected


def test_error_does_not_depend_on_the_pixels_unit(view):
    """Algorithm 1 normalizes: an image of twice the size has the same error."""
    first, second, true = view
    noise = torch.randn(second.shape, generator=torch.Generator().manual_seed(2)).double()
    small = fundamental_matrix_error(
        first, second + noise, true, SIZE, 30, torch.Generator().manual_seed(6)
    )
    half = torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))
    half[:2, 2] = -0.25  # pixel areas double: x -> 2 x + 0.5
    large = fundamental_matrix_error(
        2 * first + 0.5,
        2 * (second + noise) + 0.5,
        half.T @ true @ half,
        (640, 480),
        30,
        torch.Generator().manual_seed(6),
    )
    assert float(large) == pytest.approx(float(small), rel=1e-6)


def test_the_best_of_the_resamples_counts(view):
    """With a quarter of the matches wrong a tenth of the resamples is right."""
    first, second, true = view
    wrong = second.clone()
    wrong[:15] = second[:15].roll(1, dims=0)
    generator = torch.Generator().manual_seed(0)
    assert fundamental_matrix_error(first, wrong, true, SIZE, 200, generator) < 1e-6
    assert fundamental_error(eight_point(first, wrong), true) > 1e-3


def test_resamples_are_all_different():
    sets = resample(40, 100, torch.Generator().manual_seed(0))
    assert sets.shape == (100, 8)
    assert len({tuple(row) for row in sets.tolist()}) == 100
    assert all(len(set(row)) == 8 for row in sets.tolist())
    assert sets.min() >= 0 and sets.max() < 40


def test_few_matches_give_as_many_resamples_as_there_are():
    sets = resample(9, 100, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in sets.tolist()}) == len(sets) == 9
    # 30 of the 45 sets of ten matches take more than 30 draws
    assert len(resample(10, 30, torch.Generator().manual_seed(0))) == 30


def test_too_few_points_are_refused(view):
    first, second, true = view
    with pytest.raises(ValueError, match="N >= 8"):
        eight_point(first[:7], second[:7])
    with pytest.raises(ValueError, match="the same N"):
        eight_point(first[:9], second[:8])
    with pytest.raises(ValueError, match="8 of 7"):
        resample(7, 10, torch.Generator())
    generator = torch.Generator()
    assert fundamental_matrix_error(first[:7], second[:7], true, SIZE, 10, generator) == 1
