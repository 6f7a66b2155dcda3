"""The node's executable on a simulated GPU."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from simulated_gpu import simulated_gpu

from scfeat_ros.run_node import main

if __name__ == "__main__":
    with simulated_gpu():
        sys.exit(main())
