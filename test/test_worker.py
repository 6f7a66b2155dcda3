"""The thread that takes the newest item only."""

import threading

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


def test_stop_gives_up_on_work_that_takes_too_long(held):
    worker, done, started, go = held
    worker.offer("a")
    started.acquire()
    assert worker.stop(0.01) is False
    go.release()
    assert worker.stop(10) is True
    assert done == ["a"]
