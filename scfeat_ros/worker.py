"""A thread that works on the newest item only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LatestOnlyWorker(Generic[T]):
    """Calls `process` on a thread of its own, with a queue of one item.

    A new item replaces one that is still waiting: a slow `process` lowers the rate, but no backlog
    builds up, and `offer` returns at once.

    Args:
        process: called with one item at a time; must not raise.
    """

    def __init__(self, process: Callable[[T], None]) -> None:
        self._process = process
        self._changed = threading.Condition()
        self._item: T | None = None
        self._call: tuple[Callable[[], Any], Future] | None = None
        self._running = True
        self._busy = False
        # daemon: an extraction that takes seconds must not hold up the end of the process
        self._thread = threading.Thread(target=self._run, name="extraction", daemon=True)
        self._thread.start()

    def offer(self, item: T) -> bool:
        """Queue an item.

        Returns:
            Whether it replaced one that was waiting.
        """
        with self._changed:
            dropped = self._item is not None
            self._item = item
            self._changed.notify_all()
            return dropped

    def withdraw(self) -> bool:
        """Remove a waiting item.

        Returns:
            Whether there was one.
        """
        with self._changed:
            waited, self._item = self._item is not None, None
            return waited

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function on the thread, between two items, and return its result.

        PyTorch keeps OpenMP threads for every thread that calls it, so loading and warming up
        belong on the thread that later does the work.
        """
        future: Future = Future()
        with self._changed:
            self._call = function, future
            self._changed.notify_all()
        return future.result()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the current item and a waiting one are processed.

        Returns:
            Whether the thread is idle; False if the timeout (seconds) expired.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._item is None and not self._busy, timeout)

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after the current item; a waiting one is dropped.

        Returns:
            Whether it ended within the timeout (seconds).
        """
        with self._changed:
            self._running = False
            self._item = None
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._item is not None or self._call or not self._running
                )
                if not self._running:
                    if self._call:
                        self._call[1].cancel()
                    return
                self._busy = True
                call, self._call = self._call, None
                item = None
                if call is None:
                    item, self._item = self._item, None
            if call is not None:
                function, future = call
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            else:
                self._process(item)
            # do not keep the image alive until the next one arrives
            item = call = None
