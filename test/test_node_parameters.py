"""The node's parameters, and the file that shows them; no ROS needed."""

from pathlib import Path

import pytest
import yaml

from scfeat_ros.node_parameters import GROUPS, NodeOptions, build, parameter_fields, refusal
from scfeat_ros.parameters import option_fields

FILE = Path(__file__).parent.parent / "config" / "extractor.yaml"


def test_names_are_unique_among_the_groups():
    names = [f.name for group in GROUPS for f in option_fields(group)]
    assert len(names) == len(set(names))


def test_the_file_holds_every_parameter_with_its_default():
    [node] = yaml.safe_load(FILE.read_text()).values()
    expected = {name: f.default for name, f in parameter_fields().items()}
    assert node["ros__parameters"] == expected
    for name, value in node["ros__parameters"].items():
        assert type(value) is type(expected[name]), name  # ROS does not take 1 for 1.0


def test_every_line_of_the_file_has_its_comment():
    lines = [line.strip() for line in FILE.read_text().splitlines()]
    fields = parameter_fields()
    for i, line in enumerate(lines):
        name = line.split(":")[0]
        if name not in fields:
            continue
        start = i
        while lines[start - 1].startswith("#") and not lines[start - 1].startswith("# ----"):
            start -= 1
        comment = " ".join(text.removeprefix("#").strip() for text in lines[start:i])
        live = " (live)" if fields[name].metadata["live"] else ""
        assert comment == fields[name].metadata["help"] + live


def test_defaults_are_valid_and_build_their_group():
    values = {name: f.default for name, f in parameter_fields().items()}
    assert build(NodeOptions, values) == NodeOptions()
    for name, value in values.items():
        assert refusal(name, value, configured=False) is None


def test_a_value_that_stays_is_no_change():
    assert refusal("weights", "mine", True, "mine") is None
    assert refusal("tracks", False, True, "off") is None  # as `ros2 param load` reads off
    assert "cannot change while it runs" in refusal("tracks", "off", True, "vins_mono")
    assert "must be of type int" in refusal("threads", True, True, 1)


@pytest.mark.parametrize(
    ("name", "value", "configured", "told"),
    [
        ("max_keypoints", 10, True, None),
        ("max_keypoints", -1, True, "must lie between"),
        ("weights", "other", False, None),
        ("weights", "other", True, "cannot change while it runs"),
        ("tracks", "orb_slam", False, "must be one of off, vins_mono, vins_fusion"),
        ("use_sim_time", True, True, None),  # not ours
        ("compile", False, False, None),  # as YAML reads off
        ("tracks", True, False, "must be one of off, vins_mono, vins_fusion, got 'on'"),
        ("overlay", "off", True, "must be of type bool"),
        ("max_gap", 2, True, None),  # an integer is a number
        ("max_gap", True, True, "must be of type float"),
        ("max_gap", float("nan"), True, "must lie between"),
        ("tracks_max", 20.0, True, "must be of type int"),
        # both ends of a range are in it
        ("tracks_max", 1, True, None),
        ("tracks_max", 1000, True, None),
        ("tracks_max", 1001, True, "must lie between"),
    ],
)
def test_refusals(name, value, configured, told):
    reason = refusal(name, value, configured)
    assert reason is None if told is None else told in reason
