"""`python -m scfeat_training.evaluation TASK`."""

import sys

from scfeat_training.evaluation import main

if __name__ == "__main__":
    sys.exit(main())
