"""Which correspondences agree with one epipolar geometry."""

from __future__ import annotations

import numpy as np
import pytest

from scfeat_ros.camera import Camera
from scfeat_ros.features import Features
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.matcher import epipolar_inliers
from scfeat_ros.parameters import MatcherOptions

K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
LENSES = {
    "plumb_bob": Camera(K, [-0.28, 0.07, 2e-4, 2e-5, 0], "plumb_bob", (640, 480)),
    "equidistant": Camera(
        [[250, 0, 320], [0, 250, 240], [0, 0, 1]], [-0.01, 0.002, 0, 0], "equidistant", (640, 480)
    ),
}


def two_views(count=120, wrong=40, noise=0.2, seed=0):
    """Points of a scene in two images, the last `wrong` ones mismatched."""
    rng = np.random.default_rng(seed)
    angle = 0.1
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    t = np.array([0.6, 0.1, 0.05])
    X = np.column_stack([rng.uniform(-2, 2, (count, 2)), rng.uniform(4, 9, count)])

    def project(points):
        pixels = points @ K.T
        return pixels[:, :2] / pixels[:, 2:]

    first = project(X) + rng.normal(0, noise, (count, 2))
    second = project(X @ R.T + t) + rng.normal(0, noise, (count, 2))
    second[count - wrong :] += rng.uniform(30, 80, (wrong, 2)) * rng.choice([-1, 1], (wrong, 2))
    return first, second


def test_epipolar_geometry_tells_right_from_wrong():
    first, second = two_views()
    inliers, found = epipolar_inliers(first, second, threshold=1.0)
    assert inliers.shape == (120,) and inliers.dtype == bool
    assert inliers[:80].mean() > 0.95
    # a mismatch can lie on its epipolar line by chance
    assert inliers[80:].mean() < 0.2
    # the matrix found describes the scene: true points lie on its lines
    exact = two_views(wrong=0, noise=0.0)
    for points, others, matrix in ((*exact, found), (*exact[::-1], found.T)):
        lines = np.column_stack([points, np.ones(120)]) @ matrix.T
        distance = np.abs((lines * np.column_stack([others, np.ones(120)])).sum(axis=1))
        assert (distance / np.linalg.norm(lines[:, :2], axis=1)).max() < 1.0


def test_epipolar_verification_repeats():
    first, second = two_views(seed=1)
    once, again = (epipolar_inliers(first, second) for _ in range(2))
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


@pytest.mark.parametrize(
    "points",
    [np.zeros((0, 2)), np.arange(14.0).reshape(7, 2), np.ones((30, 2)), np.full((30, 2), np.nan)],
    ids=["none", "seven", "all in one place", "not a number"],
)
@pytest.mark.parametrize("estimate_from", [None, 8])
def test_where_no_geometry_can_be_found_nothing_is_an_inlier(points, estimate_from):
    inliers, matrix = epipolar_inliers(points, points, estimate_from=estimate_from)
    assert inliers.shape == (len(points),) and not inliers.any()
    assert matrix is None


@pytest.mark.parametrize("count", [7, 8])
def test_eight_correspondences_are_enough(count):
    inliers, matrix = epipolar_inliers(*two_views(count, wrong=0, noise=0.0))
    assert inliers.tolist() == [count == 8] * count and (matrix is None) == (count < 8)


def test_the_threshold_is_in_pixels():
    first, second = two_views(wrong=0, noise=1.0)
    counts = [epipolar_inliers(first, second, limit)[0].sum() for limit in (0.2, 1.0, 5.0)]
    assert counts[0] < 60 < counts[1] < 110 < counts[2]


def test_all_are_judged_by_their_distance_to_first_order():
    first, second = two_views(count=1200, wrong=0, noise=1.0, seed=3)
    found, matrix = epipolar_inliers(first, second, estimate_from=300)
    x, y = (np.column_stack([points, np.ones(1200)]) for points in (first, second))
    gradient = np.column_stack([(x @ matrix.T)[:, :2], (y @ matrix)[:, :2]])
    distance = np.abs((y * (x @ matrix.T)).sum(axis=1)) / np.linalg.norm(gradient, axis=1)
    np.testing.assert_array_equal(found, distance < 1)
    assert 600 < found.sum() < 1100


def test_a_part_of_the_correspondences_is_enough_to_estimate_from():
    first, second = two_views(count=1200, wrong=200, seed=2)
    of_all, _ = epipolar_inliers(first, second)
    of_some, matrix = epipolar_inliers(first, second, estimate_from=300)
    assert matrix is not None and of_some.shape == (1200,)
    assert (of_all == of_some).mean() > 0.97
    # a limit that is not reached changes nothing
    same, _ = epipolar_inliers(first, second, estimate_from=1200)
    np.testing.assert_array_equal(same, of_all)


def views_through(lens, count=300, wrong=30, noise=0.2, seed=0):
    """Points of a scene in two images of a camera with this lens, the last ones mismatched."""
    rng = np.random.default_rng(seed)
    first = rng.uniform((5, 5), (635, 475), (count, 2))
    X = lens.bearings(first) * rng.uniform(1, 4, (count, 1))
    cos, sin = np.cos(0.12), np.sin(0.12)
    moved = X @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]]) + (0.2, 0.1, 0.15)
    second = lens.project(moved[:, :2] / moved[:, 2:])
    second[count - wrong :] = rng.uniform((5, 5), (635, 475), (wrong, 2))
    return (points + rng.normal(0, noise, (count, 2)) for points in (first, second))


@pytest.mark.parametrize("model", LENSES)
def test_a_lens_bends_epipolar_lines(model):
    lens = LENSES[model]
    first, second = views_through(lens)
    plain, _ = epipolar_inliers(first, second)
    inliers, matrix = epipolar_inliers(first, second, camera=lens)
    assert plain[:270].mean() < 0.9 and inliers[:270].mean() > 0.99
    assert inliers[270:].mean() < 0.1
    one, other = (lens.bearings(points) @ lens.K.T for points in views_through(lens, noise=0))
    lines = one @ matrix.T
    distance = np.abs((other * lines).sum(axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert np.median(distance[:270]) < 0.2
    # the distance is one in the image, however much the border is stretched by undistortion
    strict, _ = epipolar_inliers(first, second, 0.2, camera=lens)
    central = np.linalg.norm(first - (320, 240), axis=1)[:270] < 150
    shares = strict[:270][central].mean(), strict[:270][~central].mean()
    assert 0.4 < min(shares) and max(shares) - min(shares) < 0.2 and max(shares) < 0.9


def test_known_bearings_are_not_computed_again(monkeypatch):
    lens = LENSES["equidistant"]
    first, second = views_through(lens)
    expected = epipolar_inliers(first, second, camera=lens)
    known = lens.bearings(first), lens.bearings(second)
    monkeypatch.delattr(Camera, "bearings")
    inliers, matrix = epipolar_inliers(first, second, camera=lens, bearings=known)
    np.testing.assert_array_equal(inliers, expected[0])
    np.testing.assert_array_equal(matrix, expected[1])


def test_a_camera_without_distortion_changes_nothing():
    first, second = two_views()
    plain, undistorted = (
        epipolar_inliers(first, second, camera=camera) for camera in (None, Camera(K))
    )
    np.testing.assert_array_equal(plain[0], undistorted[0])
    np.testing.assert_array_equal(plain[1], undistorted[1])


def test_points_outside_of_the_lens_model_are_no_inliers():
    lens = LENSES["equidistant"]
    first, second = views_through(lens)
    first[:5] = -2000
    inliers, _ = epipolar_inliers(first, second, camera=lens)
    assert not inliers[:5].any() and inliers[5:270].mean() > 0.99
    inliers, matrix = epipolar_inliers(first - 4000, second, camera=lens)
    assert not inliers.any() and matrix is None


def test_front_end_undistorts_for_its_epipolar_check(tiny_extractor):
    lens = LENSES["plumb_bob"]
    descriptors = np.eye(300, dtype=np.float32)
    frames = [
        Features(points.astype(np.float32), np.ones(300, np.float32), descriptors, (640, 480))
        for points in views_through(lens, wrong=0)
    ]
    counts = []
    for camera in (None, lens):
        front_end = FrontEnd(tiny_extractor, MatcherOptions(epipolar_threshold=1.0))
        for number, features in enumerate(frames):
            result = front_end.follow(features, number, camera=camera)
        counts.append(len(result.matches))
    assert counts[0] < 280 and counts[1] > 297
