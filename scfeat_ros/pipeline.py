"""Stages that overlap: a generator on a thread of its own, a function on several."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_POLL = 0.1  # seconds between looks at the stop flag


class _End:
    """Closes a queue; carries what the iterable raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def background(items: Iterable[T], depth: int = 4) -> Generator[Iterator[T], None, None]:
    """Iterate on a thread, at most `depth` items ahead of who reads.

    Several of these in a row make a pipeline whose stages work at the same time (decoding, the
    network and encoding release Python's lock), whose order is kept, and whose memory is bounded.

    Args:
        items: what to iterate; a generator is closed on the thread that runs it.
        depth: items that may wait.

    Yields:
        An iterator over the same items. What the iterable raises comes out of it. When the
        context ends, the thread stops after the item that it works at.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        error = None
        try:
            # else the context ended before the thread began, and what it reads from may never come
            for item in items if not stop.is_set() else ():
                if not put(item):
                    break
        except BaseException as raised:
            error = raised
        finally:
            if isinstance(items, Generator):
                items.close()
        put(_End(error))

    def read() -> Iterator[T]:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    # no daemon: one that works in compiled code while the interpreter ends aborts the process
    thread = threading.Thread(target=run, name="scfeat-stage")
    try:
        thread.start()  # a signal's exception may come up in here
        yield read()
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def on_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    ahead: int,
    at_start: Callable[[], None] | None = None,
) -> Generator[R, None, None]:
    """Call a function on several threads, at most `ahead` items ahead of who reads.

    Args:
        function: called with each item.
        items: what it is called with.
        workers: threads.
        ahead: more than `workers`, or threads have nothing to do while the reader is busy.
        at_start: called by each thread before anything else.

    Yields:
        Results in the order of the items. What the function raises comes out in its place.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, "scfeat-frame", at_start)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
