"""CameraInfo -> undistorted bearings."""

from __future__ import annotations

import numpy as np
import pytest
from sample_bags import ROS1, info_message

from scfeat_ros.camera import Camera
from scfeat_ros.errors import InputError

K = np.array([[300.0, 0, 310.0], [0, 320.0, 250.0], [0, 0, 1]])
PLUMB_BOB = (-0.28, 0.09, 0.001, -0.0007, -0.01)
RATIONAL = (0.8, -0.3, 0.0004, -0.0002, 0.05, 1.1, -0.2, 0.02)
EQUIDISTANT = (0.02, -0.008, 0.003, -0.0006)


def plumb_bob(x, y, D):
    """The model of ROS's CameraInfo for one point, written down term by term."""
    k1, k2, p1, p2, k3 = D
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )


def rational(x, y, D):
    k1, k2, p1, p2, k3, k4, k5, k6 = D
    r2 = x * x + y * y
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )


def equidistant(x, y, D):
    r = np.hypot(x, y)
    angle = np.arctan(r)
    distorted = angle * (1 + sum(k * angle ** (2 * i + 2) for i, k in enumerate(D)))
    return (x, y) if r == 0 else (x * distorted / r, y * distorted / r)


MODELS = [
    ("plumb_bob", PLUMB_BOB, plumb_bob, 0.7),
    ("rational_polynomial", RATIONAL, rational, 0.9),
    ("equidistant", EQUIDISTANT, equidistant, 2.5),
]


@pytest.mark.parametrize(("name", "D", "distort", "widest"), MODELS, ids=[m[0] for m in MODELS])
def test_bearings_undo_the_lens(name, D, distort, widest):
    rng = np.random.default_rng(0)
    directions = rng.uniform(-widest, widest, (200, 2))
    distorted = np.array([distort(x, y, D) for x, y in directions])
    pixels = distorted * (K[0, 0], K[1, 1]) + (K[0, 2], K[1, 2])
    bearings = Camera(K, D, name).bearings(pixels)
    assert bearings.dtype == np.float32
    np.testing.assert_array_equal(bearings[:, 2], 1)
    np.testing.assert_allclose(bearings[:, :2], directions, atol=2e-5 * max(1, widest**2))


@pytest.mark.parametrize(("name", "D", "distort", "widest"), MODELS, ids=[m[0] for m in MODELS])
def test_projection_is_the_lens_model(name, D, distort, widest):
    directions = np.random.default_rng(1).uniform(-widest, widest, (50, 2))
    distorted = np.array([distort(x, y, D) for x, y in directions])
    pixels = Camera(K, D, name).project(directions)
    np.testing.assert_allclose(pixels, distorted * (300, 320) + (310, 250), atol=1e-6)


@pytest.mark.parametrize(("name", "D", "distort", "widest"), MODELS, ids=[m[0] for m in MODELS])
def test_pixel_gradients_are_those_of_the_projection(name, D, distort, widest):
    camera = Camera(K, D, name)
    directions = np.random.default_rng(0).uniform(-widest, widest, (50, 2)) / np.sqrt(2)
    for gradient, axis in zip(camera.pixel_gradients(directions), np.eye(2), strict=True):
        ahead, behind = (camera.project(directions + step * axis) for step in (1e-5, -1e-5))
        np.testing.assert_allclose(gradient, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-4)
    unknown = camera.pixel_gradients(np.full((2, 2), np.nan))
    assert np.isnan(unknown).all()
    assert [len(gradient) for gradient in camera.pixel_gradients(np.zeros((0, 2)))] == [0, 0]


@pytest.mark.parametrize("name", ["plumb_bob", "rational_polynomial", "equidistant"])
def test_no_coefficients_mean_no_distortion_but_for_the_fisheye(name):
    bearings = Camera(K, (), name).bearings(np.array([[310.0, 250.0], [610.0, 250.0]]))
    edge = np.tan(1.0) if name == "equidistant" else 1.0
    np.testing.assert_allclose(bearings, [[0, 0, 1], [edge, 0, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("alias", "D", "name"),
    [
        ("", PLUMB_BOB, "plumb_bob"),
        ("radtan", PLUMB_BOB[:4], "plumb_bob"),
        ("fisheye", EQUIDISTANT, "equidistant"),
    ],
)
def test_other_names_of_models_are_known(alias, D, name):
    points = np.array([[100.0, 80.0], [500.0, 400.0]])
    camera = Camera(K, D, alias)
    assert camera.model == name
    np.testing.assert_array_equal(camera.bearings(points), Camera(K, D, name).bearings(points))


def test_four_coefficients_of_plumb_bob_leave_out_the_last_radial_one():
    points = np.array([[100.0, 80.0], [500.0, 400.0]])
    four, five = Camera(K, PLUMB_BOB[:4]), Camera(K, (*PLUMB_BOB[:4], 0.0))
    np.testing.assert_array_equal(four.bearings(points), five.bearings(points))


def test_pixels_that_the_lens_cannot_have_made_are_nan():
    # r * (1 - 0.28 r^2 + ...) has a largest value; farther out there is nothing
    camera = Camera(K, (-0.28, 0.0, 0.0, 0.0, 0.0))
    bearings = camera.bearings(np.array([[310.0, 250.0], [310.0 + 300 * 2, 250.0]]))
    assert np.isfinite(bearings[0]).all()
    assert np.isnan(bearings[1]).all()
    # a fisheye pixel at 2 rad lies behind the image plane z = 1
    fisheye = Camera(K, (0.0,) * 4, "equidistant")
    assert np.isnan(fisheye.bearings(np.array([[310.0 + 300 * 2.0, 250.0]]))).all()


@pytest.mark.parametrize(
    ("D", "widest"),
    [
        ((0.0,) * 4, 89),
        ((0.08, 0.02, 0, 0), 89),
        ((-0.0062, 0.041, -0.039, 0.006), 89),
        (EQUIDISTANT, 89),
        ((0.5, -0.4, 0.1, -0.3), 46),  # its radius shrinks again from 52 degrees on
    ],
)
def test_a_fisheye_has_bearings_up_to_ninety_degrees(D, widest):
    """However many focal lengths from the middle the image of such an angle lies."""
    shares = [0, 1e-6, 0.1, 0.7, 0.85, 0.9, 0.95, 1]
    angles, around = np.meshgrid(np.radians(widest) * np.array(shares), np.arange(6))
    angles, around = angles.ravel(), around.ravel()
    radius = np.tan(angles)
    directions = np.column_stack([radius * np.cos(around), radius * np.sin(around)])
    pixels = [equidistant(x, y, D) for x, y in directions] * K[[0, 1], [0, 1]] + K[:2, 2]
    bearings = Camera(K, D, "equidistant").bearings(pixels)
    np.testing.assert_allclose(bearings[:, :2], directions, rtol=1e-5, atol=1e-7)


def test_no_points_give_no_bearings():
    assert Camera(K).bearings(np.zeros((0, 2))).shape == (0, 3)


def test_a_camera_info_is_read():
    message = info_message(K, (640, 480), D=RATIONAL, model="rational_polynomial")
    camera = Camera.from_message(message)
    assert camera.image_size == (640, 480)
    assert camera.fits((640, 480)) and not camera.fits((320, 240))
    point = np.array([[400.0, 100.0]])
    np.testing.assert_array_equal(
        camera.bearings(point), Camera(K, RATIONAL, "rational_polynomial").bearings(point)
    )


def test_a_rectified_image_has_the_intrinsics_of_p_and_no_distortion():
    message = info_message(K, (640, 480), D=PLUMB_BOB)
    message.p = np.array([200.0, 0, 300, 9, 0, 210, 240, 0, 0, 0, 1, 0])
    camera = Camera.from_message(message, rectified=True)
    np.testing.assert_allclose(camera.bearings(np.array([[400.0, 135]])), [[0.5, -0.5, 1]])
    message.p[:] = 0
    assert Camera.from_message(message, rectified=True) is None


def test_a_camera_info_of_ros_1_is_read():
    message = info_message(K, (640, 480), D=PLUMB_BOB, types=ROS1.types)
    assert not hasattr(message, "k")
    camera = Camera.from_message(message)
    np.testing.assert_array_equal(camera.K, K)
    np.testing.assert_array_equal(camera.D, PLUMB_BOB)


def test_region_of_interest_and_binning_move_the_pixels():
    whole = Camera.from_message(info_message(K, (640, 480), D=PLUMB_BOB))
    message = info_message(K, (640, 480), D=PLUMB_BOB, roi=(100, 60, 400, 300), binning=2)
    part = Camera.from_message(message)
    assert part.image_size == (200, 150)
    point = np.array([[333.0, 222.0]])
    np.testing.assert_allclose(
        part.bearings((point - (100, 60)) / 2), whole.bearings(point), atol=1e-6
    )
    message = info_message(K, (641, 481), D=PLUMB_BOB, roi=(9, 9, 9, 0), binning=2)
    message.binning_y = 4
    odd = Camera.from_message(message)  # a region without a height is none
    assert odd.image_size == (320, 120)
    np.testing.assert_allclose(odd.bearings(point / (2, 4)), whole.bearings(point), atol=1e-6)


def test_a_camera_info_without_a_size_fits_every_image():
    camera = Camera.from_message(info_message(K, (0, 0), D=PLUMB_BOB))
    assert camera.fits((640, 480)) and camera.fits((1, 1))


def test_an_uncalibrated_camera_is_none():
    assert Camera.from_message(info_message(np.zeros((3, 3)), (640, 480), D=())) is None


@pytest.mark.parametrize(
    ("K", "D", "model", "text"),
    [
        (K, (0.1,) * 4, "kannala_brandt", "kannala_brandt.*plumb_bob, rational_polynomial"),
        (K, (0.1,) * 7, "plumb_bob", "7 distortion coefficients.*0 or 4 or 5"),
        (K, (0.1,) * 5, "equidistant", "5 distortion coefficients"),
        (K, (0.1,) * 5, "rational_polynomial", "5 distortion coefficients.*0 or 8"),
        (np.diag([-1.0, 1, 1]), (), "plumb_bob", "focal"),
        (np.diag([1.0, 0, 1]), (), "plumb_bob", "focal"),
        (np.diag([1.0, 1, 0]), (), "plumb_bob", "a last element of 1"),
        (np.diag([np.nan, 1, 1]), (), "plumb_bob", "focal"),
        (K, (np.nan,) * 5, "plumb_bob", "distortion coefficients: D is"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(K, D, model, text):
    with pytest.raises(InputError, match=text):
        Camera(K, D, model)


@pytest.mark.parametrize("size", [(0, 0), (640, 480)])
def test_the_image_size_does_not_change_bearings(size):
    """With a known size the lens model is tried out beforehand."""
    points = np.random.default_rng(2).uniform(0, 479, (50, 2))
    expected = Camera(K, PLUMB_BOB).bearings(points)
    np.testing.assert_array_equal(Camera(K, PLUMB_BOB, image_size=size).bearings(points), expected)
    strong = Camera(K, (-0.28, 0.0, 0.0, 0.0, 0.0), image_size=(1000, 500))
    far = np.array([[310.0, 250.0], [990.0, 250.0]])
    assert np.isfinite(strong.bearings(far)).all(axis=1).tolist() == [True, False]
    # outside of the image nothing has been tried
    weak = Camera(K, (-0.03, 0.0, 0.0, 0.0, 0.0), image_size=(640, 480))
    far = np.array([[310.0, 250.0], [990.0, 250.0], [-990.0, 250.0]])
    for points in (far[:2], far[::2]):
        assert np.isfinite(weak.bearings(points)).all(axis=1).tolist() == [True, False]
    # and what is inside is, up to the last pixel: here from column 228 on there is nothing
    corner = np.array([[300.0, 0, 10], [0, 300, 10], [0, 0, 1]])
    edge = Camera(corner, (-0.28, 0.0, 0.0, 0.0, 0.0), image_size=(231, 21))
    near = np.array([[227.0, 10.0], [230.0, 10.0]])
    assert np.isfinite(edge.bearings(near)).all(axis=1).tolist() == [True, False]


def test_the_same_calibration_is_known_again():
    camera = Camera(K, PLUMB_BOB, image_size=(640, 480))
    assert camera.same_as(Camera(K, PLUMB_BOB, image_size=(640, 480)))
    assert not camera.same_as(None)
    for other in (
        Camera(2 * K - np.diag([0, 0, 1.0]), PLUMB_BOB, image_size=(640, 480)),
        Camera(K, image_size=(640, 480)),
        Camera(K, PLUMB_BOB),
    ):
        assert not camera.same_as(other)
    fisheye = Camera(K, EQUIDISTANT, "equidistant")
    assert not fisheye.same_as(Camera(K, EQUIDISTANT))
