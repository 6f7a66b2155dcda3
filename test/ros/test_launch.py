"""The package in a colcon workspace: built, launched, found by ros2's tools."""

import os
import signal
import subprocess
import sys

import pytest
import sample_bags as bags
from waiting import PATIENCE, wait_for

from scfeat_ros.messages import decode_features

ARGUMENTS = (
    "namespace image camera_info weights device params_file overlay rviz use_sim_time cameras"
).split()


def in_workspace(workspace, *command):
    """A shell command line with the workspace sourced."""
    quoted = " ".join(f"'{part}'" for part in command)
    return ["bash", "-c", f"source {workspace}/install/setup.bash && exec {quoted}"]


@pytest.fixture
def run(workspace, rig):
    """Runs a command in the workspace to its end."""

    def run(*command):
        return subprocess.run(
            in_workspace(workspace, *command),
            env=rig.environment,
            text=True,
            capture_output=True,
            timeout=4 * PATIENCE,
        )

    return run


def test_ros2_finds_the_executables(run):
    assert run("ros2", "pkg", "executables", "scfeat_ros").stdout.splitlines() == [
        "scfeat_ros extractor",
        "scfeat_ros scfeat",
    ]


def test_a_build_of_links_is_a_build(workspace, rig):
    """`--symlink-install`, as many workspaces are built."""
    build = f"{sys.executable} -m colcon build --symlink-install --build-base b --install-base i"
    result = subprocess.run(
        ["bash", "-c", f"{build} && source i/setup.bash && ros2 pkg executables scfeat_ros"],
        cwd=workspace,
        env=rig.environment,
        text=True,
        capture_output=True,
        timeout=4 * PATIENCE,
    )
    assert "scfeat_ros extractor" in result.stdout, result.stdout + result.stderr


def test_launch_shows_its_arguments(run):
    shown = run("ros2", "launch", "scfeat_ros", "extractor.launch.py", "--show-args").stdout
    for name in ARGUMENTS:
        assert f"'{name}':" in shown
    assert "no description given" not in shown


@pytest.fixture
def parameter_file(tmp_path, node_parameters):
    """Parameters that make the node quick."""
    path = tmp_path / "robot.yaml"
    lines = [f"    {name}: {value}\n" for name, value in node_parameters.items()]
    path.write_text("/**:\n  ros__parameters:\n" + "".join(lines))
    return path


def launch(rig, workspace, *arguments):
    command = ["ros2", "launch", "scfeat_ros", "extractor.launch.py", *arguments]
    with rig.log_path.open("a") as log:
        # a process group of its own: Ctrl-C goes to all of it
        process = rig.start(
            in_workspace(workspace, *command),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process


def end(rig, process):
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert "Traceback" not in rig.log
    assert "SIGTERM" not in rig.log  # nobody had to be asked twice


def test_several_cameras_get_a_node_each(rig, workspace, parameter_file):
    from sensor_msgs.msg import PointCloud2

    process = launch(rig, workspace, "cameras:=front,left", f"params_file:={parameter_file}")
    for camera in ("front", "left"):
        topic = f"/{camera}/extractor/features"
        rig.subscribe(topic, PointCloud2)
        wait_for(
            lambda camera=camera: (
                f"images from /{camera}/image_raw" in rig.log or process.poll() is not None
            ),
            lambda camera=camera: f"the node of {camera} is active; log:\n{rig.log}",
        )
        wait_for(
            lambda camera=camera, topic=topic: (
                rig.camera(send="rgb8", count=2, namespace=f"/{camera}/", frame_id=camera) is None
                and rig.messages[topic]
            ),
            lambda camera=camera: f"features of {camera}; log:\n{rig.log}",
        )
        assert rig.messages[topic][0].header.frame_id == camera
        assert len(decode_features(rig.messages[topic][0])) > 10
    assert "autostart: configuring and activating by itself" in rig.log
    end(rig, process)


def test_topics_namespace_and_parameters_of_one_camera(rig, workspace, parameter_file, weights):
    process = launch(
        rig,
        workspace,
        "namespace:=robot",
        "image:=/camera/color/image_raw",
        "weights:=" + str(weights),
        "overlay:=false",
        f"params_file:={parameter_file}",
    )
    wait_for(lambda: "images from /camera/color/image_raw" in rig.log, lambda: rig.log)
    wait_for(lambda: rig.observer.count_subscribers("/camera/color/camera_info"), "camera_info")
    assert rig.get_parameter("max_keypoints", "/robot/extractor").integer_value == 200
    assert rig.get_parameter("overlay", "/robot/extractor").bool_value is False
    assert rig.state("/robot/extractor") == "active"
    end(rig, process)


def test_what_the_parameter_file_says_holds(rig, workspace, parameter_file):
    with parameter_file.open("a") as file:
        file.write("    autostart: false\n    overlay: false\n    use_sim_time: true\n")
    process = launch(rig, workspace, f"params_file:={parameter_file}")
    wait_for(lambda: "autostart is off" in rig.log, lambda: rig.log)
    assert rig.state() == "unconfigured"
    assert rig.get_parameter("overlay").bool_value is False
    assert rig.get_parameter("use_sim_time").bool_value is True
    end(rig, process)


def test_absolute_topics_cannot_be_of_several_cameras(run):
    result = run(
        *("ros2", "launch", "scfeat_ros", "extractor.launch.py", "cameras:=a,b", "image:=/image")
    )
    assert result.returncode != 0
    assert "must be relative topics with several cameras" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("cameras:=front,left,/front", "names must differ"),
        ("params_file:=/no/such.yaml", "params_file '/no/such.yaml': no such file"),
        ("params_file:=/", "params_file '/': no such file"),
    ],
)
def test_arguments_that_cannot_be_are_told_and_nothing_starts(run, argument, told):
    result = run("ros2", "launch", "scfeat_ros", "extractor.launch.py", argument)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert told in output and "Traceback" not in output and "process started" not in output


def test_slashes_around_names_of_cameras_do_not_matter(rig, workspace, parameter_file):
    process = launch(
        rig,
        workspace,
        "namespace:=robot/",
        "cameras:=/front, left/",
        f"params_file:={parameter_file}",
    )
    for camera in ("front", "left"):
        wait_for(
            lambda camera=camera: f"images from /robot/{camera}/image_raw" in rig.log,
            lambda: rig.log,
        )
    end(rig, process)


def test_a_failed_offline_job_is_one_line_and_a_status(run, tmp_path):
    bag = tmp_path / "none.mcap"
    result = run(
        *("ros2", "launch", "scfeat_ros", "offline.launch.py", f"bag:={bag}"),
        f"output:={tmp_path / 'result'}",
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "scfeat bag ended with status 1" in output and "Traceback" not in output


def test_offline_launch_runs_the_offline_job(run, weights, tmp_path):
    messages = [
        (bags.IMAGE_TOPIC, bags.stamp(i), bags.image_message(image, bags.stamp(i)))
        for i, image in enumerate(bags.sequence(4))
    ]
    bag = bags.write_bag(tmp_path / "drive", messages)
    output = tmp_path / "result"
    result = run(
        *("ros2", "launch", "scfeat_ros", "offline.launch.py", f"bag:={bag}", f"output:={output}"),
        *(f"weights:={weights}", "device:=cpu", "options:=--max-keypoints 50 --quiet"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (output / "summary.json").is_file()
