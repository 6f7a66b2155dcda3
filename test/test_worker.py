"""The thread that takes the newest item only."""

import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from scfeat_ros.worker import LatestOnlyWorker


@pytest.fixture
def held():
    """A worker whose work waits for a signal: (worker, items done, signal)."""
    done, started, go = [], threading.Semaphore(0), threading.Semaphore(0)

    def process(item):
        started.release()
        go.acquire()
        done.append(item)

    worker = LatestOnlyWorker(process)
    yield worker, done, started, go
    for _ in range(10):
        go.release()
    assert worker.stop(10)


def test_only_the_newest_waiting_item_is_taken(held):
    worker, done, started, go = held
    assert worker.offer("a") is False
    started.acquire()
    assert [worker.offer(item) for item in "bcd"] == [False, True, True]
    go.release()
    started.acquire()
    go.release()
    assert worker.wait(10)
    assert done == ["a", "d"]


def test_what_waits_can_be_taken_back_and_what_runs_waited_for(held):
    worker, done, started, go = held
    assert worker.withdraw() is False
    worker.offer("a")
    started.acquire()
    worker.offer("b")
    assert worker.withdraw() is True
    assert worker.wait(0.01) is False
    go.release()
    assert worker.wait(10) is True
    assert done == ["a"]


def test_calls_run_on_the_worker_and_bring_back_result_or_error(held):
    worker, _, _, _ = held
    assert worker.call(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)


def test_what_waits_is_worked_at_before_the_worker_is_idle(held):
    worker, done, started, go = held
    worker.offer("a")
    started.acquire()
    worker.offer("b")
    go.release()
    started.acquire()
    assert worker.wait(0.01) is False
    go.release()
    assert worker.wait(10) is True
    assert done == ["a", "b"]


def test_what_waits_is_not_begun_after_a_stop(held):
    worker, done, started, go = held
    worker.offer("a")
    started.acquire()
    worker.offer("b")
    assert worker.stop(0.01) is False
    for _ in range(2):
        go.release()
    assert worker.stop(10) is True
    assert done == ["a"]


def test_a_call_that_waits_when_the_worker_stops_is_cancelled(held):
    worker, _, started, go = held
    worker.offer("a")
    started.acquire()
    raised = []

    def call():
        try:
            worker.call(int)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while worker._call is None:
        time.sleep(0.001)
    assert worker.stop(0.01) is False
    go.release()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], CancelledError)


def test_an_item_is_let_go_of_when_it_is_done():
    """An image of a camera that has stopped must not stay in memory."""

    class Item:
        pass

    worker = LatestOnlyWorker(lambda item: None)
    item = Item()
    alive = weakref.ref(item)
    worker.offer(item)
    del item
    assert worker.wait(10)
    assert alive() is None
    assert worker.stop(10)


def test_stop_gives_up_on_work_that_takes_too_long(held):
    worker, done, started, go = held
    worker.offer("a")
    started.acquire()
    assert worker.stop(0.01) is False
    go.release()
    assert worker.stop(10) is True
    assert done == ["a"]
