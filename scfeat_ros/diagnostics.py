"""What the node tells about itself: counts, rates, latencies by stage, and what went wrong."""

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
"""Rates are counted over this many seconds."""
LATENCY_FRAMES = 200
"""Medians and percentiles are taken over this many frames."""
OVERLOAD_SHARE = 0.1
"""Share of dropped frames in the rate window from which on diagnostics warn."""
LOG_AGAIN = 10.0
"""Seconds after which the same problem is logged again."""
MOST_LOGGED = 100
"""Kinds of texts that are remembered as logged."""

STAGES = (
    "wait",  # for the previous frame to be done
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
    """One diagnostics message: overall level, what is the matter, and figures by name."""

    level: Level
    message: str
    values: dict[str, str] = field(default_factory=dict)


class Monitor:
    """Collects figures and problems of a node; every method may be called from any thread.

    A *condition* lasts until it is cleared. An *event* is over at once, but the next report
    shows it, however short it was; the last one is kept.

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
        """Forget rates and latencies: the node was activated."""
        with self._lock:
            self._started = self._clock()
            self._last_arrival = None
            for times in (self._arrivals, self._drops, self._served, *self._times.values()):
                times.clear()

    def arrived(self, dropped: bool) -> None:
        """An image came in; `dropped`: the one before it was dropped for it."""
        with self._lock:
            now = self._clock()
            self._last_arrival = now
            self._counts["in"] += 1
            self._arrivals.append(now)
            if dropped:
                self._counts["dropped"] += 1
                self._drops.append(now)

    def served(self, seconds: dict[str, float], facts: dict[str, object], reset: bool) -> None:
        """A frame went out: seconds by stage (see `STAGES`), figures of it, tracks ended."""
        with self._lock:
            self._counts["out"] += 1
            self._counts["resets"] += reset
            self._served.append(self._clock())
            for stage, value in seconds.items():
                self._times[stage].append(value)
            self._facts.update({name: str(value) for name, value in facts.items()})

    def failed(self, text: str) -> None:
        """A frame could not be served."""
        with self._lock:
            self._counts["failed"] += 1
        self.event(Level.ERROR, text)

    def withdrawn(self) -> None:
        """An image that came in was dropped without another one in its place."""
        with self._lock:
            self._counts["dropped"] += 1

    def event(self, level: Level, text: str) -> None:
        """Something happened that the next report must show."""
        with self._lock:
            self._events.append((level, text))
            del self._events[:-100]
            self._last_problem = self._clock(), text

    def set_condition(self, name: str, level: Level, text: str) -> bool:
        """Something is the matter until `clear_condition(name)`.

        Returns:
            Whether this is news, and so worth a log line.
        """
        with self._lock:
            news = self._conditions.get(name) != (level, text)
            self._conditions[name] = level, text
            if news:
                self._last_problem = self._clock(), text
            return news

    def clear_condition(self, name: str) -> bool:
        """Returns: whether the condition had been there."""
        with self._lock:
            return self._conditions.pop(name, None) is not None

    def set_facts(self, **facts: object) -> None:
        """Figures that every report shows; None takes one out."""
        with self._lock:
            for name, value in facts.items():
                if value is None:
                    self._facts.pop(name, None)
                else:
                    self._facts[name] = str(value)

    def silence(self) -> float:
        """Seconds since the last image, or since the start without one."""
        with self._lock:
            last = self._started if self._last_arrival is None else self._last_arrival
            return self._clock() - last

    def report(self) -> Report:
        """What there is to tell now; events are told once."""
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
            # the worst first; repetitions told once, with their number
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
    """Tells diagnostics and log of what is the matter, the log not again and again.

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

    def tell(self, condition: str, level: Level, text: str) -> None:
        """Something is the matter, until the monitor's condition is cleared."""
        if self._monitor.set_condition(condition, level, text):
            self.log(level, text)

    def log(self, level: Level, text: str) -> None:
        """Log a text, unless one of its kind was logged in the last `LOG_AGAIN` seconds."""
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
