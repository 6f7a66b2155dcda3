"""The fast network and its kernels against the plain network and PyTorch's operators."""

import copy
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.model import fused, kernels
from scfeat_ros.model.descriptors import Maps, Projection
from scfeat_ros.model.fused import Conv, FusedSCFeat, Stem, taps
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, SCFeatConfig
from scfeat_ros.native import awake, descriptors, library, matching, winograd
from scfeat_ros.native import kernels as native

SMALL = SCFeatConfig("small", "resnet10", (64, 32), 32, (8, 8, 8))
WIDE = SCFeatConfig("wide", "resnet50", (64, 32), 24, (12, 5, 20))
ONE_TAP = SCFeatConfig("one-tap", "resnet10", (32, 32), 16, (8, 8, 8), upsampled_kernel=1)


needs_compiler = pytest.mark.skipif(not library.is_compiled(), reason="no C++ compiler")
try:
    from scfeat_ros.model import triton_kernels
except ImportError:
    triton_kernels = None
needs_triton = pytest.mark.skipif(
    triton_kernels is None, reason="Triton is not installed (pip install triton; 1 GB)"
)
ALL = pytest.mark.parametrize(
    "k",
    [
        kernels,
        pytest.param(native, marks=needs_compiler),
        pytest.param(triton_kernels, marks=needs_triton),
    ],
    ids=["torch", "compiled", "triton"],
)
SHORTS = pytest.mark.parametrize(
    "int16",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not library.is_compiled() or not winograd.has_int16(),
                reason="no kernels for products of int16 on this CPU",
            ),
        ),
    ],
    ids=["", "int16"],
)


def kernels_device(k):
    """Makes tensors where kernels run: Triton's on the GPU, if there is one."""
    on_gpu = k is triton_kernels is not None and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def tensors_where_kernels_run(request):
    parameters = getattr(request.node, "callspec", SimpleNamespace(params={})).params
    with kernels_device(parameters.get("k")):
        yield


def random_model(config, seed=0):
    """A network in which no weight has the value that would hide its misuse."""
    torch.manual_seed(seed)
    model = SCFeat(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.uniform_(parameter, 0.4, 1.2) if "weight" in name else nn.init.normal_(
                parameter, std=0.2
            )
    for number, block in enumerate(m for m in model.modules() if isinstance(m, nn.PReLU)):
        nn.init.constant_(block.weight, (0.3, -0.2)[number % 2])  # training makes some negative
    for convolution in (model.bridge.spatial_scale, model.bridge.spatial_shift):
        nn.init.normal_(convolution.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(model.detector.reliability.weight)
    nn.init.constant_(model.detector.reliability.bias, -0.2)
    return model


@pytest.mark.parametrize(
    "config", [SMALL, WIDE, ONE_TAP, CONFIGS["scfeat-s"]], ids=lambda c: c.name
)
@pytest.mark.parametrize(
    "form",
    [
        {},
        pytest.param({"compiled": True}, marks=needs_compiler),
        pytest.param({"triton": True}, marks=needs_triton),
    ],
    ids=["torch", "compiled", "triton"],
)
@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
@torch.no_grad()
def test_equals_the_plain_network(config, form, size):
    if "triton" in form and size != (16, 16):
        size = 16, 48  # interpreted, a larger one takes minutes
    with kernels_device(triton_kernels if "triton" in form else kernels):
        model = random_model(config)
        image = torch.rand(2, 3, *size)
        expected = model(image)
        found = FusedSCFeat(model, **form)(image)
    for name, a, b in zip(expected._fields, expected, found, strict=True):
        assert b.dtype == torch.float32 and a.shape == b.shape
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@SHORTS
@torch.no_grad()
def test_bfloat16_stays_close(compiled, int16):
    model = random_model(CONFIGS["scfeat-s"])
    image = torch.rand(1, 3, 96, 128)
    expected = model(image)
    found = FusedSCFeat(model, torch.bfloat16, compiled, int16)(image)
    cosine = F.cosine_similarity(found.descriptors.float(), expected.descriptors)
    assert cosine.median() > 0.999 and cosine.min() > 0.99
    assert found.scores.dtype == torch.float32
    error = (found.scores - expected.scores).norm() / expected.scores.norm()
    assert error < 0.02


def test_the_plain_network_is_left_as_it_was():
    model = random_model(SMALL)
    before = copy.deepcopy(model.state_dict())
    FusedSCFeat(model, torch.bfloat16)(torch.rand(1, 3, 32, 32))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@ALL
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("channels", [3, 8, 24])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_after_upsampling_is_exact_at_every_border(k, factor, channels, kernel):
    torch.manual_seed(0)
    x = torch.randn(1, 6, 3, 5)
    weight = torch.randn(channels, 6, kernel, kernel)
    plus = torch.randn(1, channels, 3 * factor, 5 * factor)
    upsampled = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    expected = F.conv2d(upsampled, weight, padding=kernel // 2)
    z = taps(weight, torch.float32)(x)
    found, totals = k.upsampled_sum(z, channels, factor)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(totals, kernels.statistics(expected), atol=1e-2, rtol=1e-4)
    found, _ = k.upsampled_sum(z, channels, factor, plus.clone())
    torch.testing.assert_close(found, expected + plus, atol=1e-4, rtol=1e-4)


@ALL
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5)])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_up_conv_into_a_part_of_a_larger_map(k, size, factor, kernel):
    torch.manual_seed(0)
    x = torch.randn(1, 6, *size)
    weight = torch.randn(20, 6, kernel, kernel)
    norm = kernels.Norm(torch.rand(20) + 0.5, torch.randn(20), groups=4)
    upsampled = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    expected = F.conv2d(upsampled, weight, padding=kernel // 2)
    expected = F.elu(F.group_norm(expected, 4, norm.weight, norm.bias, 1e-5))
    place = torch.zeros(1, 32, size[0] * factor, size[1] * factor)
    place = place.contiguous(memory_format=torch.channels_last)
    k.up_conv(taps(weight, torch.float32)(x), 20, factor, norm, place[:, 8:28])
    torch.testing.assert_close(place[:, 8:28], expected, atol=1e-4, rtol=1e-4)
    assert not place[:, :8].any() and not place[:, 28:].any()


def rounding_of_result(dtype, int16):
    """What a map of minimal filtering may be off by, with values of about 1."""
    return dict(atol=0.03 if int16 else 1e-4, rtol=0 if dtype is torch.float32 else 2**-8)


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 11), (30, 40)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (32, 48), (48, 64)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SHORTS
@torch.no_grad()
def test_convolution_by_minimal_filtering(size, inputs, outputs, relu, dtype, int16, monkeypatch):
    monkeypatch.setattr(matching, "has_tiles", lambda: False)  # with AMX it does not pay in bf16
    monkeypatch.setattr(winograd, "MIN_TILES", 1)  # nor for a map of few tiles
    torch.manual_seed(0)
    x, plus = (torch.randn(1, channels, *size).to(dtype) for channels in (inputs, outputs))
    weight = (torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    for b, p in ((bias, plus), (None, None)):
        expected = F.conv2d(x.double(), weight.double(), padding=1)
        expected = expected if b is None else expected + b[:, None, None] + p
        expected = (expected.relu() if relu else expected).float()
        conv = Conv(weight, b, dtype=dtype)
        assert conv.products(*size) == 9 * inputs * outputs * size[0] * size[1]
        conv.use_kernels(int16)
        tiles = math.ceil(size[0] / 4) * math.ceil(size[1] / 4)
        assert conv.products(*size) == 36 * inputs * outputs * tiles
        found = conv(x, relu, p)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.float(), expected, **rounding_of_result(dtype, int16))
        first, rest = x.split([16, inputs - 16], dim=1)
        assert torch.equal(conv(first, relu, p, beside=rest), found)


@needs_compiler
@SHORTS
@torch.no_grad()
def test_largest_sums_of_minimal_filtering(int16, monkeypatch):
    """Integers of 16 bits overflow in no sum."""
    monkeypatch.setattr(matching, "has_tiles", lambda: False)
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    # in the middle the patch and the kernel whose transforms are largest at a place, everywhere
    # with the same sign
    patch = torch.tensor([0.0, -1, -1, 1, 1, 0])
    x = torch.zeros(1, 256, 12, 12)
    x[..., 3:9, 3:9] = 1000 * patch[:, None] * patch
    weight = torch.ones(16, 256, 3, 3)
    for sign in (1, -1):
        conv = Conv(sign * weight, dtype=torch.bfloat16)
        conv.use_kernels(int16)
        expected = F.conv2d(x, sign * weight, padding=1)
        found = conv(x.bfloat16().contiguous(memory_format=torch.channels_last)).float()
        assert (found - expected).abs().max() < 0.004 * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (5, 11), (30, 40)])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 16), (18, 32), (20, 112)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_convolution_as_a_matrix_product(size, side, stride, inputs, outputs, dtype, monkeypatch):
    monkeypatch.setattr(matching, "has_tiles", lambda: False)  # with AMX it does not pay in bf16
    monkeypatch.setattr(winograd, "MIN_TILES", 10**9)  # nothing is filtered
    torch.manual_seed(0)
    x = torch.randn(1, inputs, *size).to(dtype)
    weight = (torch.randn(outputs, inputs, side, side) / (side * inputs**0.5)).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    conv, other = Conv(weight, bias, stride, dtype), Conv(weight, None, stride, dtype)
    for one in (conv, other):
        one.use_kernels()
        assert one._direct is not None
    expected = F.conv2d(x.double(), weight.double(), None, stride, side // 2)
    rounding = dict(atol=1e-4, rtol=0 if dtype is torch.float32 else 2**-8)
    found = other(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected.float(), **rounding)
    plus = torch.randn(expected.shape).to(dtype)
    expected = (expected + bias[:, None, None] + plus).relu().float()
    found = conv(x, relu=True, plus=plus)
    torch.testing.assert_close(found.float(), expected, **rounding)
    first, rest = x.split([1, inputs - 1], dim=1)
    assert torch.equal(conv(first, relu=True, plus=plus, beside=rest), found)


@needs_compiler
@pytest.mark.parametrize(
    "conv",
    [
        Conv(torch.randn(16, 17, 3, 3)),
        Conv(torch.randn(18, 16, 3, 3)),
        Conv(torch.randn(16, 16, 5, 5)),
        Conv(torch.randn(16, 16, 3, 3), dtype=torch.bfloat16),
    ],
    ids=["inputs", "outputs", "side", "bf16 by tiles"],
)
@torch.no_grad()
def test_other_convolutions_stay_as_they_are(conv, monkeypatch):
    monkeypatch.setattr(matching, "has_tiles", lambda: True)
    x = torch.randn(1, conv.weight.shape[1], 8, 12, dtype=conv.weight.dtype)
    before = conv(x)
    conv.use_kernels()
    assert torch.equal(conv(x), before)


@needs_compiler
@torch.no_grad()
def test_small_maps_are_not_filtered():
    conv, plain = (Conv(torch.ones(16, 16, 3, 3)) for _ in range(2))
    conv.use_kernels()
    for size, small in (((12, 20), True), ((13, 16), False)):
        assert (conv.products(*size) == plain.products(*size)) == small
        x = torch.randn(1, 16, *size)
        torch.testing.assert_close(conv(x), plain(x), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(fused._ONEDNN_PACK is None, reason="this PyTorch lacks oneDNN's operators")
@torch.no_grad()
def test_weights_are_put_in_order_once_for_each_of_a_few_sizes(monkeypatch):
    monkeypatch.setattr(fused, "KEPT", 4)
    packed = []
    pack = fused._ONEDNN_PACK
    monkeypatch.setattr(fused, "_ONEDNN_PACK", lambda *a: packed.append(a[-1][2]) or pack(*a))
    conv = Conv(torch.randn(16, 16, 3, 3))
    for height in (8, 12, 20, 8, 12, 20, 24, 28, 28, 8):
        x = torch.randn(1, 16, height, 12)
        expected = F.conv2d(x, conv.weight, padding=1)
        torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=1e-4)
    assert packed == [8, 12, 20, 24, 28, 8]


@needs_compiler
@pytest.mark.parametrize("slope", [None, 0.25, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalization_into_a_part_of_a_larger_map(slope, dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 12, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = kernels.Norm(torch.rand(12) + 0.5, torch.randn(12), groups=4)
    expected = F.group_norm(x.float(), 4, norm.weight, norm.bias, 1e-5)
    expected = F.elu(expected) if slope is None else F.leaky_relu(expected, slope)
    place = torch.zeros(1, 20, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    native.normalize_activate(x, native.statistics(x), norm, slope, out=place[:, 4:16])
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(place[:, 4:16].float(), expected, atol=tolerance, rtol=tolerance)
    assert not place[:, :4].any() and not place[:, 16:].any()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (48, 80), (64, 304)])
@SHORTS
@torch.no_grad()
def test_stem(size, dtype, compiled, int16):
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size)
    weight, bias = torch.randn(64, 3, 7, 7) / 12, torch.randn(64)
    expected = F.conv2d(image.double(), weight.double(), bias.double(), stride=2, padding=3)
    expected = F.max_pool2d(expected, 3, stride=2, padding=1).relu().float()
    stem = Stem(weight, bias, dtype, compiled, int16)
    found = stem(image)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    rounding = rounding_of_result(dtype, int16 and compiled)
    if dtype is torch.bfloat16 and not compiled:
        rounding = dict(atol=0.05, rtol=0.02)
    torch.testing.assert_close(found.float(), expected, **rounding)
    plain = 147 * 64 * size[0] * size[1] // 4
    tiles = math.ceil(size[0] / 6) * math.ceil(size[1] / 6)
    assert stem.products(*expected.shape[2:]) == (36 * 12 * 64 * tiles if compiled else plain)


@needs_compiler
@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("size", [(2, 1), (3, 5), (4, 40)])
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_head_at_the_resolution_of_the_image(size, channels, kernel):
    torch.manual_seed(0)
    height, width = size
    image = torch.rand(1, 3, 4 * height, 4 * width)
    mean = deviation = torch.full((3,), 0.4)
    left = torch.randn(1, 5, height, width)
    first, second = (
        Conv(torch.randn(channels, 3, 3, 3)),
        Conv(torch.randn(channels, channels, 3, 3)),
    )
    left_taps = taps(torch.randn(channels, 5, kernel, kernel), torch.float32)
    norm = kernels.Norm(torch.rand(channels), torch.randn(channels), channels)
    results = []
    for k in (kernels, native):
        normalized = k.normalize_image(image, mean, deviation)
        peaks, right, totals = k.image_branch(normalized, first)
        hidden, sums = k.hidden(right, totals, norm, 0.2, second, left, left_taps)
        response, last = k.response(hidden, sums, norm, 0.3, torch.linspace(-1, 1, channels))
        results.append((peaks, right, totals, hidden, sums, response, last))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(descriptors, marks=needs_compiler),
        pytest.param(triton_kernels, marks=needs_triton),
    ],
    ids=["compiled", "triton"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("dim", "length"), [(128, 0), (150, 0), (150, 20), (5, 0)])
@torch.no_grad()
def test_descriptors_of_places_and_their_surroundings(k, dtype, layout, dim, length):
    torch.manual_seed(0)
    channels = 24, 48, 20
    projection = Projection(*channels)
    projection.matrix = torch.randn(dim, projection.matrix.shape[1])
    sizes = (30, 44), (15, 22), (8, 11)
    bridged, layer2, layer3 = (
        torch.randn(1, c, *size).contiguous(memory_format=layout)
        for c, size in zip(channels, sizes, strict=True)
    )
    maps = Maps(bridged[0], layer2.to(dtype)[0], layer3.to(dtype)[0])
    points = torch.rand(50, 2) * torch.tensor([186.0, 130.0]) - 5  # some lie outside
    for count in (0, 1, 50) if k is descriptors else (0, 3):
        expected = projection(maps, points[:count], length)
        found = k.describe(projection, maps, points[:count], length)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("capability", [90, 87])
def test_kernels_in_triton_compile_for_gpus(capability):
    """For an H100 and a Jetson Orin: Triton brings the compiler, and takes no GPU."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    names = {name for name, value in vars(triton_kernels).items() if hasattr(value, "arg_names")}
    assert compiled == names - {"_softplus", "_spline"}  # which others call


def idle_threads():
    """States of this process's threads in the scheduler's idle class: R runs or would, S sleeps."""
    stats = [(task / "stat").read_text() for task in Path("/proc/self/task").iterdir()]
    values = [stat.rpartition(")")[2].split() for stat in stats]
    return [v[0] for v in values if int(v[38]) == os.SCHED_IDLE]


def becomes(expected):
    """Whether the idle class's threads are in the states within a minute: others go before them."""
    until = time.monotonic() + 60
    while idle_threads() != expected and time.monotonic() < until:
        time.sleep(0.01)
    return idle_threads() == expected


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's idle class")
def test_cores_are_kept_awake_by_threads_that_give_way_and_stop(monkeypatch):
    monkeypatch.setattr(awake, "has_cpu_quota", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: max(os.cpu_count(), 2))
    cores = len(os.sched_getaffinity(0))
    for _ in range(2):
        with awake.cores_awake(), awake.cores_awake():
            assert becomes(cores * ["R"])
        assert becomes(cores * ["S"])


FORKS = """
import os, signal, threading
from scfeat_ros.native import library

kernels = library.load()

def use():
    kernels.awake_begin()
    kernels.awake_end()

def use_for_ever():
    while True:
        use()

for _ in range(3):
    threading.Thread(target=use_for_ever, daemon=True).start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        use()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        os._exit(1)
os._exit(0)
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_may_fork_while_cores_are_kept_awake():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS]).returncode == 0


@pytest.mark.parametrize(
    ("file", "content", "limited"),
    [
        ("cpu.max", "max 100000", False),
        ("cpu.max", "150000 100000", True),
        ("cpu/cpu.cfs_quota_us", "-1", False),
        ("cpu/cpu.cfs_quota_us", "50000", True),
        ("robot.slice/cpu.max", "50000 100000", True),
        ("robot.slice/camera.service/cpu.max", "max 100000", False),
        ("other.slice/cpu.max", "50000 100000", False),
    ],
)
def test_limits_on_cpu_time_are_seen(tmp_path, file, content, limited):
    membership = tmp_path / "cgroup"
    membership.write_text("3:cpuset:/\n0::/robot.slice/camera.service\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content + "\n")
    assert awake.has_cpu_quota(tmp_path, membership) == limited


@needs_compiler
def test_result_does_not_depend_on_the_number_of_threads():
    model = FusedSCFeat(random_model(SMALL), compiled=True)
    image = torch.rand(1, 3, 64, 48)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = model(image)
        torch.set_num_threads(3)
        three = model(image)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


TOO_LITTLE = """
import resource
from pathlib import Path
import numpy as np
from scfeat_ros.native import matching

many = np.ones((100_000, 256), np.float32)
matching.nearest(many[:9], many[:9])
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + 10 * 2**20,))
try:
    matching.nearest(many, many)
except MemoryError as error:
    assert "nearest" in str(error), error
else:
    raise AssertionError("there was enough")
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc")
def test_a_kernel_without_memory_does_not_end_the_process():
    subprocess.run([sys.executable, "-c", TOO_LITTLE], check=True)


@needs_compiler
def test_kernels_are_compiled_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "SOURCES", [library.FOLDER / "replay.cpp"])  # takes the least
    caplog.set_level(logging.INFO)
    library._load()
    (compiled,) = (tmp_path / "scfeat_ros").iterdir()
    assert "compiled CPU kernels in" in caplog.text
    written = compiled.stat().st_mtime_ns
    library._load()
    assert compiled.stat().st_mtime_ns == written


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(library.CompilerError, match="install g"):
        library._load()


def test_a_compiler_that_cannot_run_is_named(monkeypatch, tmp_path):
    (tmp_path / "c++").write_text("for another machine")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(library.CompilerError, match=r"c\+\+ failed: .*Exec format error"):
        library._load()


def test_without_a_home_folder_nothing_is_compiled(monkeypatch, tmp_path):
    """As in a container that runs under a user id of its own."""

    def no_account(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    with pytest.raises(library.CompilerError, match="set XDG_CACHE_HOME"):
        library._load()


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level(logging.INFO)
    with pytest.raises(library.CompilerError, match=r"file/scfeat_ros: .*set XDG_CACHE_HOME"):
        library._load()
    assert not caplog.text  # no word of compiling


def test_a_compiler_that_fails_is_tried_once(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls; exit 1\n')
    compiler.chmod(0o755)
    code = (
        "from scfeat_ros.native import library\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        library.load()\n"
        "    except library.CompilerError as error:\n"
        "        print(error)\n"
        "print(library.is_compiled())\n"
    )
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "calls").read_text() == "--version\n"


@needs_compiler
def test_sources_of_an_earlier_version_are_left_alone(tmp_path):
    """An installation over an earlier one may keep its files."""
    package = tmp_path / "scfeat_ros"
    shutil.copytree(library.FOLDER.parent, package, ignore=shutil.ignore_patterns("weights"))
    (package / "native" / "gone.cpp").write_text("#error a file of an earlier version\n")
    code = "from scfeat_ros.native import library; library.load(); print(library.FOLDER)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(result.stdout.strip()) == package / "native"


def test_all_sources_are_compiled():
    assert sorted(library.SOURCES) == sorted(library.FOLDER.glob("*.cpp"))


@needs_compiler
def test_failing_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(library.CompilerError, match="no-such-option"):
        library._load()
    assert not list((tmp_path / "scfeat_ros").iterdir())


@needs_compiler
def test_what_killed_compilations_have_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old, new = (tmp_path / "scfeat_ros" / f"{name}.partial" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "stem.o").touch()
    then = time.time() - 2 * library.COMPILE_TIMEOUT
    os.utime(old, (then, then))
    with pytest.raises(library.CompilerError):
        library._load()
    assert list((tmp_path / "scfeat_ros").iterdir()) == [new]  # somebody may be compiling there
