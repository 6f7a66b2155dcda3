"""Stages on threads: order, bounds, errors, early ends; figures in bounded memory."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest

from scfeat_ros.features import Features, FrameResult, Matches
from scfeat_ros.pipeline import background, on_threads
from scfeat_ros.report import SAMPLES, SampleFrames
from scfeat_ros.run_statistics import LONGEST_TRACK, LatencyHistogram, RunStatistics, Series


def test_order_is_kept_over_two_stages():
    with background(range(100), 3) as numbers, background((n * n for n in numbers), 3) as squares:
        assert list(squares) == [n * n for n in range(100)]


def test_it_runs_on_another_thread():
    with background(threading.current_thread() for _ in range(1)) as threads:
        assert next(threads) is not threading.current_thread()


def test_it_does_not_run_ahead():
    started = []
    resume = threading.Semaphore(0)

    def count():
        for number in range(50):
            started.append(number)
            resume.release()
            yield number

    with background(count(), depth=3) as numbers:
        taken = [next(numbers) for _ in range(10)]
        # 10 taken, 3 waiting, 1 in the hand
        for _ in range(14):
            assert resume.acquire(timeout=60)
        assert not resume.acquire(timeout=0.3)
    assert taken == list(range(10))
    assert started == list(range(14))


def test_an_error_comes_out_after_what_was_before_it():
    def failing():
        yield 1
        yield 2
        raise OSError("no more")

    with background(failing()) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="no more"):
            next(items)


def test_an_error_in_an_early_stage_goes_through_the_later_ones():
    def failing():
        yield 1
        raise ValueError("broken")

    with background(failing()) as first, background(2 * item for item in first) as second:
        assert next(second) == 2
        with pytest.raises(ValueError, match="broken"):
            next(second)


def test_leaving_early_ends_the_threads_and_closes_the_source():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with background(endless()) as zeros, background(zero + 1 for zero in zeros) as ones:
        assert next(ones) == 1
    assert closed.is_set()
    assert threading.active_count() == before


def test_a_thread_that_begins_after_the_end_reads_nothing(monkeypatch):
    start, late = threading.Thread.start, []

    def interrupted(thread):
        late.append(thread)
        raise KeyboardInterrupt  # a signal, before the new thread has begun

    read = []
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), background(read.append(k) for k in range(3)):
        pass
    start(late[0])
    late[0].join(10)
    assert not late[0].is_alive() and read == []


def test_a_function_on_threads_keeps_the_order_and_does_not_run_ahead():
    taken, begun = [], []

    def numbers():
        for number in range(50):
            taken.append(number)
            yield number

    def start():
        begun.append(threading.current_thread())

    results = on_threads(lambda n: n * n, numbers(), workers=2, ahead=4, at_start=start)
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    assert len(taken) == 14
    assert list(results) == [n * n for n in range(10, 50)]
    assert 1 <= len(set(begun)) == len(begun) <= 2
    assert threading.current_thread() not in begun


def test_an_error_on_one_of_several_threads_comes_out_in_its_place():
    results = on_threads(lambda n: 1 // (3 - n), range(9), workers=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_has_not_begun_on_a_thread_is_left_when_the_reader_leaves():
    begun, go = [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            go.wait(60)

    results = on_threads(work, range(40), workers=1, ahead=20)
    next(results)
    while len(begun) < 2:
        time.sleep(0.001)
    threading.Timer(0.2, go.set).start()  # while it waits for the one that has begun
    results.close()
    assert begun == [0, 1]


# --- figures -----------------------------------------------------------------------------------


def test_a_series_keeps_its_mean_and_its_size():
    rng = np.random.default_rng(0)
    values = rng.random(12345)
    values[rng.random(12345) < 0.2] = np.nan
    series = Series(capacity=100)
    for value in values:
        series.add(value)
    known = values[~np.isnan(values)]
    assert series.summary() == {
        "mean": pytest.approx(known.mean(), abs=1e-4),
        "min": pytest.approx(known.min(), abs=1e-4),
        "max": pytest.approx(known.max(), abs=1e-4),
    }
    kept = series.values
    assert 100 <= len(kept) <= 201
    assert series.stride == 64
    assert np.nanmin(kept) > 0.2 and np.nanmax(kept) < 0.8


def test_a_short_series_is_kept_as_it_is():
    series = Series()
    for value in (3.0, float("nan"), 5.0):
        series.add(value)
    np.testing.assert_array_equal(series.values, [3, np.nan, 5])
    assert Series().summary() is None and len(Series().values) == 0


def test_quantiles_of_latency():
    durations = np.random.default_rng(0).lognormal(-4, 1, 5000)
    histogram = LatencyHistogram()
    for duration in durations:
        histogram.add(duration)
    for share in (0.5, 0.95):
        assert histogram.quantile(share) == pytest.approx(np.quantile(durations, share), rel=0.012)
    assert np.isnan(LatencyHistogram().quantile(0.5))
    histogram.add(0.0)
    histogram.add(1e9)


def frame(keypoints, rows, lengths, reset=None):
    keypoints = np.asarray(keypoints, np.float32).reshape(-1, 2)
    count = len(keypoints)
    rows = np.asarray(rows, np.int64).reshape(-1, 2)
    return FrameResult(
        stamp=0,
        frame_id="",
        features=Features(
            keypoints, np.ones(count, np.float32), np.ones((count, 2), np.float32), (64, 32)
        ),
        track_ids=np.arange(1, count + 1, dtype=np.uint32),
        track_lengths=np.asarray(lengths, np.int32),
        matches=Matches(rows, np.ones(len(rows), np.float32)),
        previous_stamp=None,
        previous_keypoints=np.zeros((len(rows), 2), np.float32),
        reset=reset,
    )


def test_tracks_are_counted_when_they_end():
    statistics = RunStatistics()
    statistics.add(frame([[1, 1]] * 3, [], [1, 1, 1], "first frame"), None, None, {})
    statistics.add(frame([[1, 1]] * 2, [[0, 1]], [1, 2]), np.array([True]), None, {})
    statistics.add(frame([[1, 1]], [], [1], "gap of 3.00 s"), None, None, {})
    statistics.finish()
    # two ended after the first frame, then one of length 1 and one of 2, then the last
    assert statistics.track_lengths[1] == 4 and statistics.track_lengths[2] == 1
    assert statistics.mean_track_length() == pytest.approx(6 / 5)
    assert statistics.resets == {"gap": 1}
    assert statistics.summary()["matches_per_frame"]["mean"] == 1


def test_a_match_keeps_its_own_track_alive():
    statistics = RunStatistics()
    statistics.add(frame([[1, 1]] * 4, [], [1] * 4, "first frame"), None, None, {})
    statistics.add(frame([[1, 1]] * 4, [[3, 0], [2, 1]], [2, 2, 1, 1]), np.ones(2, bool), None, {})
    statistics.add(frame([[1, 1]], [[2, 0]], [2]), np.ones(1, bool), None, {})
    statistics.finish()
    assert statistics.track_lengths[:4].tolist() == [0, 3, 3, 0]


def test_of_an_even_number_of_tracks_the_lower_median_is_told_and_long_ones_count_as_one():
    statistics = RunStatistics()
    lengths = [2, LONGEST_TRACK + 5]
    statistics.add(frame([[1, 1]] * 2, [], lengths, "first frame"), None, None, {})
    statistics.finish()
    tracks = statistics.summary()["tracks"]
    assert (tracks["median_length"], tracks["longest"]) == (2, LONGEST_TRACK)


def test_reasons_to_start_anew_are_counted_by_their_kind():
    statistics = RunStatistics()
    for reason in (
        "first frame",
        "gap of 1.50 s",
        "gap of 3.00 s",
        "image size changed from 64x32 to 32x32",
        "frame id changed from 'a' to 'b'",
        "frame id changed from 'b' to 'a'",
        "time went backwards",
    ):
        statistics.add(frame([], [], [], reason), None, None, {})
    assert statistics.resets == {
        "gap": 2,
        "image size changed": 1,
        "frame id changed": 2,
        "time went backwards": 1,
    }


def test_the_heat_map_is_where_keypoints_are():
    statistics = RunStatistics()
    corners = [[-0.5, -0.5], [63.5, 31.5], [62.6, -0.4], [32.4, 15.6]]
    statistics.add(frame(corners, [], [1] * 4, "first frame"), None, None, {})
    assert statistics.heat.shape == (32, 64)
    expected = np.zeros((32, 64), int)
    expected[0, 0] = expected[31, 63] = expected[0, 63] = expected[16, 32] = 1
    np.testing.assert_array_equal(statistics.heat, expected)
    assert statistics.coverage.summary()["mean"] == pytest.approx(4 / 64)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 17, 100, 1000])
def test_samples_are_spread_evenly(count):
    samples = SampleFrames()
    picture = np.zeros((4, 4, 3), np.uint8)
    drawn = 0
    for index in range(count):
        if samples.wants_next():
            samples.add(picture, str(index))
            drawn += 1
        else:
            samples.skip()
    chosen = [int(sample.caption) for sample in samples.chosen()]
    assert len(chosen) == min(count, SAMPLES)
    assert drawn <= min(count, 80)
    if count > SAMPLES:
        assert chosen[0] == 0 and chosen[-1] >= 0.8 * (count - 1)
        assert np.diff(chosen).max() <= count / 4


def test_a_sample_is_a_picture_in_its_colours_of_at_most_720_pixels():
    samples = SampleFrames()
    picture = np.zeros((30, 1440, 3), np.uint8)
    picture[..., 0] = 200
    samples.add(picture, "red")
    (sample,) = samples.chosen()
    shown = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (15, 720, 3)
    np.testing.assert_allclose(shown.mean(axis=(0, 1)), [0, 0, 200], atol=3)
