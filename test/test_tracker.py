"""Track ids over consecutive frames, and when they end."""

from __future__ import annotations

import numpy as np
import pytest
from sample_bags import PERIOD, sequence

from scfeat_ros.errors import OptionError
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features, Matches
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.tracker import Tracker


def features(count, size=(640, 480)):
    return Features(
        np.zeros((count, 2), np.float32),
        np.ones(count, np.float32),
        np.ones((count, 4), np.float32),
        size,
    )


def matches(*rows):
    return Matches(np.array(rows, np.int64).reshape(-1, 2), np.ones(len(rows), np.float32))


def test_a_match_hands_its_id_on():
    tracker = Tracker()
    first, lengths = tracker.update(features(3), Matches.empty(), 0, "cam")
    assert first.dtype == np.uint32 and lengths.dtype == np.int32
    assert lengths.tolist() == [1, 1, 1]
    second, lengths = tracker.update(features(4), matches((0, 2), (2, 0)), 1, "cam")
    assert second[2] == first[0] and second[0] == first[2]
    assert lengths.tolist() == [2, 1, 2, 1]
    third, lengths = tracker.update(features(1), matches((2, 0)), 2, "cam")
    assert third[0] == first[0] and lengths.tolist() == [3]


def test_new_ids_are_new():
    tracker = Tracker()
    seen = set()
    previous = None
    for frame in range(5):
        rows = matches((0, 1)) if frame else Matches.empty()
        ids, _ = tracker.update(features(6), rows, frame, "cam")
        assert len(set(ids.tolist())) == 6
        assert 0 not in ids
        fresh = set(ids.tolist()) - ({previous} if frame else set())
        assert not fresh & seen
        seen |= set(ids.tolist())
        previous = int(ids[0])


def test_ids_do_not_come_back_after_a_reset():
    tracker = Tracker()
    first, _ = tracker.update(features(5), Matches.empty(), 0, "cam")
    tracker.reset()
    assert tracker.reset_reason(features(5), 1, "cam") == "first frame"
    second, lengths = tracker.update(features(5), Matches.empty(), 1, "cam")
    assert not set(first.tolist()) & set(second.tolist())
    assert lengths.tolist() == [1] * 5


def test_after_the_last_id_comes_the_first():
    """Ids have 32 bits, and 0 is none of them."""
    tracker = Tracker()
    tracker._next_id = 2**32 - 3
    for count, expected in ((2, [2**32 - 3, 2**32 - 2]), (3, [2**32 - 1, 1, 2]), (1, [3])):
        ids, _ = tracker.update(features(count), Matches.empty(), 0, "cam")
        assert ids.tolist() == expected


@pytest.mark.parametrize(
    ("size", "stamp", "frame_id", "reason"),
    [
        ((640, 480), 999, "cam", "time went backwards"),
        ((640, 480), 1000, "cam", None),
        ((640, 480), 500_001_000, "cam", None),
        ((640, 480), 500_001_001, "cam", "gap of 0.50 s"),
        ((640, 480), 1001, "other", "frame id changed from 'cam' to 'other'"),
        ((320, 240), 1001, "cam", "image size changed from 640x480 to 320x240"),
    ],
)
def test_reasons_to_start_anew(size, stamp, frame_id, reason):
    tracker = Tracker(max_gap=0.5)
    assert tracker.reset_reason(features(2), 0, "cam") == "first frame"
    tracker.update(features(2), Matches.empty(), 1000, "cam")
    assert tracker.reset_reason(features(2, size), stamp, frame_id) == reason


@pytest.fixture
def front_end(tiny_extractor):
    return FrontEnd(tiny_extractor)


def test_the_front_end_follows_a_sliding_camera(front_end):
    results = [
        front_end.process(image, index * PERIOD, "cam") for index, image in enumerate(sequence(4))
    ]
    first, second = results[:2]
    assert first.reset == "first frame"
    assert first.previous_stamp is None and len(first.matches) == 0
    assert first.previous_keypoints.shape == (0, 2)
    assert second.reset is None and second.previous_stamp == 0
    assert len(second.matches) > 30
    previous, current = second.matches.indices.T
    np.testing.assert_array_equal(second.previous_keypoints, first.features.keypoints[previous])
    np.testing.assert_array_equal(second.track_ids[current], first.track_ids[previous])
    motion = second.features.keypoints[current] - second.previous_keypoints
    np.testing.assert_allclose(np.median(motion, axis=0), [-3, 0], atol=0.5)
    assert results[-1].track_lengths.max() == 4
    assert set(second.timings) == {"extract", "match", "track"}


@pytest.mark.parametrize(
    ("stamp", "frame_id", "size", "reason"),
    [
        (PERIOD - 1, "cam", 160, "time went backwards"),
        (PERIOD + 2 * 10**9, "cam", 160, "gap of 2.00 s"),
        (PERIOD + 1, "rear", 160, "frame id changed from 'cam' to 'rear'"),
        (PERIOD + 1, "cam", 128, "image size changed from 160x120 to 128x120"),
    ],
)
def test_the_front_end_starts_anew(front_end, stamp, frame_id, size, reason):
    images = sequence(4)
    before = front_end.process(images[0], PERIOD, "cam")
    result = front_end.process(images[1][:, :size], stamp, frame_id)
    assert result.reset == reason
    assert len(result.matches) == 0 and result.previous_stamp is None
    assert not set(result.track_ids.tolist()) & set(before.track_ids.tolist())
    assert (result.track_lengths == 1).all()
    # and goes on from there
    after = front_end.process(images[2][:, :size], stamp + PERIOD, frame_id)
    assert after.reset is None and len(after.matches)


def test_the_front_end_goes_on_with_descriptors_of_another_length(tiny_weights):
    extractor = Extractor.from_pretrained(tiny_weights, "cpu", max_keypoints=150, threads=1)
    front_end = FrontEnd(extractor)
    images = sequence(3)
    front_end.process(images[0], 0, "cam")
    extractor.set_options(descriptor_dim=16)
    changed = front_end.process(images[1], PERIOD, "cam")
    assert changed.reset == "descriptor length changed from 32 to 16"
    assert len(front_end.process(images[2], 2 * PERIOD, "cam").matches)


def test_epipolar_verification_drops_matches(tiny_extractor):
    plain = FrontEnd(tiny_extractor)
    strict = FrontEnd(tiny_extractor, MatcherOptions(epipolar_threshold=0.5))
    for index, image in enumerate(sequence(2, step=12)):
        loose, kept = (f.process(image, index * PERIOD, "cam") for f in (plain, strict))
    assert 0 < len(kept.matches) < len(loose.matches)
    rows = set(map(tuple, loose.matches.indices.tolist()))
    assert set(map(tuple, kept.matches.indices.tolist())) <= rows
    assert kept.previous_keypoints.shape == (len(kept.matches), 2)


def test_matches_are_limited_and_the_limits_can_change(front_end):
    first, second = sequence(2, step=12)

    def matches():
        front_end.reset()
        front_end.process(first, 0, "cam")
        return front_end.process(second, PERIOD, "cam").matches

    every = matches()
    limit = float(np.median(every.similarity))
    front_end.set_matching(min_similarity=limit)
    assert len(matches()) == (every.similarity >= limit).sum() < len(every)
    front_end.set_matching(min_similarity=-1.0, ratio=0.95)
    assert 0 < len(matches()) < len(every)
    with pytest.raises(OptionError, match="ratio"):
        front_end.set_matching(max_gap=0.01, ratio=1.5)
    assert len(matches()) and front_end.matching.ratio == 0.95  # nothing of it is taken over
    front_end.set_matching(max_gap=0.01)
    assert len(matches()) == 0


def test_frames_without_keypoints_end_all_tracks(front_end):
    images = sequence(2)
    front_end.process(images[0], 0, "cam")
    black = front_end.process(np.zeros_like(images[0]), PERIOD, "cam")
    assert black.reset is None
    assert len(black.features) == len(black.matches) == len(black.track_ids) == 0
    after = front_end.process(images[1], 2 * PERIOD, "cam")
    assert len(after.features) and len(after.matches) == 0
    assert (after.track_lengths == 1).all()
