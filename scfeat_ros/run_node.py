"""The node's executable: a signal ends the process cleanly, also during start-up."""

import os
import signal
import sys


def main() -> int:
    """Run the node; see `node.main`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    # only now: the imports take half a second, and a KeyboardInterrupt in them gives a traceback
    # or is swallowed (by OpenCV's)
    from scfeat_ros import node

    return node.main()


if __name__ == "__main__":
    sys.exit(main())
