"""Package setup for both `pip install .` and `colcon build`."""

import re
from glob import glob
from pathlib import Path

from setuptools import setup

NAME = "scfeat_ros"
HERE = Path(__file__).resolve().parent  # `colcon build --symlink-install` runs a link to this file
VERSION = re.search(r'__version__ = "(.+)"', (HERE / NAME / "__init__.py").read_text())[1]

# beyond the node and the offline tool
EXTRAS = {
    "export": ["h5py>=3", "pycolmap>=3.13"],
    "onnx": ["onnx>=1.15", "onnxruntime>=1.17"],
    "plot": ["matplotlib>=3.5"],
    "ray": ["ray>=2.9"],
    "train": ["pycolmap>=3.11", "scipy>=1.8", "tensorboard>=2.10"],
    "evaluate": [
        "evo>=1.30",
        "h5py>=3",
        "matplotlib>=3.5",
        "poselib>=2.0.4",
        "pycolmap>=4",
        "scipy>=1.8",
    ],
}
TEST = ["hypothesis>=6", "mcap>=1", "mcap-ros2-support>=0.5", "pytest>=7", "ruff>=0.6"]

setup(
    name=NAME,
    version=VERSION,
    description="SCFeat learned local features for ROS 2, recorded bags and images",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="scfeat_ros maintainers",
    maintainer_email="maintainers@scfeat-ros.invalid",
    python_requires=">=3.10",
    packages=[
        NAME,
        f"{NAME}.model",
        f"{NAME}.native",
        "scfeat_training",
        "scfeat_training.evaluation",
    ],
    package_dir={"scfeat_training": "training"},
    package_data={
        NAME: ["weights/*.safetensors", "weights/*.md"],
        f"{NAME}.native": ["*.cpp", "*.h"],
        "scfeat_training": ["configs/*.yaml"],
        "scfeat_training.evaluation": ["*.csv", "*.yaml"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.py"))),
        (f"share/{NAME}/config", sorted(glob("config/*"))),
    ],
    install_requires=[
        "av>=10",
        "backports.zstd>=1; python_version < '3.14'",
        "lz4>=3",
        "numpy>=1.21",
        "opencv-python-headless>=4.6,<5",
        "pyyaml>=5.4",
        "rosbags>=0.11.6",
        "rosbags-image>=0.10",
        "safetensors>=0.4",
        "torch>=2.1",
        "tqdm>=4.60",
    ],
    # colcon runs pytest because of the name "test"
    extras_require={
        **EXTRAS,
        "test": [*TEST, *(package for group in EXTRAS.values() for package in group)],
    },
    entry_points={
        "console_scripts": [
            "scfeat = scfeat_ros.cli:main",
            "extractor = scfeat_ros.run_node:main",
        ]
    },
    zip_safe=False,
)
