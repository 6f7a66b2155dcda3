"""Poses over time, and matches judged by them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from sample_bags import odometry_message, pose_message

from scfeat_ros.camera import Camera
from scfeat_ros.ground_truth import Pose, PoseTrack, right_matches, rotation_of

MS = 1_000_000
K = np.array([[400.0, 0, 320], [0, 410, 240], [0, 0, 1]])
TURN = (0.0, 0.0, np.sin(0.3), np.cos(0.3))  # 0.6 rad about z


def rotation_z(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def rotation_y(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


@pytest.fixture
def track():
    track = PoseTrack()
    track.add(0, pose_message((0, 0, 0)))
    track.add(100 * MS, pose_message((1, 2, 4), TURN))
    return track


def test_a_pose_between_two_is_interpolated(track):
    pose = track.at(25 * MS)
    np.testing.assert_allclose(pose.position, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(pose.R, rotation_z(0.15), atol=1e-12)


def test_the_sign_of_a_quaternion_does_not_matter():
    track = PoseTrack()
    track.add(0, pose_message((0, 0, 0), (0, 0, 0, -1)))
    track.add(100 * MS, pose_message((0, 0, 0), tuple(3 * q for q in TURN)))
    np.testing.assert_allclose(track.at(50 * MS).R, rotation_z(0.3), atol=1e-12)


def test_a_rotation_turns_as_its_quaternion_does():
    random = np.random.default_rng(0)
    for axis, angle in zip(random.normal(size=(10, 3)), random.uniform(0.1, 3, 10), strict=True):
        axis /= np.linalg.norm(axis)
        R = rotation_of(np.array([*np.sin(angle / 2) * axis, np.cos(angle / 2)]))
        np.testing.assert_allclose(R, cv2.Rodrigues(angle * axis)[0], atol=1e-12)


def test_a_camera_that_does_not_turn_keeps_its_rotation():
    """Also where rounding makes the cosine of two equal quaternions exceed 1."""
    random = np.random.default_rng(0)
    for quaternion in random.normal(size=(50, 4)).tolist():
        track = PoseTrack()
        track.add(0, pose_message((0, 0, 0), quaternion))
        track.add(100 * MS, pose_message((1, 0, 0), quaternion))
        np.testing.assert_allclose(track.at(30 * MS).R, track.at(0).R, atol=1e-9)


def test_poses_at_and_around_the_ends(track):
    np.testing.assert_allclose(track.at(100 * MS).position, [1, 2, 4])
    np.testing.assert_allclose(track.at(101 * MS).position, [1, 2, 4])
    assert track.at(102 * MS) is None
    assert track.at(-2 * MS) is None
    assert track.covers(100 * MS) and not track.covers(101 * MS)
    assert PoseTrack().at(0) is None and not PoseTrack().covers(0)


def test_a_long_gap_is_not_bridged(track):
    track.add(500 * MS, pose_message((9, 9, 9)))
    assert track.at(300 * MS) is None
    np.testing.assert_allclose(track.at(499 * MS + MS // 2).position, [9, 9, 9])


def test_poses_that_are_none_are_left_out(track):
    track.add(200 * MS, pose_message((np.nan, 0, 0)))
    track.add(300 * MS, pose_message((0, 0, 0), (0, 0, 0, 0)))
    track.add(300 * MS, pose_message((0, 0, 0), (0, 0, np.nan, 1)))
    track.add(50 * MS, pose_message((7, 7, 7)))
    assert not track.covers(101 * MS)
    np.testing.assert_allclose(track.at(50 * MS).position, [0.5, 1, 2])


def test_odometry_is_a_pose_too():
    track = PoseTrack()
    track.add(0, odometry_message(pose_message((1, 2, 3), TURN), "camera"))
    np.testing.assert_allclose(track.at(0).position, [1, 2, 3])
    np.testing.assert_allclose(track.at(0).R, rotation_z(0.6), atol=1e-12)


@pytest.mark.parametrize(
    ("D", "model"),
    [((), "plumb_bob"), ((-0.2, 0.05, 0.001, 0.001, 0), "plumb_bob"), ((0.1,) * 4, "equidistant")],
    ids=["pinhole", "plumb_bob", "equidistant"],
)
def test_true_matches_are_right_and_shifted_ones_are_not(D, model):
    camera = Camera(K, D, model)
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.uniform(-2, 2, (300, 2)), rng.uniform(4, 9, 300)])
    first = Pose(rotation_z(0.2), np.array([10.0, -3.0, 5.0]))
    second = Pose(rotation_z(0.2) @ rotation_y(0.1), np.array([10.8, -3.1, 5.3]))

    def see(pose):
        inside = (X @ first.R.T + first.position - pose.position) @ pose.R
        return camera.project(inside[:, :2] / inside[:, 2:])

    def right(off1=(0, 0), off2=(0, 0)):
        bearings = camera.bearings(see(first) + off1), camera.bearings(see(second) + off2)
        found = right_matches(camera, first, second, *bearings)
        np.testing.assert_array_equal(found, right_matches(camera, second, first, *bearings[::-1]))
        return found

    assert right().all()
    # one pixel off is near enough, and 60 pixels are not, whichever image is wrong
    assert right(off2=(0, 1)).mean() > 0.9
    for off in ((0, 60), (0, -60)):
        assert right(off2=off).mean() < 0.1
        assert right(off1=off).mean() < 0.1


def test_the_limit_is_two_pixels():
    # a camera that moves to the right sees matches on rows
    camera = Camera(K)
    first, second = (Pose(np.eye(3), np.array([x, 0.0, 0.0])) for x in (0, 1))
    points = np.array([[100.0, 100.0]] * 4)
    moved = points + np.array([[-30, 0], [-30, 1.99], [-30, 2.01], [50, -1.9]])
    right = right_matches(camera, first, second, camera.bearings(points), camera.bearings(moved))
    assert right.tolist() == [True, True, False, True]


def test_the_limit_is_of_both_images():
    """The camera backs away: what is 1.5 px off its line now would be 3 px off in the first."""
    camera = Camera(K)
    first, second = (Pose(np.eye(3), np.array([0.0, 0, z])) for z in (1, 0))
    near, far = np.array([[0.4, 0, 1]] * 2), np.array([[0.2, 0.9 / 410, 1], [0.2, 1.5 / 410, 1]])
    assert right_matches(camera, first, second, near, far).tolist() == [True, False]
    assert right_matches(camera, second, first, far, near).tolist() == [True, False]


@pytest.mark.parametrize(
    ("D", "model", "reach"),
    [((), "plumb_bob", 1.0), ((-0.28, 0.07, 0, 0), "plumb_bob", 0.9), ((), "equidistant", 1.4)],
    ids=["pinhole", "plumb_bob", "equidistant"],
)
def test_the_limit_is_of_the_image_as_it_is(D, model, reach):
    """Moved along the pixel rows, a wide lens sees lines that bend; 2 px are 2 px everywhere."""
    camera = Camera(K, D, model)
    first, second = (Pose(np.eye(3), np.array([x, 0.0, 0.0])) for x in (0, 0.2))
    radius, angle = np.meshgrid(np.linspace(0.1, reach, 12), np.linspace(0.2, 2.9, 12))
    radius = np.tan(radius) if model == "equidistant" else radius
    here = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1, 2)
    there = here - (0.05, 0)
    # the lines are those of equal y; across such a line as the image shows it
    step = np.array([1e-5, 0])
    ahead, behind = camera.project(there + step), camera.project(there - step)
    along = ahead - behind
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    bearings = camera.bearings(camera.project(here))
    assert right_matches(camera, first, second, bearings[:0], bearings[:0]).shape == (0,)
    unknown = np.full_like(bearings, np.nan)
    assert not right_matches(camera, first, second, bearings, unknown).any()
    for off in (-1.9, 1.9, -2.15, 2.15):
        moved = camera.bearings(camera.project(there) + off * across)
        right = right_matches(camera, first, second, bearings, moved)
        # in the other image the same error may be the larger one, where pixels see less
        assert right.mean() > 0.9 if abs(off) < 2 else not right.any(), (off, right.mean())


def test_a_camera_that_stands_still_says_nothing():
    first, second = Pose(np.eye(3), np.ones(3)), Pose(rotation_y(0.1), np.ones(3))
    points = np.array([[100.0, 100.0]])
    camera = Camera(K)
    bearings = camera.bearings(points)
    assert right_matches(camera, first, second, bearings, bearings) is None
    # or moves by what is lost in rounding
    second = Pose(np.eye(3), 1e5 * np.ones(3))
    first = Pose(np.eye(3), second.position + np.array([1e-10, 0, 0]))
    assert (first.position != second.position).any()
    assert right_matches(camera, first, second, bearings, bearings) is None
