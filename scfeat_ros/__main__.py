"""`python -m scfeat_ros` is `scfeat`."""

import sys

from scfeat_ros.cli import main

sys.exit(main())
