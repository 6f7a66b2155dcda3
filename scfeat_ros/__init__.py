"""SCFeat learned local features for ROS 2 and offline use."""

from scfeat_ros import openmp

__version__ = "0.1.0"

openmp.configure()
