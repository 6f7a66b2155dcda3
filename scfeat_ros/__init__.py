"""SCFeat learned local features for ROS 2 and offline use."""

__version__ = "0.1.0"
