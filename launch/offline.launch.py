"""Features from a recorded bag, in a ROS workspace: runs `scfeat bag` and exits with it.

ros2 launch scfeat_ros offline.launch.py bag:=drive.mcap output:=drive_features
"""

import shlex

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, Shutdown
from launch.events.process import ProcessExited
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.substitutions import LaunchConfiguration
from launch_ros.substitutions import ExecutableInPackage

ARGUMENTS = {
    "bag": (None, "rosbag2 folder, .mcap, .db3 or ROS 1 .bag file"),
    "output": (None, "output folder to create"),
    "topic": ("", "image topic; can be empty if there is only one"),
    "weights": ("scfeat-s", "installed model, .safetensors or .onnx file"),
    "device": ("auto", "auto, cpu, cuda, cuda:1 ..."),
    "video": ("false", "true writes a video with keypoints and tracks"),
    "options": ("", "further options of `scfeat bag`, as on the command line"),
}


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=_actions)])


def _actions(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    values = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    command = ["bag", values["bag"], "-o", values["output"]]
    command += ["--weights", values["weights"], "--device", values["device"]]
    if values["topic"]:
        command += ["--topic", values["topic"]]
    if values["video"].lower() not in ("true", "false"):
        raise ValueError(f"video must be true or false, got '{values['video']}'")
    if values["video"].lower() == "true":
        command += ["--video"]
    return [
        ExecuteProcess(
            cmd=[
                ExecutableInPackage(package="scfeat_ros", executable="scfeat"),
                *command,
                *shlex.split(values["options"]),
            ],
            output="screen",
            on_exit=_end,
        )
    ]


def _end(event: ProcessExited, context: LaunchContext) -> Shutdown:
    """Shut down with the job; only an exception gives `ros2 launch` a status other than 0."""
    if event.returncode != 0 and not context.is_shutdown:  # else it is Ctrl-C that ended it
        raise RuntimeError(f"scfeat bag ended with status {event.returncode}, see above")
    return Shutdown()
