"""Concurrent stages: an iterator on a thread of its own, a function on several threads."""

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
    """Last item of a queue, with the exception that the iterable raised, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def background(items: Iterable[T], depth: int = 4) -> Generator[Iterator[T], None, None]:
    """Iterate on a thread, at most `depth` items ahead of the consumer.

    Several of these in a row form a pipeline whose stages run concurrently (decoding, the network
    and encoding release the GIL), which keeps the order, and whose memory is bounded.

    Args:
        items: what to iterate; a generator is closed on the thread that runs it.
        depth: most items that may wait.

    Yields:
        An iterator over the same items, which also raises what the iterable raises. When the
        context ends, the thread stops after its current item.
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
            # if the context ended before the thread began, its input may never come
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

    # not a daemon: running compiled code while the interpreter exits would abort the process
    thread = threading.Thread(target=run, name="scfeat-stage")
    try:
        thread.start()  # a signal handler may raise in here
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
    """Map a function over items on several threads, at most `ahead` items ahead of the consumer.

    Args:
        function: called with each item.
        items: its arguments.
        workers: number of threads.
        ahead: more than `workers`, or threads idle while the consumer is busy.
        at_start: called first by each thread.

    Yields:
        Results in the order of the items; an exception of the function is raised in its place.
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
