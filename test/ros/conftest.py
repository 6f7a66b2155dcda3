"""Fixtures of the tests that need a real ROS 2; without one each of them is skipped."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(HERE))

NEEDED = ("rclpy", "cv_bridge", "diagnostic_msgs", "lifecycle_msgs")


def pytest_collection_modifyitems(items):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = (
        f"needs ROS 2 with {', '.join(missing)}: source /opt/ros/DISTRO/setup.bash and run this "
        "in an environment with the distribution's numpy (README, 'On a robot')"
    )
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def weights(tiny_weights):
    """A small network: what it finds does not matter here, its speed does."""
    return tiny_weights


def _rig(folder):
    from rig import Rig

    return Rig(folder / "node.log")


@pytest.fixture
def rig(tmp_path):
    """A rig whose node the test starts itself."""
    rig = _rig(tmp_path)
    yield rig
    rig.close()


NODE = {
    "device": "cpu",
    "threads": 1,
    "warm_up_width": 160,
    "warm_up_height": 120,
    "max_keypoints": 200,
    "diagnostics_period": 0.2,
    "silence_timeout": 600.0,
}
"""Parameters that make the node quick enough for tests, and patient on a busy machine."""


@pytest.fixture(scope="session")
def node_parameters(weights):
    return {"weights": weights, **NODE}


@pytest.fixture(scope="module")
def running(tmp_path_factory, node_parameters):
    """A rig with an active node that all tests of a module share, whatever they do to it."""
    rig = _rig(tmp_path_factory.mktemp("node"))
    try:
        rig.start_node(**node_parameters)
        rig.connect()
        yield rig
        assert rig.node_process.poll() is None, "the node has died:\n" + rig.log
        assert "Traceback" not in rig.log
    finally:
        rig.close()


@pytest.fixture(scope="module")
def unconfigured_rig(tmp_path_factory, node_parameters):
    rig = _rig(tmp_path_factory.mktemp("node"))
    try:
        rig.start_node(ready=False, autostart=False, **node_parameters)
        yield rig
        assert rig.node_process.poll() is None, "the node has died:\n" + rig.log
    finally:
        rig.close()


@pytest.fixture
def unconfigured(unconfigured_rig, node_parameters):
    """A rig with an unconfigured node with its own parameters, shared by a module's tests."""
    rig = unconfigured_rig
    if rig.state() == "active":
        assert rig.transition("deactivate")
    if rig.state() == "inactive":
        assert rig.transition("cleanup")
    for name, value in {"device": "cpu", "weights": node_parameters["weights"]}.items():
        assert rig.set_parameter(name, str(value)) == (True, "")
    return rig


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A colcon workspace with this package built in it; returns its folder."""
    pytest.importorskip("colcon_core", reason="needs colcon (python3-colcon-common-extensions)")
    folder = tmp_path_factory.mktemp("workspace")
    source = folder / "src" / "scfeat_ros"
    for name in ("scfeat_ros", "training", "launch", "config", "resource"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__*__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "package.xml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    result = subprocess.run(
        [sys.executable, "-m", "colcon", "build"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder
