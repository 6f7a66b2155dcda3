"""Recorded kernels give what the network gives, whatever else happens meanwhile."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from torch.utils import _python_dispatch

from scfeat_ros.model.fused import FusedSCFeat
from scfeat_ros.model.scfeat import load_model
from scfeat_ros.native import library, matching, replay
from scfeat_ros.native.replay import Replays

pytestmark = pytest.mark.skipif(not library.is_compiled(), reason="no C++ compiler")


@pytest.fixture
def network(monkeypatch):
    """All of it in kernels."""
    monkeypatch.setattr(matching, "has_tiles", lambda: False)  # AMX convolves in PyTorch
    return FusedSCFeat(load_model("scfeat-s"), torch.bfloat16, compiled=True)


class Counted:
    """A network, and how often it was called."""

    def __init__(self, network):
        self.network = network
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return self.network(image)


def image_of(seed, height=128, width=160, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (1, 3, height, width), generator=generator)
    image = image.to(dtype) if dtype is torch.uint8 else image.to(dtype) / 255
    return image.contiguous(memory_format=torch.channels_last)


def is_same(output, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(output, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_replayed_frames_are_the_networks(network, dtype):
    counted = Counted(network)
    replays = Replays(counted)
    images = [image_of(seed, dtype=dtype) for seed in range(5)]
    expected = [network(image) for image in images]
    found = [replays(image) for image in images]  # all of them kept: no frame overwrites another
    assert all(map(is_same, found, expected))
    assert counted.calls == 2
    for output, other in zip(found, expected, strict=True):
        assert [part.stride() for part in output] == [part.stride() for part in other]


def test_sizes_and_numbers_of_threads_take_turns(network):
    counted = Counted(network)
    replays = Replays(counted)
    sizes = (128, 160), (128, 128), (160, 128)
    threads = torch.get_num_threads()
    try:
        for round in range(4):
            for count in (1, 2):
                torch.set_num_threads(count)
                for size in sizes:
                    image = image_of(round, *size)
                    assert is_same(replays(image), network(image))
    finally:
        torch.set_num_threads(threads)
    assert counted.calls == 2 * 2 * len(sizes)


def test_threads_do_not_share_memory(network):
    replays = Replays(network)
    images = [image_of(seed) for seed in range(40)]
    expected = [network(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(replays, images))
    assert all(map(is_same, found, expected))


def test_sizes_used_longest_ago_are_forgotten(network, monkeypatch):
    monkeypatch.setattr(replay, "KEPT_SIZES", 2)
    counted = Counted(network)
    replays = Replays(counted)

    def run(*heights):
        before = counted.calls
        for height in heights:
            image = image_of(height, height)
            assert is_same(replays(image), network(image))
        return counted.calls - before

    assert run(128, 128, 128, 144, 144, 144) == 4  # two are kept
    assert run(144, 128) == 0
    assert run(160, 160, 160) == 2  # instead of 144
    assert run(128, 160) == 0
    assert run(144, 144) == 2


@pytest.fixture
def size(network):
    """Bytes of a recording."""
    replays = Replays(network)
    for _ in range(2):
        replays(image_of(0))
    (kept,) = replays._kept.values()
    assert kept.bytes > 0
    return kept.bytes


def bytes_kept(replays):
    for kept in replays._kept.values():
        assert sum(replay._memory.nbytes for replay in kept.idle) >= kept.bytes
    return sum(kept.bytes for kept in replays._kept.values())


@pytest.mark.parametrize("recordings", [0, 1, 2])
def test_memory_is_limited(network, size, recordings, monkeypatch):
    monkeypatch.setattr(replay, "KEPT_BYTES", (recordings + 1) * size - 1)
    replays = Replays(network)
    images = [image_of(seed) for seed in range(20)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(replays, images))
    assert all(map(is_same, found, map(network, images)))
    assert bytes_kept(replays) <= recordings * size


def test_what_is_used_no_more_makes_room(network, size, monkeypatch):
    monkeypatch.setattr(replay, "KEPT_BYTES", size + size // 2)
    monkeypatch.setattr(replay, "UNUSED", 5)
    counted = Counted(network)
    replays = Replays(counted)
    for width, calls in ((160, 2), (144, 7)):  # the second is recorded once the first has aged
        before = counted.calls
        for seed in range(12):
            image = image_of(seed, width=width)
            assert is_same(replays(image), network(image))
            assert bytes_kept(replays) <= size
        assert counted.calls - before == calls
    for seed in range(12):  # in turn: the second stays, since it is used
        assert is_same(replays(image_of(seed)), network(image_of(seed)))
        before = counted.calls
        replays(image_of(seed, width=144))
        assert counted.calls == before


def test_a_network_that_computes_otherwise_is_called(network):
    def twice(image):
        output = network(image)
        return output._replace(scores=2 * output.scores)

    counted = Counted(twice)
    replays = Replays(counted)
    for seed in range(4):
        image = image_of(seed)
        assert torch.equal(replays(image).scores, 2 * network(image).scores)
    assert counted.calls == 4


def test_an_error_while_recording_leaves_nothing_behind(network):
    def failing(image):
        output = network(image)
        if fails:
            raise MemoryError("made up")
        return output

    counted = Counted(failing)
    replays = Replays(counted)
    fails = False
    replays(image_of(0))
    fails = True
    with pytest.raises(MemoryError, match="made up"):
        replays(image_of(0))
    fails = False
    for seed in range(3):
        assert is_same(replays(image_of(seed)), network(image_of(seed)))
    assert counted.calls == 3  # the second, which failed, is recorded again


def test_where_nothing_can_be_recorded_the_network_runs_as_ever(network):
    def unwatched(image):
        if _python_dispatch._get_current_dispatch_mode() is not None:  # as PyTorch 2.1
            raise RuntimeError("Cannot set version_counter for inference tensor")
        return network(image)

    counted = Counted(unwatched)
    replays = Replays(counted)
    for seed in range(4):
        assert is_same(replays(image_of(seed)), network(image_of(seed)))
    assert counted.calls == 5  # one of them in vain


def test_an_error_in_a_replay_does_not_use_up_the_memory(network, size, monkeypatch):
    counted = Counted(network)
    replays = Replays(counted)
    images = [image_of(seed) for seed in range(2)]
    for image in images:
        replays(image)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_strided", Mock(side_effect=MemoryError("made up")))
        for image in images:
            with pytest.raises(MemoryError, match="made up"):
                replays(image)
    for image in images:
        assert is_same(replays(image), network(image))
    assert counted.calls == 2
    assert bytes_kept(replays) == size


def test_a_recording_holds_no_maps_but_its_own(network):
    """What the network made while it was recorded is freed."""
    replays = Replays(network)
    replays(image_of(0))
    taken = []
    empty = torch.empty

    def watched(*arguments, **options):
        tensor = empty(*arguments, **options)
        taken.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", watched)
        output = replays(image_of(1))
    del output
    gc.collect()
    assert len(taken) > 20 and sum(reference() is not None for reference in taken) <= 1
