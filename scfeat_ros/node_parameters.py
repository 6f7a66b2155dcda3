"""Parameters of the ROS 2 node: the shared options and those that only a node has."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any

from scfeat_ros.parameters import (
    ExtractorOptions,
    MatcherOptions,
    check_value,
    option,
    option_fields,
)


@dataclass(frozen=True)
class NodeOptions:
    """Options of the node alone: lifecycle, input, output and diagnostics."""

    weights: str = option(
        "scfeat-s",
        "installed model (scfeat-s, or the larger scfeat-m or scfeat), or path of a .safetensors "
        "or exported .onnx file",
    )
    device: str = option(
        "auto",
        "where the network runs: auto (CUDA where there is one), cpu, cuda, cuda:1 ...; without "
        "the CUDA device that was asked for the node runs on the CPU and warns",
    )
    autostart: bool = option(
        True,
        "configure and activate by itself at start; false leaves it to a lifecycle manager",
    )
    image_transport: str = option(
        "raw",
        "raw reads image_raw (sensor_msgs/Image), compressed reads image_raw/compressed "
        "(sensor_msgs/CompressedImage)",
        choices=("raw", "compressed"),
    )
    image_reliability: str = option(
        "auto",
        "reliability asked of the camera: auto takes what its publishers offer",
        choices=("auto", "reliable", "best_effort"),
    )
    image_depth: int = option(
        1, "queue of the image subscription in frames; more than 1 only adds latency", 1, 100
    )
    rectified: bool = option(
        False,
        "the images are rectified (image_proc's image_rect): bearings are made with the P of "
        "camera_info, without its distortion",
    )
    warm_up_width: int = option(
        640, "width of the warm-up image, pixels; 0 leaves the warm-up to the first image", 0, 10000
    )
    warm_up_height: int = option(480, "height of the warm-up image, pixels", 0, 10000)
    descriptor_type: str = option(
        "float32",
        "descriptors in ~/features: float32, or int8 (times 127, three tenths of the bandwidth)",
        choices=("float32", "int8"),
        live=True,
    )
    overlay: bool = option(
        True, "draw ~/overlay while somebody subscribes to it; false never draws", live=True
    )
    tracks: str = option(
        "off",
        "publish ~/tracks (sensor_msgs/PointCloud) as the back end of VINS-Mono or VINS-Fusion "
        "reads it",
        choices=("off", "vins_mono", "vins_fusion"),
    )
    tracks_max: int = option(
        150,
        "most points in ~/tracks, longest tracks first (the back ends hold 1000)",
        1,
        1000,
        live=True,
    )
    tracks_min_distance: float = option(
        20.0,
        "~/tracks keeps one point in each square of this side, pixels; 0 keeps all",
        0.0,
        1000.0,
        live=True,
    )
    rgbd: bool = option(
        False,
        "subscribe to depth and publish ~/rgbd_image (rtabmap_msgs/RGBDImage) for RTAB-Map; "
        "needs rtabmap_msgs and camera_info",
    )
    rgbd_tolerance: float = option(
        0.02, "largest time between an image and its depth image, seconds", 0.0, 10.0, live=True
    )
    silence_timeout: float = option(
        3.0, "seconds without an image after which diagnostics warn", 0.1, 3600.0, live=True
    )
    diagnostics_period: float = option(1.0, "seconds between diagnostics", 0.05, 60.0)


GROUPS = (NodeOptions, ExtractorOptions, MatcherOptions)
"""Every parameter of the node is a field of one of these; names are unique among them."""


def parameter_fields() -> dict[str, Field]:
    """All parameters of the node by name, in the order of config/extractor.yaml."""
    return {f.name: f for group in GROUPS for f in option_fields(group)}


def as_declared(field: Field, value: Any) -> Any:
    """The intended value: YAML, and so ROS, reads a bare `on` or `off` as a boolean."""
    if isinstance(value, bool) and "off" in field.metadata["choices"]:
        return "on" if value else "off"
    return value


def build(group: type, values: dict[str, Any]) -> Any:
    """An options dataclass from the parameters' values; other parameters are ignored."""
    return group(**{f.name: values[f.name] for f in fields(group)})


def refusal(name: str, value: Any, configured: bool, now: Any = None) -> str | None:
    """Why a parameter cannot be set to a value now; None if it can.

    Args:
        name: of the parameter.
        value: the new value.
        configured: whether the node is configured; then only live parameters can change.
        now: the current value.
    """
    f = parameter_fields().get(name)
    if f is None:
        return None
    value = as_declared(f, value)
    if configured and not f.metadata["live"] and value != as_declared(f, now):
        return (
            f"{name} takes effect when the node is configured and cannot change while it runs: "
            "deactivate and clean up first (ros2 lifecycle set NODE deactivate; ... cleanup), "
            "set it, then configure and activate"
        )
    return check_value(f, value)
