"""Waiting for what another process does."""

import time

PATIENCE = 60.0
"""Seconds after which something that should happen is said not to; generous, for a busy machine."""


def wait_for(condition, what, patience=PATIENCE):
    """Wait until a condition holds and return its value.

    Raises:
        AssertionError: it never did; `what` is text, or gives it when called.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"in {patience:.0f} s never: {what() if callable(what) else what}")
