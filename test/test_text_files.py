"""Text files of the user, in every reader of one."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from scfeat_ros import export
from scfeat_ros.errors import InputError
from scfeat_ros.text_files import read_text
from scfeat_training.config import read_config
from scfeat_training.evaluation import data, localization, sequences


def load_kitti(calibration):
    """A KITTI sequence whose calib.txt is the file."""
    (calibration.parent / "image_0").mkdir(exist_ok=True)
    for number in range(2):
        image = np.zeros((8, 8), np.uint8)
        cv2.imwrite(str(calibration.parent / "image_0" / f"{number}.png"), image)
    return sequences.load_sequence(calibration.parent)


READERS = {
    "training settings": lambda file: read_config(file, "warmup"),
    "localization's parameters": localization.load_parameters,
    "pairs to export": lambda file: export.read_pairs(file, []),
    "pairs with poses": lambda file: data.parse_pairs_file(file, Path()),
    "homography": data.load_homography,
    "KITTI's calibration": load_kitti,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_a_file_that_is_no_text_is_named(tmp_path, reader):
    file = tmp_path / "calib.txt"
    file.write_bytes(b"\xff\xfe0\0")
    with pytest.raises(InputError, match=r"calib\.txt: cannot be read \(not UTF-8 text"):
        reader(file)


def test_a_missing_file_and_a_byte_order_mark(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_text("\ufeffa.png b.png\n", encoding="utf-8")
    assert export.listed_pairs(tmp_path / "a.txt") == {1: ("a.png", "b.png")}
