"""Drawing of keypoints, trails and matches."""

from __future__ import annotations

import numpy as np
import pytest

from scfeat_ros.features import Features, FrameResult, Matches
from scfeat_ros.overlay import OLD_TRACK, Overlay, draw_matches

GREY = np.full((60, 80), 40, np.uint8)


def features(points):
    points = np.asarray(points, np.float32).reshape(-1, 2)
    count = len(points)
    return Features(points, np.ones(count, np.float32), np.ones((count, 4), np.float32), (80, 60))


def result(points, ids, lengths, reset=None):
    return FrameResult(
        stamp=0,
        frame_id="",
        features=features(points),
        track_ids=np.array(ids, np.uint32),
        track_lengths=np.array(lengths, np.int32),
        matches=Matches.empty(),
        previous_stamp=None,
        previous_keypoints=np.zeros((0, 2), np.float32),
        reset=reset,
    )


def changed(picture, x, y):
    """Whether anything is drawn within a pixel of a place."""
    return bool((picture[y - 1 : y + 2, x - 1 : x + 2] != 40).any())


def test_the_picture_is_a_colour_copy():
    image = GREY.copy()
    picture = Overlay().draw(image, result([[40, 30]], [1], [1]))
    assert picture.shape == (60, 80, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(image, GREY)
    colour = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(Overlay().draw(colour, result([[40, 30]], [1], [1])), picture)
    assert (colour == 40).all()


def test_a_picture_without_keypoints_is_the_image():
    assert (Overlay().draw(GREY, result([], [], [])) == 40).all()


def test_young_tracks_are_blue_and_old_ones_red():
    def hue(length):
        picture = Overlay().draw(GREY, result([[40, 30]], [1], [length])).astype(int)
        drawn = picture[(picture != 40).any(axis=2)]
        return drawn.mean(axis=0)

    young, old, new = hue(2), hue(OLD_TRACK), hue(1)
    assert young[2] > young[0] + 30
    assert old[0] > old[2] + 30
    assert new[0] == new[1] == new[2]


def test_a_track_has_a_trail_to_where_it_was():
    overlay = Overlay()
    overlay.draw(GREY, result([[10, 30]], [7], [1]))
    picture = overlay.draw(GREY, result([[60, 30]], [7], [2]))
    assert changed(picture, 35, 30)
    assert changed(picture, 10, 30)


def test_trails_follow_ids_over_frames_that_were_not_drawn():
    overlay = Overlay()
    overlay.draw(GREY, result([[10, 10], [10, 50]], [7, 8], [1, 1]))
    overlay.follow(result([[60, 50], [60, 10]], [8, 7], [2, 2]))
    picture = overlay.draw(GREY, result([[60, 40], [60, 20]], [8, 7], [3, 3]))
    assert changed(picture, 35, 10) and changed(picture, 35, 50)
    assert not changed(picture, 35, 30)


@pytest.mark.parametrize(
    ("ids", "reset"), [([9], None), ([7], "time went backwards")], ids=["other track", "reset"]
)
def test_no_trail_comes_from_another_track_or_from_before_a_reset(ids, reset):
    overlay = Overlay()
    overlay.draw(GREY, result([[10, 30]], [7], [1]))
    picture = overlay.draw(GREY, result([[60, 30]], ids, [2], reset))
    assert not changed(picture, 35, 30)


def test_keypoints_at_and_beyond_the_border_are_no_problem():
    corners = [[-0.5, -0.5], [79.5, 59.5], [0, 59], [79, 0]]
    picture = Overlay().draw(GREY, result(corners, [1, 2, 3, 4], [1, 2, 3, 40]))
    assert picture.shape == (60, 80, 3)


def test_matches_are_drawn_side_by_side():
    first, second = np.full((60, 80), 40, np.uint8), np.full((50, 70, 3), 40, np.uint8)
    a = features([[20, 10], [20, 40]])
    b = features([[30, 10], [30, 40]])
    matches = Matches(np.array([[0, 0], [1, 1]]), np.ones(2, np.float32))
    picture = draw_matches(first, second, a, b, matches, np.array([True, False]))
    assert picture.shape == (60, 158, 3)
    upper, lower = picture[10, 50].astype(int), picture[40, 50].astype(int)
    assert upper[1] > upper[0] + 50
    assert lower[0] > lower[1] + 50
    unjudged = draw_matches(first, second, a, b, matches)
    np.testing.assert_array_equal(unjudged[40, 50], picture[10, 50])
    nothing = draw_matches(first, second, a, b, Matches.empty(), np.zeros(0, bool))
    assert set(np.unique(nothing)) == {40, 255}
