"""Measures whose value is known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfeat_training.evaluation import metrics
from scfeat_training.evaluation.hpatches import published


def rotation(axis, degrees):
    x, y, z = np.array(axis, float) / np.linalg.norm(axis)
    a = np.radians(degrees)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(a) * skew + (1 - np.cos(a)) * skew @ skew


def test_auc_of_a_known_list():
    # the curve runs through (0, 0), (1, 1/4) ... (4, 1), (5, 1): its area is 3
    assert metrics.auc([3, 1, 4, 2], [5, 2.5]) == pytest.approx([3 / 5, 0.75 / 2.5])
    # two failures halve it; nothing solved is 0
    assert metrics.auc([1, 2, np.inf, np.inf], [4]) == pytest.approx([(0.125 + 0.375 + 1.0) / 4])
    assert metrics.auc([np.inf] * 3, [5, 10]) == [0, 0]
    assert metrics.auc([], [5]) == [0]
    assert metrics.auc([5], [5]) == [0]  # an error of the threshold is beyond it


@given(st.integers(2, 400), st.floats(0.5, 50))
def test_auc_of_evenly_spread_errors(count, threshold):
    errors = threshold * np.arange(1, count + 1) / (count + 1)
    # a triangle up to count / (count + 1) of the threshold, then full recall
    expected = (count / 2 + 1) / (count + 1)
    assert metrics.auc(errors, [threshold])[0] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["PoSFeat", "SIFT + CAPS", "DISK-W"])
@pytest.mark.parametrize("split", ["viewpoint", "illumination", "overall"])
def test_mma_score_of_published_curves_is_the_papers_table(method, split):
    (row,) = [r for r in published() if (r["method"], r["split"]) == (method, split)]
    curve = [float(row[f"mma_{t}"]) for t in range(1, 11)]
    assert 100 * metrics.mma_score(curve) == pytest.approx(float(row["mma_score"]), abs=0.051)


def test_mma_score_of_simple_curves():
    assert metrics.mma_score([0.3] * 10) == pytest.approx(0.3)
    # right from 2 px on: all weights (their sum is 14.5) but that of 1 px (1.9)
    assert metrics.mma_score([0] + [1] * 9) == pytest.approx(1 - 1.9 / 14.5)
    with pytest.raises(ValueError, match="10 px"):
        metrics.mma_score([1.0] * 9)


def test_published_figures_are_whole():
    rows = published()
    overall = {r["method"]: float(r["mma_score"]) for r in rows if r["split"] == "overall"}
    assert overall["SCFeat (paper)"] == 78.8
    assert all(row["source"] for row in rows)
    for name in overall:
        assert {r["split"] for r in rows if r["method"] == name} == {
            "viewpoint",
            "illumination",
            "overall",
        }


def test_matching_accuracy_counts_the_threshold_itself():
    assert metrics.matching_accuracy([0.5, 1.0, 1.5, 9], [1, 2]).tolist() == [0.5, 0.75]
    assert metrics.matching_accuracy([], [1, 2]).tolist() == [0, 0]


def test_motion_errors_with_and_without_a_translation():
    K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    first, second = np.array([[100.0, 50], [300, 200]]), np.array([[80.0, 53], [260, 200]])
    R = np.eye(3)
    sideways = metrics.motion_errors(K, K, R, np.array([1.0, 0, 0]), first, second)
    assert sideways == pytest.approx([3, 0], abs=1e-9)
    still = metrics.motion_errors(K, K, R, np.zeros(3), first, second)
    assert still == pytest.approx([np.hypot(20, 3), 40])
    # another lens, and turned
    K2 = np.array([[250.0, 0, 100], [0, 250, 90], [0, 0, 1]])
    R, X = rotation([1, 2, -1], 10), np.array([[-0.5, 0.3, 4.0], [1, -0.7, 6]])
    for t in (np.zeros(3), np.array([0.5, -0.3, 0.4])):
        seen = [camera[:, :2] / camera[:, 2:] for camera in (X @ K.T, (X @ R.T + t) @ K2.T)]
        assert metrics.motion_errors(K, K2, R, t, *seen) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("degrees", [0, 1e-6, 0.01, 45, 179])
def test_angles(degrees):
    assert metrics.rotation_error(rotation([1, -2, 1], degrees), np.eye(3)) == pytest.approx(
        degrees, abs=1e-9
    )
    t = rotation([0, 0, 1], degrees) @ [2.0, 0, 0]
    # the sign of a translation does not count, so no angle exceeds 90
    expected = min(degrees, 180 - degrees)
    assert metrics.direction_error(t, np.array([1.0, 0, 0])) == pytest.approx(expected, abs=1e-9)


def test_repeatability_and_matching_score_of_a_known_layout():
    H = np.array([[1.0, 0, 100], [0, 1, 0], [0, 0, 1]])  # the second image shows 100 px less
    first = np.array([[10.0, 10], [20, 20], [30, 30], [150, 10]])  # the last one leaves
    second = np.array([[110.0, 10], [121.0, 20], [160, 70]])
    size = (200, 100)
    # 2 of 3 of the first image are found again, and 2 of 3 of the second
    assert metrics.repeatability(first, second, H, size, size, 3) == pytest.approx(4 / 6)
    assert metrics.repeatability(first, second, H, size, size, 0.5) == pytest.approx(2 / 6)
    matches = np.array([[0, 0], [1, 1], [2, 2]])
    score = metrics.homography_matching_score(first, second, matches, H, size, size, 3)
    assert score == pytest.approx(2 / 3)


def test_the_shared_region_is_that_of_both_images():
    H = np.diag([2.0, 2.0, 1.0])  # the second image shows a part of the first, twice as large
    # two within half a pixel of the second image's border, one to the right of it, one below
    first = np.array([[-0.2, -0.2], [20, 10], [49.7, 10], [50.2, 10], [20, 30]])
    second = np.array([[40.0, 20], [98, 20]])
    sizes = (100, 80), (100, 40)
    # one of three of the first image is found again, and one of two of the second
    assert metrics.repeatability(first, second, H, *sizes, 0.5) == pytest.approx(2 / 5)
    other_way = second, first, np.linalg.inv(H), *sizes[::-1]
    assert metrics.repeatability(*other_way, 0.5) == pytest.approx(2 / 5)
    assert metrics.repeatability(first, second[:0], H, *sizes) == 0
    # a match off the shared region may be right; no share exceeds 1
    matches = np.array([[0, 0], [1, 0], [2, 1], [3, 1]])
    score = metrics.homography_matching_score(first, second, matches, H, *sizes, 3)
    assert score == 1


def test_places_at_infinity_are_no_matches():
    H = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, -10]])
    points = np.array([[10.0, 0], [10, 5], [0, 0]])
    assert np.isinf(metrics.project_homography(H, points)[:2]).all()
    errors = metrics.homography_errors(H, points, points)
    assert errors.tolist() == [np.inf, np.inf, 0]
    assert metrics.corner_error(H, np.eye(3), (11, 11)) == np.inf
    with np.errstate(invalid="ignore"):
        assert metrics.corner_error(H, H, (11, 11)) == np.inf


def test_extractions_that_failed_have_no_time():
    assert metrics.median_milliseconds([np.nan, 0.002, 0.004, np.nan]) == pytest.approx(3)
    assert metrics.median_milliseconds([np.nan]) is None


def test_corner_error():
    H = np.diag([2.0, 2.0, 1.0])
    corners = np.hypot([0, 99, 0, 99], [0, 0, 79, 79])  # the outermost pixels' centres
    assert metrics.corner_error(np.eye(3), H, (100, 80)) == pytest.approx(corners.mean())
    shifted = H.copy()
    shifted[:2, 2] = 3, 4
    assert metrics.corner_error(shifted, H, (100, 80)) == pytest.approx(5)
    assert metrics.corner_error(None, H, (100, 80)) == np.inf


def test_track_lengths():
    steps = [np.array([[0, 1], [1, 0]]), np.array([[1, 0]]), np.zeros((0, 2), int)]
    # keypoint 0 of frame 0 is seen in frames 0, 1, 2; keypoint 1 in frames 0 and 1
    assert sorted(metrics.track_lengths(steps, [2, 3, 2, 4])) == [2, 3]


def test_similarity_transform_is_found_again():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(20, 3))
    R, t = rotation([3, 1, 2], 130), np.array([5.0, -2, 1])
    scale, R_found, t_found = metrics.similarity_transform(points, 2.5 * points @ R.T + t)
    assert scale == pytest.approx(2.5)
    assert R_found == pytest.approx(R)
    assert t_found == pytest.approx(t)


def test_a_similarity_transform_is_no_reflection():
    rng = np.random.default_rng(2)
    for degrees in (10, 130, 170):
        points = rng.normal(size=(20, 3)) * (1, 1, 0)  # in a plane, which does not know its back
        R = rotation([3, 1, 2], degrees)
        _, found, _ = metrics.similarity_transform(points, points @ R.T)
        assert found == pytest.approx(R)
    octahedron = np.concatenate([np.eye(3), -np.eye(3)])
    scale, R, _ = metrics.similarity_transform(octahedron, octahedron * (1, 1, -1))
    assert np.linalg.det(R) == pytest.approx(1)
    assert scale == pytest.approx(1 / 3)  # two axes fit, and the third one is the wrong way round
