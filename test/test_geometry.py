"""Two-view geometry against direct evaluation."""

import cv2
import numpy as np
import pytest
import torch

from scfeat_training.geometry import (
    back_project,
    epipolar_distance,
    epipolar_lines,
    fundamental_from_pose,
    homogeneous,
    lines_hit_image,
    pixel_affinity,
    project,
    relative_pose,
    rotation_angle,
    skew,
    symmetric_epipolar_distance,
    transform_points,
)


def rotation(x, y, z):
    return cv2.Rodrigues(np.array([x, y, z], float))[0]


def two_views(seed=0):
    """K1, K2, poses and 50 points before both cameras."""
    rng = np.random.default_rng(seed)
    K1 = np.array([[310.0, 0, 158], [0, 300, 121], [0, 0, 1]])
    K2 = np.array([[420.0, 0, 170], [0, 431, 117], [0, 0, 1]])
    pose1 = rotation(0.1, -0.2, 0.05), np.array([0.2, -0.1, 0.4])
    pose2 = rotation(-0.2, 0.15, 0.6), np.array([-0.7, 0.3, 0.1])
    points = rng.uniform(-1, 1, (50, 3)) + np.array([0, 0, 5])
    return K1, K2, pose1, pose2, points


def test_fundamental_matrix_holds_true_correspondences():
    K1, K2, pose1, pose2, points = two_views()
    x1, z1 = project(K1, *pose1, points)
    x2, z2 = project(K2, *pose2, points)
    assert (z1 > 0).all() and (z2 > 0).all()
    F = fundamental_from_pose(K1, K2, *relative_pose(*pose1, *pose2))
    assert np.linalg.norm(F) == pytest.approx(1)
    assert epipolar_distance(F, x1, x2).max() < 1e-9
    assert epipolar_distance(F.T, x2, x1).max() < 1e-9
    # as the training gets it, in single precision
    F32 = torch.from_numpy(F.astype(np.float32))
    pixels = [torch.from_numpy(x.astype(np.float32)) for x in (x1, x2)]
    assert epipolar_distance(F32, *pixels).max() < 1e-3


def test_epipolar_distance_is_in_pixels():
    K1, K2, pose1, pose2, points = two_views()
    x1, _ = project(K1, *pose1, points)
    x2, _ = project(K2, *pose2, points)
    F = fundamental_from_pose(K1, K2, *relative_pose(*pose1, *pose2))
    normals = epipolar_lines(F, x1)[:, :2]
    moved = x2 + 3.5 * normals
    along = x2 + 40 * normals[:, ::-1] * (1, -1)
    np.testing.assert_allclose(epipolar_distance(F, x1, moved), 3.5, atol=1e-8)
    np.testing.assert_allclose(epipolar_distance(F, x1, along), 0, atol=1e-8)


def test_the_symmetric_distance_is_the_larger_one_of_both_images():
    K1, K2, pose1, pose2, points = two_views()
    R, t = relative_pose(*pose1, *pose2)
    F = fundamental_from_pose(K1, K2, R, t)
    rng = np.random.default_rng(1)
    x1, x2 = (project(K, *pose, points)[0] for K, pose in ((K1, pose1), (K2, pose2)))
    x1, x2 = x1 + rng.normal(size=x1.shape), x2 + rng.normal(size=x2.shape)
    there, back = epipolar_distance(F, x1, x2), epipolar_distance(F.T, x2, x1)
    assert (there > back).all()  # the second image is the larger one
    for views in ((F, x1, x2), (F.T, x2, x1)):
        np.testing.assert_array_equal(symmetric_epipolar_distance(*views), there)
        tensors = (torch.from_numpy(array) for array in views)
        np.testing.assert_allclose(symmetric_epipolar_distance(*tensors).numpy(), there)


def test_the_epipole_has_no_line_and_no_distance():
    ahead = skew(np.array([0.0, 0, 1]))
    lines = epipolar_lines(ahead, np.array([[0.0, 0], [3, 4]]))
    np.testing.assert_allclose(lines, [[0, 0, 0], [-0.8, 0.6, 0]])
    assert epipolar_distance(ahead, np.zeros((1, 2)), np.ones((1, 2))) == 0


def test_torch_batches_agree_with_numpy():
    cases = [two_views(seed) for seed in range(3)]
    flat = [(K1, K2, *pose1, *pose2) for K1, K2, pose1, pose2, _ in cases]
    stacked = [np.stack(column) for column in zip(*flat, strict=True)]
    K1, K2, R1, t1, R2, t2 = (torch.from_numpy(array) for array in stacked)
    R, t = relative_pose(R1, t1, R2, t2)
    F = fundamental_from_pose(K1, K2, R, t)
    points = torch.from_numpy(np.stack([c[4] for c in cases]))
    x1, _ = project(K1, R1, t1, points)
    x2, _ = project(K2, R2, t2, points)
    assert F.shape == (3, 3, 3) and x1.shape == (3, 50, 2)
    assert epipolar_distance(F, x1, x2).max() < 1e-9
    for k, case in enumerate(cases):
        alone = fundamental_from_pose(case[0], case[1], *relative_pose(*case[2], *case[3]))
        np.testing.assert_allclose(F[k].numpy(), alone, atol=1e-12)
    np.testing.assert_allclose(
        rotation_angle(R).numpy(), [rotation_angle(r) for r in R.numpy()], atol=1e-9
    )


def test_relative_pose_chains():
    _, _, pose1, pose2, points = two_views()
    R, t = relative_pose(*pose1, *pose2)
    in_first = points @ pose1[0].T + pose1[1]
    in_second = points @ pose2[0].T + pose2[1]
    np.testing.assert_allclose(in_first @ R.T + t, in_second, atol=1e-12)


@pytest.mark.parametrize("degrees", [1e-4, 0.5, 30.0, 90.0, 179.9])
def test_rotation_angle(degrees):
    axis = np.array([0.6, -0.48, 0.64])
    R = rotation(*(np.radians(degrees) * axis))
    assert rotation_angle(R) == pytest.approx(degrees, rel=1e-6)


def test_back_project_inverts_project():
    K1, _, _, _, points = two_views()
    pixels, depth = project(K1, np.eye(3), np.zeros(3), points)
    np.testing.assert_allclose(back_project(K1, pixels, depth), points, atol=1e-12)


def test_skew_is_the_cross_product():
    a, b = np.array([1.0, -2, 3]), np.array([0.5, 4, -1])
    np.testing.assert_allclose(skew(a) @ b, np.cross(a, b))


def test_pixel_affinity_is_what_resizing_does():
    # A picture of its own coordinates, so that a resized pixel tells where it came from.
    x, y = np.meshgrid(np.arange(64, dtype=np.float32), np.arange(48, dtype=np.float32))
    crop = np.dstack([x, y])[8:40, 12:60]
    factors = 24 / 48, 64 / 32
    small = cv2.resize(crop, (24, 64), interpolation=cv2.INTER_LINEAR)
    A = pixel_affinity(*factors, 12, 8)
    for pixel in ((5, 9), (12, 40), (20, 55)):
        source = transform_points(np.linalg.inv(A), np.array([pixel], float))[0]
        np.testing.assert_allclose(small[pixel[1], pixel[0]], source, atol=0.02)


def test_lines_hit_image():
    lines = np.array(
        [
            [1.0, 0, -5],  # x = 5
            [1.0, 0, 5],  # x = -5
            [0, 1.0, -47.4],  # just inside the last row's pixels
            [0, 1.0, -47.6],
            [np.sqrt(0.5), np.sqrt(0.5), -1],  # cuts a corner
            [np.sqrt(0.5), np.sqrt(0.5), 2],
        ]
    )
    expected = [True, False, True, False, True, False]
    assert lines_hit_image(lines, 64, 48).tolist() == expected
    assert lines_hit_image(-lines, 64, 48).tolist() == expected
    assert lines_hit_image(torch.from_numpy(lines), 64, 48).tolist() == expected


def test_homogeneous_keeps_kind_and_type():
    assert homogeneous(np.zeros((2, 2), np.float32)).dtype == np.float32
    assert homogeneous(torch.zeros(1, 4, 2)).shape == (1, 4, 3)
