"""Pictures from image messages and files."""

from __future__ import annotations

import os
from threading import Thread

import cv2
import numpy as np
import pytest
from sample_bags import ROS1, compressed_message, image_message

from scfeat_ros.decoded_image import UnknownEncodingError, UnreadableImageError
from scfeat_ros.errors import InputError
from scfeat_ros.images import (
    ENCODINGS,
    from_message,
    read_file,
    read_mask,
)

HEIGHT, WIDTH = 24, 32
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([X * 7, Y * 9, 250 - X * 6], axis=-1).astype(np.uint8)
GREY = (X * 5 + Y * 3).astype(np.uint8)
ALPHA = np.dstack([RGB, np.full_like(GREY, 7)])
STRETCHED = (GREY > 100).astype(np.uint8) * 255
UNRANGED = {"8S": np.int8, "16S": np.int16, "32S": np.int32, "32F": np.float32, "64F": np.float64}
BAYER = {"rggb": "RGGB", "bggr": "BGGR", "gbrg": "GBRG", "grbg": "GRBG"}


def wide(image):
    """The same picture in 16 bits."""
    return image.astype(np.uint16) * 257


def mosaic(pattern):
    """What a sensor with this colour filter sees of RGB; the pattern is its 2x2 corner."""
    channel = np.array(["RGB".index(letter) for letter in pattern.upper()]).reshape(2, 2)
    return np.take_along_axis(RGB, channel[Y % 2, X % 2][..., None], axis=2)[..., 0]


def pack_yuv(order):
    """RGB in 4:2:2; `order` says where the brightness is: "uyvy" or "yuyv"."""
    code = cv2.COLOR_RGB2YUV_UYVY if order == "uyvy" else cv2.COLOR_RGB2YUV_YUY2
    return cv2.cvtColor(RGB, code)


CASES = {
    "mono8": (GREY, GREY, 0),
    "mono16": (wide(GREY), GREY, 0),
    "8UC1": (GREY, GREY, 0),
    "16UC1": (wide(GREY), GREY, 0),
    "rgb8": (RGB, RGB, 0),
    "bgr8": (RGB[..., ::-1], RGB, 0),
    "8UC3": (RGB[..., ::-1], RGB, 0),
    "rgba8": (ALPHA, RGB, 0),
    "bgra8": (ALPHA[..., [2, 1, 0, 3]], RGB, 0),
    "8UC4": (ALPHA[..., [2, 1, 0, 3]], RGB, 0),
    "rgb16": (wide(RGB), RGB, 0),
    "bgr16": (wide(RGB[..., ::-1]), RGB, 0),
    "16UC3": (wide(RGB[..., ::-1]), RGB, 0),
    "rgba16": (wide(ALPHA), RGB, 0),
    "bgra16": (wide(ALPHA[..., [2, 1, 0, 3]]), RGB, 0),
    "16UC4": (wide(ALPHA[..., [2, 1, 0, 3]]), RGB, 0),
    "uyvy": (pack_yuv("uyvy"), RGB, 6),
    "yuv422": (pack_yuv("uyvy"), RGB, 6),
    "yuyv": (pack_yuv("yuyv"), RGB, 6),
    "yuv422_yuy2": (pack_yuv("yuyv"), RGB, 6),
    **{f"{t}C1": ((STRETCHED // 3).astype(d) - d(9), STRETCHED, 0) for t, d in UNRANGED.items()},
    **{f"bayer_{p}8": (mosaic(p), RGB, 1) for p in BAYER},
    **{f"bayer_{p}16": (wide(mosaic(p)), RGB, 1) for p in BAYER},
}


def test_every_encoding_is_tested():
    assert set(ENCODINGS) <= set(CASES)


@pytest.mark.parametrize("padding", [0, 3], ids=["tight", "padded"])
@pytest.mark.parametrize("encoding", CASES)
def test_encodings(encoding, padding):
    pixels, expected, tolerance = CASES[encoding]
    picture = from_message(image_message(pixels, encoding=encoding, padding=padding)).pixels
    assert picture.dtype == np.uint8 and picture.shape == expected.shape
    # colours at the border are guessed by demosaicing
    inner = (slice(2, -2), slice(2, -2))
    difference = picture[inner].astype(int) - expected[inner]
    assert np.abs(difference).max() <= tolerance
    assert picture.flags.c_contiguous


@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "bayer_rggb16", "32FC1"])
def test_big_endian_pixels(encoding):
    pixels = CASES[encoding][0] // 3  # whose bytes are not all the same
    message = image_message(pixels.byteswap(), encoding=encoding)
    message.is_bigendian = 1
    little = from_message(image_message(pixels, encoding=encoding)).pixels
    np.testing.assert_array_equal(from_message(message).pixels, little)


def test_sixteen_bits_are_rounded_not_cut():
    pixels = np.array([[0, 128, 129, 257 * 100 + 129, 65535]], np.uint16)
    picture = from_message(image_message(pixels, encoding="mono16")).pixels
    assert picture.tolist() == [[0, 0, 1, 101, 255]]


def test_numbers_without_a_range_are_stretched_and_those_that_are_none_masked():
    pixels = np.array([[-2, 0, np.nan], [3, np.inf, 8]], np.float32)
    image = from_message(image_message(pixels, encoding="32FC1"))
    assert image.pixels.tolist() == [[0, 51, 0], [128, 0, 255]]
    assert image.mask.tolist() == [[True, True, False], [True, False, True]]
    assert "33.3%" in image.note
    plain = from_message(image_message(np.nan_to_num(pixels), encoding="32FC1"))
    assert plain.mask is None and plain.note is None
    with pytest.raises(UnreadableImageError, match="without a single finite pixel"):
        from_message(image_message(pixels * np.nan, encoding="32FC1"))


def test_numbers_of_the_smallest_and_of_the_largest_range_are_stretched():
    with np.errstate(all="raise"):
        same = from_message(image_message(np.full((2, 3), 2.5, np.float32), encoding="32FC1"))
        pixels = np.array([[-1.7e308, 0, 1.7e308]])
        far = from_message(image_message(pixels, encoding="64FC1"))
    assert not same.pixels.any() and same.mask is None
    assert far.pixels.tolist() == [[0, 128, 255]]


def test_the_padding_of_the_last_row_may_be_missing():
    message = image_message(RGB, padding=5)
    message.data = message.data[:-5]
    np.testing.assert_array_equal(from_message(message).pixels, RGB)


def test_messages_of_ros_1_are_read():
    np.testing.assert_array_equal(from_message(image_message(RGB, types=ROS1.types)).pixels, RGB)


@pytest.mark.parametrize("encoding", ["32FC2", "bayer_xxxx8", "", "nv21", "64FC9"])
def test_an_unknown_encoding_lists_the_known(encoding):
    message = image_message(GREY, encoding=encoding)
    message.encoding = encoding
    with pytest.raises(UnknownEncodingError, match="not supported; known are mono8, mono16"):
        from_message(message)


@pytest.mark.parametrize("field", ["data", "step", "height", "width"])
def test_a_message_that_holds_too_little_is_unreadable(field):
    message = image_message(RGB)
    values = {"data": message.data[:-1], "step": 5, "height": 10**6, "width": 0}
    setattr(message, field, values[field])
    with pytest.raises(UnreadableImageError):
        from_message(message)


@pytest.mark.parametrize("encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2"])
def test_half_a_pair_of_pixels_is_unreadable(encoding):
    pixels = np.zeros((4, 7, 2), np.uint8)
    with pytest.raises(UnreadableImageError, match=f"7 pixels a row, but {encoding} has two"):
        from_message(image_message(pixels, encoding=encoding))


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("image", [GREY, RGB], ids=["grey", "colour"])
def test_compressed_images(image, ending):
    picture = from_message(compressed_message(image, ending=ending)).pixels
    assert picture.shape == image.shape and picture.dtype == np.uint8
    tolerance = 0 if ending == ".png" else 25
    assert np.abs(picture.astype(int) - image).max() <= tolerance


def test_a_png_of_16_bits_or_with_alpha_is_read():
    message = compressed_message(GREY)
    message.data = cv2.imencode(".png", wide(GREY))[1].reshape(-1)
    np.testing.assert_array_equal(from_message(message).pixels, GREY)
    message.data = cv2.imencode(".png", ALPHA[..., [2, 1, 0, 3]])[1].reshape(-1)
    np.testing.assert_array_equal(from_message(message).pixels, RGB)


@pytest.mark.parametrize("pattern", BAYER)
def test_a_compressed_mosaic_becomes_colour(pattern):
    message = compressed_message(mosaic(pattern))
    message.format = f"bayer_{pattern}8; png compressed "
    expected = from_message(image_message(mosaic(pattern), encoding=f"bayer_{pattern}8"))
    np.testing.assert_array_equal(from_message(message).pixels, expected.pixels)
    # what came out of it as colour already, stays so
    message.data = compressed_message(RGB).data
    np.testing.assert_array_equal(from_message(message).pixels, RGB)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9], ids=str)
def test_a_cut_off_compressed_image_is_unreadable(ending, keep):
    noise = np.random.default_rng(0).integers(0, 256, (240, 320), np.uint8)
    message = compressed_message(noise, ending=ending)
    message.data = message.data[: int(keep * len(message.data))]
    with pytest.raises(UnreadableImageError):
        from_message(message)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_off_progressive_jpeg_is_unreadable(share):
    """All of its rows are there after the first scan, without their detail."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320), np.uint8)
    message = compressed_message(noise, ending=".jpg")
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    message.data = cv2.imencode(".jpg", noise, options)[1].reshape(-1)
    assert from_message(message).pixels.shape == noise.shape
    message.data = message.data[: int(share * len(message.data))]
    with pytest.raises(UnreadableImageError, match="cut off"):
        from_message(message)


def test_a_jpeg_without_its_end_mark_or_with_zeros_behind_is_read():
    """As some cameras' drivers give them."""
    expected = from_message(compressed_message(RGB, ending=".jpg")).pixels
    message = compressed_message(RGB, ending=".jpg")
    message.data = np.concatenate([message.data, np.zeros(10_000, np.uint8)])
    np.testing.assert_array_equal(from_message(message).pixels, expected)
    message = compressed_message(RGB, ending=".jpg")
    assert message.data[-2:].tobytes() == b"\xff\xd9"
    message.data = message.data[:-2]
    np.testing.assert_array_equal(from_message(message).pixels, expected)


def test_a_compressed_floating_point_image_is_stretched_and_masked():
    pixels = np.arange(12, dtype=np.float32).reshape(3, 4)
    pixels[0, 0] = np.nan
    message = compressed_message(GREY)
    message.data = cv2.imencode(".tiff", pixels)[1].reshape(-1)
    image = from_message(message)
    assert image.pixels[0, 1] == 0 and image.pixels[2, 3] == 255
    assert not image.mask[0, 0] and image.mask.sum() == 11
    colour = np.repeat(pixels[..., None], 3, axis=2)
    colour[1, 1, 2] = np.inf  # one channel is enough
    message.data = cv2.imencode(".tiff", colour)[1].reshape(-1)
    image = from_message(message)
    assert image.pixels.shape == (3, 4, 3)
    assert not image.mask[0, 0] and not image.mask[1, 1] and image.mask.sum() == 10


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float64])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_colour_tiff_of_numbers_whose_colours_opencv_does_not_convert_is_read(
    tmp_path, dtype, channels
):
    rgb = np.array([[(0, 50, 100), (100, 0, 50)]], dtype)
    alpha = np.full((1, 2, channels - 3), 100, dtype)
    stored = np.concatenate([rgb[..., ::-1], alpha], axis=2)
    assert cv2.imwrite(str(tmp_path / "a.tiff"), stored)
    expected = np.rint(rgb.astype(float) * 2.55).astype(np.uint8)
    np.testing.assert_allclose(read_file(tmp_path / "a.tiff"), expected, atol=1)


def test_a_compressed_depth_image_is_no_picture():
    message = compressed_message(GREY)
    message.format = "16UC1; compressedDepth png"
    with pytest.raises(UnknownEncodingError, match="depth"):
        from_message(message)


def test_files(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), RGB[..., ::-1])
    np.testing.assert_array_equal(read_file(tmp_path / "a.png"), RGB)
    with pytest.raises(InputError, match=r"b\.png: cannot be read: No such file"):
        read_file(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    with pytest.raises(InputError, match=r"c\.png: the file cannot be decoded"):
        read_file(tmp_path / "c.png")


def test_a_picture_that_comes_through_a_pipe(tmp_path):
    """As `/dev/stdin` or the shell's `<(...)` gives it."""
    cv2.imwrite(str(tmp_path / "a.png"), RGB[..., ::-1])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = Thread(target=pipe.write_bytes, args=[(tmp_path / "a.png").read_bytes()], daemon=True)
    writer.start()
    np.testing.assert_array_equal(read_file(pipe), RGB)
    writer.join()


def test_a_mask_is_where_an_image_is_not_black(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 1
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask > 0)
    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([mask, mask * 0, mask * 0]))
    np.testing.assert_array_equal(read_mask(tmp_path / "colour.png"), mask > 0)
