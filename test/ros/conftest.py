"""Fixtures of the tests that need a real ROS 2; without one each of them is skipped."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
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
def weights(tmp_path_factory):
    """A small network with random weights: what it finds does not matter here, its speed does."""
    import torch

    from scfeat_ros.model.scfeat import SCFeat, SCFeatConfig, save_model

    torch.manual_seed(0)
    config = SCFeatConfig("test", "resnet18", (32, 32), 32, (8, 8, 8))
    path = tmp_path_factory.mktemp("weights") / "test.safetensors"
    save_model(SCFeat(config), path, {"training": "none, random weights for tests"})
    return path


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
