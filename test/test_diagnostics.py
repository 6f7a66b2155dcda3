"""What the node tells about itself, with a clock of our own."""

import pytest

from scfeat_ros.diagnostics import STAGES, Level, Monitor, Problems


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def monitor(clock):
    return Monitor(clock)


def test_nothing_wrong_is_ok(monitor):
    report = monitor.report()
    assert (report.level, report.message) == (Level.OK, "ok")
    assert report.values["frames in"] == "0"


def test_rates_and_latencies(monitor, clock):
    monitor.start()
    for i in range(20):
        clock.now += 0.1
        monitor.arrived(dropped=False)
        seconds = dict.fromkeys(STAGES, 0.001 * (i + 1))
        monitor.served(seconds, {"keypoints": i}, reset=i == 0)
    values = monitor.report().values
    assert values["rate in (Hz)"] == values["rate out (Hz)"] == "10.00"
    assert values["extract median (ms)"] == "10.50"
    assert values["extract p95 (ms)"] == "19.05"
    assert values["keypoints"] == "19"
    assert values["tracker resets"] == "1"
    clock.now += 10
    assert monitor.report().values["rate in (Hz)"] == "0.00"


def test_an_event_is_told_once_however_short(monitor, clock):
    monitor.failed("broken image")
    monitor.event(Level.WARN, "half an image")
    monitor.event(Level.WARN, "half an image")
    report = monitor.report()
    assert report.level == Level.ERROR
    assert report.message == "broken image; half an image (2 times)"
    clock.now += 2
    report = monitor.report()
    assert (report.level, report.message) == (Level.OK, "ok")
    assert report.values["last problem"] == "half an image"
    assert report.values["last problem, seconds ago"] == "2.0"
    assert report.values["frames failed"] == "1"


def test_a_condition_lasts_until_it_is_cleared(monitor):
    assert monitor.set_condition("qos", Level.WARN, "silent") is True
    assert monitor.set_condition("qos", Level.WARN, "silent") is False
    for _ in range(2):
        report = monitor.report()
        assert (report.level, report.message) == (Level.WARN, "silent")
    assert monitor.clear_condition("qos") is True
    assert monitor.clear_condition("qos") is False
    assert monitor.report().level == Level.OK


@pytest.mark.parametrize(("dropped", "level"), [(1, Level.OK), (5, Level.WARN)])
def test_an_overload_is_told(monitor, clock, dropped, level):
    monitor.start()
    for i in range(20):
        clock.now += 0.05
        monitor.arrived(dropped=i < dropped)
    report = monitor.report()
    assert report.level == level
    assert report.values["frames dropped"] == str(dropped)
    if level:
        assert report.message.startswith(f"{dropped} of 20 images dropped")


def test_an_overload_is_over_when_it_is_long_ago(monitor, clock):
    monitor.start()
    for dropped in (True, False):
        for _ in range(10):
            clock.now += 0.6
            monitor.arrived(dropped)
        assert monitor.report().level == (Level.WARN if dropped else Level.OK)
    assert monitor.report().values["frames dropped"] == "10"


def test_silence_lasts_since_the_last_image_or_the_start(monitor, clock):
    clock.now += 3
    assert monitor.silence() == 3
    monitor.arrived(dropped=False)
    clock.now += 2
    assert monitor.silence() == 2
    monitor.start()
    clock.now += 1
    assert monitor.silence() == 1


def test_a_start_forgets_rates_and_latencies_but_no_counts(monitor, clock):
    for _ in range(10):
        clock.now += 0.1
        monitor.arrived(dropped=True)
        monitor.served(dict.fromkeys(STAGES, 0.5), {}, reset=False)
    monitor.start()
    report = monitor.report()
    assert report.level == Level.OK
    assert report.values["rate in (Hz)"] == report.values["rate out (Hz)"] == "0.00"
    assert "extract median (ms)" not in report.values
    assert report.values["frames in"] == report.values["frames dropped"] == "10"


def test_facts_stay_until_they_are_taken_out(monitor):
    monitor.set_facts(camera="plumb_bob", limit=320)
    for _ in range(2):
        values = monitor.report().values
        assert (values["camera"], values["limit"]) == ("plumb_bob", "320")
    monitor.set_facts(limit=None)
    values = monitor.report().values
    assert values["camera"] == "plumb_bob" and "limit" not in values


def test_the_last_problem_is_what_happened_last_not_what_lasts(monitor, clock):
    monitor.set_condition("camera", Level.WARN, "no calibration")
    clock.now += 5
    monitor.event(Level.WARN, "an odd image")
    clock.now += 5
    monitor.set_condition("camera", Level.WARN, "no calibration")  # still
    values = monitor.report().values
    assert values["last problem"] == "an odd image"
    assert values["last problem, seconds ago"] == "5.0"


def test_the_level_of_a_problem_is_that_of_the_log(monitor, clock):
    lines = []

    class Logger:
        def error(self, text):
            lines.append(("error", text))

        def warning(self, text):
            lines.append(("warning", text))

    problems = Problems(monitor, Logger(), clock)
    problems.log(Level.ERROR, "broken")
    problems.log(Level.WARN, "odd")
    assert lines == [("error", "broken"), ("warning", "odd")]


def test_the_log_does_not_repeat_itself(monitor, clock):
    lines = []

    class Logger:
        error = warning = lines.append

    problems = Problems(monitor, Logger(), clock)
    for number, seconds in enumerate((0, 1, 8.9, 0.2)):
        clock.now += seconds
        problems.log(Level.WARN, f"{number} bytes of 3.5 at 0x{number}f are missing")
    assert [line[0] for line in lines] == ["0", "3"]
    problems.report("name", Level.ERROR, "other")
    problems.report("name", Level.ERROR, "other")
    assert lines[2:] == ["other"]
    assert monitor.report().level == Level.ERROR


def test_events_that_differ_in_numbers_alone_are_told_once(monitor):
    for number in range(30):
        monitor.failed(f"image with {number} bytes cannot be decoded")
    monitor.event(Level.WARN, "another matter")
    report = monitor.report()
    assert report.message == "image with 29 bytes cannot be decoded (30 times); another matter"
    assert report.values["frames failed"] == "30"


def test_an_image_that_is_taken_back_counts_as_dropped(monitor):
    monitor.arrived(dropped=False)
    monitor.withdrawn()
    assert monitor.report().values["frames dropped"] == "1"
