"""Live features from one or more cameras, with one node and one process per camera.

ros2 launch scfeat_ros extractor.launch.py image:=/camera/image_raw overlay:=true rviz:=true
ros2 launch scfeat_ros extractor.launch.py cameras:=front,left,right
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHARE = Path(get_package_share_directory("scfeat_ros"))

ARGUMENTS = {
    "namespace": ("", "namespace of the node and of relative topics"),
    "image": (
        "image_raw",
        "image topic, without /compressed; relative names are in the namespace",
    ),
    "camera_info": ("", "CameraInfo topic; empty for camera_info next to the image topic"),
    "image_transport": ("", "raw or compressed; empty to use params_file"),
    "weights": ("", "installed model, .safetensors or .onnx file; empty to use params_file"),
    "device": ("", "auto, cpu, cuda, cuda:1 ...; empty to use params_file"),
    "params_file": (str(SHARE / "config" / "extractor.yaml"), "parameter file of the node"),
    "overlay": (
        "",
        "true or false: draw ~/overlay while it has subscribers; empty to use params_file",
    ),
    "autostart": (
        "",
        "true or false: activate the node, or leave it to a lifecycle manager; empty to use "
        "params_file",
    ),
    "use_sim_time": (
        "",
        "true takes the time from /clock (for bags played with --clock); empty to use params_file",
    ),
    "cameras": (
        "",
        "comma-separated namespaces of several cameras, one node and one process each; image and "
        "camera_info must then be relative",
    ),
    "rviz": ("false", "open rviz2 with overlay, bearings and camera image (of the first camera)"),
    "rviz_frame": ("camera_optical_frame", "frame_id of the camera's images, for rviz2"),
    "log_level": ("info", "debug, info, warn or error"),
}


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=_actions)])


def _actions(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Create the nodes; the list of cameras can be split only once the arguments are known."""
    values = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    cameras = [name.strip(" /") for name in values["cameras"].split(",") if name.strip(" /")]
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"cameras '{values['cameras']}': names must differ")
    if not Path(values["params_file"]).is_file():  # the node would start with its defaults
        raise ValueError(f"params_file '{values['params_file']}': no such file")
    image = values["image"]
    camera_info = values["camera_info"] or str(Path(image).parent / "camera_info")
    if len(cameras) > 1 and (image.startswith("/") or camera_info.startswith("/")):
        raise ValueError(
            f"image '{image}' and camera_info '{camera_info}' must be relative topics with several "
            "cameras: each is looked for in its camera's namespace"
        )
    parameters = {
        name: _boolean(name, values[name])
        for name in ("overlay", "autostart", "use_sim_time")
        if values[name]
    }
    for name in ("weights", "device", "image_transport"):
        if values[name]:
            parameters[name] = values[name]
    namespaces = [
        "/".join(part for part in (values["namespace"].rstrip("/"), camera) if part)
        for camera in cameras
    ] or [values["namespace"]]
    nodes = [
        Node(
            package="scfeat_ros",
            executable="extractor",
            name="extractor",
            namespace=namespace,
            parameters=[values["params_file"], parameters],
            remappings=[("image_raw", image), ("camera_info", camera_info)],
            arguments=["--ros-args", "--log-level", values["log_level"]],
            output="screen",
        )
        for namespace in namespaces
    ]
    if _boolean("rviz", values["rviz"]):
        nodes.append(
            Node(
                package="rviz2",
                executable="rviz2",
                namespace=namespaces[0],
                arguments=[
                    "-d",
                    str(SHARE / "config" / "extractor.rviz"),
                    "-f",
                    values["rviz_frame"],
                ],
                remappings=[("image_raw", image), ("camera_info", camera_info)],
                parameters=[values["params_file"], parameters],
            )
        )
    return nodes


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got '{text}'")
    return text.lower() == "true"
