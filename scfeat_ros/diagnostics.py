"""The node's diagnostics: counts, rates, latencies by stage, and problems."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from scfeat_ros.errors import without_numbers

RATE_WINDOW = 5.0
"""Seconds over which rates are measured."""
LATENCY_FRAMES = 200
"""Frames over which latency percentiles are taken."""
OVERLOAD_SHARE = 0.1
"""Share of dropped frames in the rate window above which diagnostics warn."""
LOG_AGAIN = 10.0
"""Seconds for which a problem is not logged again."""
MOST_LOGGED = 100
"""Most problems that are remembered as logged."""

STAGES = (
    "wait",  # for the previous frame
    "decode",  # message to RGB
    "extract",  # network and keypoint selection
    "match",  # to the previous frame
    "track",  # ids
    "publish",  # encoding and handing to the middleware
    "total",  # from the subscription's callback to the last publish
    "overhead",  # total less wait, extract, match and track: what ROS costs
)


class Level(IntEnum):
    """As in diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Report:
    """One diagnostics message: overall level, problems as text, and values by name."""

    level: Level
    message: str
    values: dict[str, str] = field(default_factory=dict)


class Monitor:
    """Collects counts, latencies and problems of a node; all methods are thread-safe.

    A *condition* lasts until it is cleared. An *event* is momentary: the next report shows it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._conditions: dict[str, tuple[Level, str]] = {}
        self._events: list[tuple[Level, str]] = []
        self._last_problem: tuple[float, str] | None = None
        self._facts: dict[str, str] = {}
        self._counts = dict.fromkeys(("in", "out", "dropped", "failed", "resets"), 0)
        self._started = clock()
        self._last_arrival: float | None = None
        self._arrivals: deque[float] = deque()
        self._drops: deque[float] = deque()
        self._served: deque[float] = deque()
        self._times: dict[str, deque[float]] = {
            stage: deque(maxlen=LATENCY_FRAMES) for stage in STAGES
        }

    def start(self) -> None:
        """Reset rates and latencies when the node is activated."""
        with self._lock:
            self._started = self._clock()
            self._last_arrival = None
            for times in (self._arrivals, self._drops, self._served, *self._times.values()):
                times.clear()

    def arrived(self, dropped: bool) -> None:
        """Count an incoming image; `dropped`: it replaced one that was waiting."""
        with self._lock:
            now = self._clock()
            self._last_arrival = now
            self._counts["in"] += 1
            self._arrivals.append(now)
            if dropped:
                self._counts["dropped"] += 1
                self._drops.append(now)

    def served(self, seconds: dict[str, float], facts: dict[str, object], reset: bool) -> None:
        """Count a published frame.

        Args:
            seconds: by stage, see `STAGES`.
            facts: values for the report.
            reset: whether the tracker was reset.
        """
        with self._lock:
            self._counts["out"] += 1
            self._counts["resets"] += reset
            self._served.append(self._clock())
            for stage, value in seconds.items():
                self._times[stage].append(value)
            self._facts.update({name: str(value) for name, value in facts.items()})

    def failed(self, text: str) -> None:
        """Count a frame that could not be processed."""
        with self._lock:
            self._counts["failed"] += 1
        self.event(Level.ERROR, text)

    def withdrawn(self) -> None:
        """Count a waiting image that was dropped without being replaced."""
        with self._lock:
            self._counts["dropped"] += 1

    def event(self, level: Level, text: str) -> None:
        """Add an event to the next report."""
        with self._lock:
            self._events.append((level, text))
            del self._events[:-100]
            self._last_problem = self._clock(), text

    def set_condition(self, name: str, level: Level, text: str) -> bool:
        """Set a condition until `clear_condition(name)`.

        Returns:
            Whether it is new or has changed, and so worth a log line.
        """
        with self._lock:
            news = self._conditions.get(name) != (level, text)
            self._conditions[name] = level, text
            if news:
                self._last_problem = self._clock(), text
            return news

    def clear_condition(self, name: str) -> bool:
        """Clear a condition; returns whether it was set."""
        with self._lock:
            return self._conditions.pop(name, None) is not None

    def set_facts(self, **facts: object) -> None:
        """Set values that every report shows; None removes one."""
        with self._lock:
            for name, value in facts.items():
                if value is None:
                    self._facts.pop(name, None)
                else:
                    self._facts[name] = str(value)

    def silence(self) -> float:
        """Seconds since the last image, or since the start if there was none."""
        with self._lock:
            last = self._started if self._last_arrival is None else self._last_arrival
            return self._clock() - last

    def report(self) -> Report:
        """The current report; it takes the events."""
        with self._lock:
            now = self._clock()
            problems = list(self._conditions.values()) + self._events
            self._events = []
            for times in (self._arrivals, self._drops, self._served):
                while times and times[0] < now - RATE_WINDOW:
                    times.popleft()
            window = max(min(RATE_WINDOW, now - self._started), 1e-3)
            arrivals, drops = len(self._arrivals), len(self._drops)
            if drops > OVERLOAD_SHARE * arrivals:
                problems.append(
                    (
                        Level.WARN,
                        f"{drops} of {arrivals} images dropped in the last {window:.0f} s: the "
                        "camera is faster than the extractor (lower max_size or max_keypoints, "
                        "or the camera's rate)",
                    )
                )
            values = {
                "frames in": str(self._counts["in"]),
                "frames out": str(self._counts["out"]),
                "frames dropped": str(self._counts["dropped"]),
                "frames failed": str(self._counts["failed"]),
                "rate in (Hz)": f"{arrivals / window:.2f}",
                "rate out (Hz)": f"{len(self._served) / window:.2f}",
                "tracker resets": str(self._counts["resets"]),
            }
            for stage in STAGES:
                times = self._times[stage]
                if times:
                    median, p95 = np.percentile(np.asarray(times), (50, 95)) * 1e3
                    values[f"{stage} median (ms)"] = f"{median:.2f}"
                    values[f"{stage} p95 (ms)"] = f"{p95:.2f}"
            values.update(self._facts)
            if self._last_problem is not None:
                when, text = self._last_problem
                values["last problem"] = text
                values["last problem, seconds ago"] = f"{now - when:.1f}"
            # the worst first; repetitions once, with their number
            level = max((level for level, _ in problems), default=Level.OK)
            texts: dict[str, tuple[str, int]] = {}
            for _, text in sorted(problems, key=lambda problem: -problem[0]):
                _, times = texts.get(without_numbers(text), ("", 0))
                texts[without_numbers(text)] = text, times + 1
            message = "; ".join(
                text if times == 1 else f"{text} ({times} times)" for text, times in texts.values()
            )
            return Report(level, message or "ok", values)


class Problems:
    """Reports problems to diagnostics and to the log, to the log at a limited rate.

    Args:
        monitor: of the node.
        logger: has `warning` and `error`.
        clock: monotonic seconds.
    """

    def __init__(
        self, monitor: Monitor, logger: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._monitor = monitor
        self._logger = logger
        self._clock = clock
        self._logged: dict[str, float] = {}

    def report(self, condition: str, level: Level, text: str) -> None:
        """Set a condition of the monitor, and log it if it is new."""
        if self._monitor.set_condition(condition, level, text):
            self.log(level, text)

    def log(self, level: Level, text: str) -> None:
        """Log a text unless the same, but for numbers, was logged within `LOG_AGAIN` seconds."""
        now, kind = self._clock(), without_numbers(text)
        if now - self._logged.get(kind, -LOG_AGAIN) < LOG_AGAIN:
            return
        if len(self._logged) >= MOST_LOGGED:
            self._logged.clear()
        self._logged[kind] = now
        if level == Level.ERROR:
            self._logger.error(text)
        else:
            self._logger.warning(text)
