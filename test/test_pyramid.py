"""Features of one image at several sizes: the sizes, what is kept of each, and what it is for."""

import cv2
import numpy as np
import pytest
from test_extractor import check_invariants, textured_image

from scfeat_ros import pyramid
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features
from scfeat_ros.matcher import match


@pytest.mark.parametrize(
    ("size", "levels", "expected"),
    [
        ((640, 480), 1, [(640, 480)]),
        ((640, 480), 3, [(640, 480), (453, 339), (320, 240)]),
        ((100, 90), 9, [(100, 90), (71, 64)]),
        ((10, 8), 3, [(10, 8)]),
        ((640, 100), 3, [(640, 100), (453, 71)]),
    ],
)
def test_sizes(size, levels, expected):
    assert pyramid.level_sizes(size, levels) == expected


def features(*rows):
    """Of (x, y, score); a descriptor tells the row."""
    table = np.array(rows, np.float32).reshape(-1, 3)
    return Features(table[:, :2], table[:, 2], table[:, 2:].copy(), (40, 30))


def test_of_keypoints_at_one_place_the_best_level_stays():
    first = features((10, 10, 5), (20, 10, 2), (21, 10, 1))
    second = features((11.2, 10.8, 4), (20, 11, 3), (30, 29.4, 0.5))
    kept = pyramid.merge([first, second, features()], count=10, radius=1)
    # neighbours on one level have passed its own non-maximum suppression, but (21, 10) is beside
    # a better one of the other level
    assert kept.scores.tolist() == [5, 3, 0.5]
    assert kept.descriptors[:, 0].tolist() == [5, 3, 0.5]
    assert kept.keypoints.tolist() == [[10, 10], [20, 11], pytest.approx([30, 29.4])]
    assert kept.image_size == (40, 30)
    all_of_them = pyramid.merge([first, second], count=10, radius=0)
    assert all_of_them.scores.tolist() == [5, 4, 3, 2, 1, 0.5]
    assert pyramid.merge([first, second], count=2, radius=0).scores.tolist() == [5, 4]


def test_equal_scores_neighbours_of_one_level_and_keypoints_at_the_border_stay():
    # as far out as a keypoint can be: half a pixel from the last pixel's centre
    first = features((39.5, 29.5, 4), (10, 10, 3), (11, 10, 2))
    second = features((-0.5, -0.5, 5), (39.4, 29.4, 4))
    assert pyramid.merge([first, second], count=10, radius=1).scores.tolist() == [5, 4, 4, 3, 2]


@pytest.fixture(scope="module")
def extractor():
    return Extractor.from_pretrained("scfeat-s", device="cpu", precision="fp32")


def test_views_from_one_and_from_three_times_the_distance(extractor):
    near = textured_image(480, 360)
    far = np.full((240, 320, 3), 127, np.uint8)
    far[60:180, 80:240] = cv2.resize(near, (160, 120), interpolation=cv2.INTER_AREA)

    def right_matches(levels):
        extractor.set_options(levels=levels)
        a, b = extractor(near), extractor(far)
        check_invariants(a, (480, 360), extractor.descriptor_dim)
        one, other = match(a, b).indices.T
        there = (a.keypoints[one] + 0.5) / 3 - 0.5 + (80, 60)
        return np.sum(np.linalg.norm(there - b.keypoints[other], axis=1) < 2)

    assert right_matches(4) > 2 * right_matches(1)


def test_one_level_is_the_default_and_count_and_mask_hold_on_all(extractor):
    image = textured_image(320, 240)
    mask = np.zeros((240, 320), np.uint8)
    mask[:, :200] = 255
    extractor.set_options(levels=1)
    single = extractor(image)
    extractor.set_options(levels=3, max_keypoints=300, max_size=240)
    found = extractor(image, mask)
    check_invariants(found, (320, 240), extractor.descriptor_dim)
    assert len(found) == 300 and found.keypoints[:, 0].max() < 201
    extractor.set_options(levels=1, max_keypoints=2048, max_size=0)
    np.testing.assert_array_equal(extractor(image).keypoints, single.keypoints)
    with pytest.raises(ValueError, match="levels must lie between 1 and 9"):
        extractor.set_options(levels=0)
