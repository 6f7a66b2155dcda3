"""A frame on a GPU: nothing in it waits, and graphs give what is computed without them."""

import copy
import subprocess
import sys
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from simulated_gpu import simulated_gpu
from test_extractor import nearest, textured_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scfeat_ros.model
from scfeat_ros import acceleration, cuda_graphs, selection
from scfeat_ros.cuda_graphs import KEPT, CudaGraphs
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.memory import free_memory
from scfeat_ros.model import kernels
from scfeat_ros.model.descriptors import Projection
from scfeat_ros.model.fused import FusedSCFeat
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, load_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPTIONS = [
    {},
    {"descriptor_source": "backbone"},
    {"descriptor_sampling": "bilinear"},
    {"descriptor_norm": "fusion", "descriptor_dim": 40},
    {"nms_radius": 0, "border": 0, "subpixel": False},
]


@pytest.fixture(scope="module")
def model():
    return load_model("scfeat-s")


class HostTensors(TorchDispatchMode):
    """Notes operators that read or make tensors in main memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.seen.append(str(func))
        return result


def fused_on_meta(model, **form):
    """The fast network without values."""
    network = FusedSCFeat(model, torch.bfloat16, **form).to("meta")
    for name, norm in network.norms.items():
        network.norms[name] = norm._replace(
            weight=norm.weight.to("meta"), bias=norm.bias.to("meta")
        )
    return network


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made: there now, and most at a time."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key):
        self.now -= self.sizes.pop(key)


def cudnn_conv2d(x, weight, bias=None, stride=1, padding=0, *_):
    """What cuDNN returns for channels-last weights; PyTorch's for `meta` is not channels-last."""
    stride, padding = (v if isinstance(v, int) else v[0] for v in (stride, padding))
    size = ((side + 2 * padding - weight.shape[-1]) // stride + 1 for side in x.shape[2:])
    return torch.empty(
        *(len(x), len(weight), *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def idle_triton(monkeypatch):
    """Let Triton's kernels do nothing; skips the test without Triton."""
    module = pytest.importorskip("scfeat_ros.model.triton_kernels", reason="needs Triton")
    idle = defaultdict(lambda: lambda *args, **kwargs: None)
    for name, value in vars(module).items():
        if hasattr(value, "arg_names"):
            monkeypatch.setattr(module, name, idle)


@pytest.mark.parametrize(("triton", "gibibytes"), [(False, 1), (True, 0.5)])
@torch.inference_mode()
def test_memory_of_the_largest_network(triton, gibibytes, monkeypatch):
    if triton:
        idle_triton(monkeypatch)
    monkeypatch.setattr(torch.nn.functional, "conv2d", cudnn_conv2d)
    model = SCFeat(CONFIGS["scfeat"]).eval()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    network = fused_on_meta(model, triton=triton)
    image = torch.empty(1, 3, 480, 640, dtype=torch.uint8, device="meta")
    with Allocated() as allocated:
        network(image)
    # those of the plain network stay, too
    assert 1.5 * weights + allocated.most < gibibytes * 2**30


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (None, ""),
        ("convolutions", "it does not run here (KeyError())"),
        ("keypoints", "it finds other keypoints than PyTorch's operators"),
        ("descriptors", "its descriptors have a median cosine similarity of -1.0000"),
        ("all descriptors", "it does not run here (no such kernel)"),
    ],
)
def test_triton_is_taken_where_it_runs(model, wrong, reason, monkeypatch, caplog):
    """With stand-ins for its kernels, as it does not run on a simulated GPU."""
    stand_in = ModuleType("triton_kernels")
    vars(stand_in).update(vars(kernels))

    def finish(y, bias, plus, relu):
        if wrong == "convolutions":
            raise KeyError
        y = y if bias is None else y + bias[:, None, None]
        y = y if plus is None else y + plus
        return y.relu() if relu else y

    def select(*args):
        found = selection.on_device(*args)
        return found._replace(points=found.points + (wrong == "keypoints"))

    def describe(*args):
        if wrong == "all descriptors":
            raise RuntimeError("no such kernel")
        return Projection.__call__(*args) * (-1 if wrong == "descriptors" else 1)

    stand_in.finish_convolution, stand_in.select, stand_in.describe = finish, select, describe
    monkeypatch.setattr(scfeat_ros.model, "triton_kernels", stand_in, raising=False)
    monkeypatch.setitem(sys.modules, "scfeat_ros.model.triton_kernels", stand_in)
    with simulated_gpu() as device:
        monkeypatch.setattr(acceleration, "has_triton", lambda: True)
        network = acceleration.choose(copy.deepcopy(model).to(device), device, "auto", "auto")
    assert network.graphed and network.precision == "bf16"
    assert network.backend == (acceleration.GRAPHED if wrong else acceleration.TRITON)
    warning = f"bf16, fused, Triton kernels, CUDA graphs was not taken: {reason}"
    assert (warning in caplog.text) == (wrong is not None)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.inference_mode()
def test_a_frame_neither_waits_for_the_device_nor_copies_to_it(model, options, triton, monkeypatch):
    """What CUDA graphs can capture. On `meta`, where every look at a value is an error."""
    if triton:
        idle_triton(monkeypatch)
    extractor = Extractor(copy.deepcopy(model), "cpu", compile="off", **options)
    network = fused_on_meta(model, triton=triton)
    if triton:
        extractor.network = extractor.network._replace(backend=acceleration.TRITON)
    extractor.model.to("meta")
    extractor.device = torch.device("meta")
    extractor.set_options()
    image = torch.empty(1, 3, 96, 128, dtype=torch.uint8, device="meta")
    mask = torch.empty(96, 128, dtype=torch.bool, device="meta")
    with HostTensors() as on_host:
        output = network(image)
        maps = extractor._maps(output, 0)
        found = extractor._find(output.scores[0, 0], image[0], *maps, mask)
    assert on_host.seen == []
    count = extractor.options.max_keypoints
    assert [part.shape for part in found] == [
        (count, 2),
        (count,),
        (count, extractor.descriptor_dim),
    ]


class Doubled(NamedTuple):
    values: torch.Tensor


@pytest.fixture
def captures(monkeypatch):
    """PyTorch's captures, with nothing behind them: which stream and pool each of them has."""
    seen = []

    @contextmanager
    def graph(captured, pool, stream, capture_error_mode):
        seen.append(SimpleNamespace(stream=stream, pool=pool))
        yield

    for name, stand_in in {
        "graph": graph,
        "CUDAGraph": lambda: MagicMock(**{"pool.return_value": (0, 1)}),
        "Stream": lambda device: MagicMock(),
        "current_stream": MagicMock(),
        "set_stream": MagicMock(),
        "stream": nullcontext,
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda_graphs._side_stream.cache_clear()
    yield seen
    cuda_graphs._side_stream.cache_clear()


def test_graphs_share_memory_since_all_are_captured_on_one_stream(captures):
    graphs = CudaGraphs(lambda x: Doubled(2 * x))
    for size in (2, 3, 2):
        assert graphs(torch.ones(size)).values.tolist() == [2.0] * size
    CudaGraphs(lambda x: Doubled(2 * x))(torch.ones(4))
    assert [capture.pool for capture in captures] == [None, (0, 1), None]
    assert len({id(capture.stream) for capture in captures}) == 1


def test_a_replay_waits_for_the_one_before(captures):
    graphs = CudaGraphs(lambda x: Doubled(2 * x))
    stream = torch.cuda.current_stream()
    graphs(torch.ones(1))
    stream.wait_event.assert_not_called()
    graphs(torch.ones(1))
    stream.wait_event.assert_called_once_with(stream.record_event())


def failing(error):
    """A function that raises where it is captured, after the warm-up."""
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) == cuda_graphs.WARM_UPS + 1:
            raise error
        return Doubled(2 * x)

    return function


def test_what_cannot_be_captured_runs_without_a_graph(captures, caplog):
    graphs = CudaGraphs(failing(RuntimeError("operation not permitted when stream is capturing")))
    for _ in range(2):
        assert graphs(torch.ones(1)).values == 2
    assert len(captures) == 1
    assert not graphs.is_captured(torch.ones(1))
    assert "runs without a CUDA graph: operation not permitted" in caplog.text
    torch.cuda.set_stream.assert_called_with(torch.cuda.current_stream())


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":838'),
    ],
)
def test_a_capture_that_runs_out_of_memory_is_tried_again(captures, error):
    graphs = CudaGraphs(failing(error))
    with pytest.raises(RuntimeError, match=str(error)[:20]):
        graphs(torch.ones(1))
    assert graphs(torch.ones(1)).values == 2
    assert graphs.is_captured(torch.ones(1))


@torch.inference_mode()
def test_images_of_several_sizes_in_turn(model, gpu):
    network = acceleration.choose(copy.deepcopy(model).to(gpu), gpu, "fp32", "on")
    assert network.graphed
    # more sizes than graphs are kept, twice, so that graphs are captured, replayed and left out
    images = [torch.rand(1, 3, 64, 64 + 16 * i, device=gpu) for i in range(KEPT + 2)] * 2
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = [network.run(image) for image in images]
    for image, output in zip(images, found, strict=True):
        expected = model(image.cpu())
        for a, b in zip(expected, output, strict=True):
            torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_features_are_those_of_the_cpu(model, gpu, options, caplog):
    images = [textured_image(*size, seed) for seed, size in enumerate([(320, 240), (200, 161)] * 2)]
    mask = np.ones((240, 320), bool)
    mask[:, :150] = False
    on_cpu, on_gpu = (
        Extractor(copy.deepcopy(model), device, precision="fp32", **options)
        for device in ("cpu", gpu)
    )
    for changes in ({}, {"max_keypoints": 300}):
        for extractor in (on_cpu, on_gpu):
            extractor.set_options(**changes)
        for image in images:
            masks = (None, mask) if image.shape[:2] == mask.shape else (None,)
            for one in masks:
                expected, found = on_cpu(image, one), on_gpu(image, one)
                assert abs(len(found) - len(expected)) <= 0.02 * len(expected)
                distance = nearest(found.keypoints, expected.keypoints)
                assert np.mean(distance < 0.5) > 0.97
                same = np.linalg.norm(found.keypoints[:, None] - expected.keypoints, axis=2) < 0.1
                i, j = np.nonzero(same)
                cosines = np.sum(found.descriptors[i] * expected.descriptors[j], axis=1)
                lengths = np.linalg.norm(found.descriptors[i], axis=1) * np.linalg.norm(
                    expected.descriptors[j], axis=1
                )
                assert np.median(cosines / lengths) > 0.999
    assert "without a CUDA graph" not in caplog.text


@pytest.mark.parametrize("ratio", [None, 0.9])
def test_matches_are_those_of_the_cpu(gpu, ratio):
    random = np.random.default_rng(0)
    first, second = (
        Features(np.zeros((n, 2), np.float32), np.ones(n, np.float32), values, (640, 480))
        for n, values in ((n, random.normal(size=(n, 32)).astype(np.float32)) for n in (300, 250))
    )
    second.descriptors[:200] = first.descriptors[100:] + random.normal(0, 0.3, (200, 32))
    for features in (first, second):
        features.descriptors[:] /= np.linalg.norm(features.descriptors, axis=1, keepdims=True)
    expected, found = (match(first, second, ratio, device=device) for device in ("cpu", gpu))
    assert len(expected) >= 190
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.similarity, expected.similarity, atol=1e-5)


@needs_cuda
@torch.inference_mode()
def test_threads_with_streams_of_their_own_get_results_of_their_own(model):
    graphs = CudaGraphs(FusedSCFeat(copy.deepcopy(model).cuda(), torch.float32))
    images = [torch.rand(1, 3, 240, 320, device="cuda") for _ in range(4)]
    expected = [graphs.function(image) for image in images]
    torch.cuda.synchronize()

    @torch.inference_mode()
    def several(image):
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [graphs(image) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return outputs

    with ThreadPoolExecutor(len(images)) as pool:
        for one, outputs in zip(expected, pool.map(several, images), strict=True):
            for output in outputs:
                torch.testing.assert_close(output, one, atol=1e-3, rtol=1e-3)


@needs_cuda
@torch.inference_mode()
def test_sizes_share_their_memory():
    free_memory()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    graphs = CudaGraphs(FusedSCFeat(SCFeat(CONFIGS["scfeat"]).eval().cuda(), torch.float16))
    taken = []
    for width in (640, 608, 576):
        graphs(torch.zeros(1, 3, 480, width, device="cuda"))
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - reserved)
    assert torch.cuda.max_memory_allocated() - allocated < 2**30
    assert taken[2] < 1.3 * taken[0]


BROKEN_OFF = """
import torch
from typing import NamedTuple
from scfeat_ros.cuda_graphs import CudaGraphs
from scfeat_ros.memory import free_memory

class Result(NamedTuple):
    values: torch.Tensor

one = torch.ones(3, device="cuda")
waits = CudaGraphs(lambda x: Result(x * x.sum().item()))
doubles = CudaGraphs(lambda x: Result(2 * x))
for _ in range(2):
    assert waits(one).values.tolist() == [3, 3, 3]
    assert not waits.is_captured(one)
    assert doubles(one).values.tolist() == [2, 2, 2]
free_memory()
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


@needs_cuda
def test_after_a_capture_that_was_broken_off_all_goes_on():
    # in a process of its own: PyTorch before 2.12 never captures again
    subprocess.run([sys.executable, "-c", BROKEN_OFF], check=True)
