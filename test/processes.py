"""What tests of subprocesses ask about processes."""

import time


def process_of(file):
    """The process id that a file tells, as soon as it does."""
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.01)
    return int(file.read_text())


def has_ended(pid):
    """Whether a process is gone, or will be when its parent takes notice."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False
