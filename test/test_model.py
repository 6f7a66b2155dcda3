"""Every part of the network against a slow, direct evaluation of its equation."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_disk import files_up_to
from safetensors.torch import load_file, save_file

from scfeat_ros.errors import ModelError
from scfeat_ros.model.backbone import ConvBlock, F2RBackbone
from scfeat_ros.model.cross_norm import CrossNorm
from scfeat_ros.model.descriptors import Maps, Projection
from scfeat_ros.model.detector import Detector, peakiness
from scfeat_ros.model.reliability import Reliability
from scfeat_ros.model.resnet import ResNetEncoder
from scfeat_ros.model.sampling import block_means, sample, sample_smooth, upsample
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, load_model, read_metadata, save_model


def softplus(x):
    return math.log1p(math.exp(x))


def bilinear(image, x, y):
    """Value of a (H, W) array at x, y, border replicated; pixel centres at integers."""
    height, width = image.shape
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = math.floor(x), math.floor(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    a, b = x - left, y - top
    return (
        (1 - a) * (1 - b) * image[top, left]
        + a * (1 - b) * image[top, right]
        + (1 - a) * b * image[bottom, left]
        + a * b * image[bottom, right]
    )


def upsample_slowly(maps, factor):
    count, height, width = maps.shape
    result = np.zeros((count, height * factor, width * factor))
    for c, y, x in np.ndindex(result.shape):
        result[c, y, x] = bilinear(maps[c], (x + 0.5) / factor - 0.5, (y + 0.5) / factor - 0.5)
    return result


def convolve_slowly(maps, weight):
    """Cross-correlation with zero padding: (I, H, W) with (O, I, k, k) -> (O, H, W)."""
    outputs, _, size, _ = weight.shape
    pad = size // 2
    padded = np.pad(maps, ((0, 0), (pad, pad), (pad, pad)))
    height, width = maps.shape[1:]
    result = np.zeros((outputs, height, width))
    for o, y, x in np.ndindex(result.shape):
        result[o, y, x] = (padded[:, y : y + size, x : x + size] * weight[o]).sum()
    return result


def instance_norm_slowly(maps, scale, shift, epsilon=1e-5):
    mean = maps.mean(axis=(1, 2), keepdims=True)
    variance = maps.var(axis=(1, 2), keepdims=True)
    standard = (maps - mean) / np.sqrt(variance + epsilon)
    return standard * scale[:, None, None] + shift[:, None, None]


def peakiness_slowly(maps):
    """Eq. 4-6, loop by loop."""
    maps = maps / np.abs(maps).max()
    channels, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    result = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        best = -np.inf
        for k in range(channels):
            channel_score = softplus(maps[k, y, x] - maps[:, y, x].mean())
            local_score = softplus(maps[k, y, x] - padded[k, y : y + 3, x : x + 3].mean())
            best = max(best, channel_score * local_score)
        result[y, x] = best
    return result


def numpy(tensor):
    return tensor.detach().double().numpy()


def randomize(module, seed=0):
    """Random values for all parameters, so that scales of one and shifts of zero hide nothing.

    And for the reliability of a detector.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        for part in module.modules():
            if isinstance(part, Reliability):
                for number in part.buffers():
                    number.copy_(torch.randn(number.shape, generator=generator))
    return module.eval()


def test_upsampling_is_bilinear_between_pixel_centres():
    maps = torch.rand(1, 2, 3, 4)
    for factor in (2, 4):
        expected = upsample_slowly(numpy(maps[0]), factor)
        np.testing.assert_allclose(numpy(upsample(maps, factor)[0]), expected, atol=1e-6)


def test_sampling_agrees_with_upsampling_at_pixel_centres():
    maps = torch.rand(1, 3, 5, 6)
    points = torch.tensor([[[0.0, 0.0], [7.0, 3.0], [23.0, 19.0], [10.0, 11.0]]])
    values = sample(maps, points, stride=4)[0]
    large = upsample(maps, 4)[0]
    for value, (x, y) in zip(values, points[0].long(), strict=True):
        torch.testing.assert_close(value, large[:, y, x])


def b_spline(distance):
    """Cubic B-spline, by its two polynomials."""
    d = abs(distance)
    if d < 1:
        return 2 / 3 - d**2 + d**3 / 2
    return (2 - d) ** 3 / 6 if d < 2 else 0.0


def spline_sample(maps, x, y):
    """(C, H, W) at x, y on the map, weighted by cubic B-splines; the border repeats."""
    _, height, width = maps.shape
    total = 0.0
    for row in range(math.floor(y) - 3, math.floor(y) + 5):
        for column in range(math.floor(x) - 3, math.floor(x) + 5):
            value = maps[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            total = total + value * b_spline(row - y) * b_spline(column - x)
    return total


def means(maps, side):
    """(C, H, W) -> means of blocks of side x side cells, smaller ones at the edge."""
    _, height, width = maps.shape
    rows, columns = range(0, height, side), range(0, width, side)
    blocks = [
        [maps[:, r : r + side, c : c + side].mean(axis=(1, 2)) for c in columns] for r in rows
    ]
    return np.stack(blocks).transpose(2, 0, 1)


def unit(x, axis=0):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def test_descriptors_are_projected_from_the_place_and_its_surroundings():
    random = np.random.default_rng(0)
    layers = [
        random.normal(size=s).astype(np.float32) for s in ((3, 40, 56), (4, 20, 28), (5, 10, 14))
    ]
    bridged, layer2, layer3 = layers
    points = np.array([[0.0, 0.0], [50.3, 41.7], [223.0, 159.0], [130.0, 62.5]], np.float32)
    projection = Projection(3, 4, 5)
    projection.matrix = torch.from_numpy(random.normal(size=(7, 21)).astype(np.float32))
    maps = Maps(*map(torch.from_numpy, layers))
    found = projection(maps, torch.from_numpy(points))
    level, blocks = bridged, []
    for side in (4, 2, 2):
        level = means(level, side)
        blocks.append(level)
    blocks += [means(layer2, 8), means(layer3, 8)]
    for value, (x, y) in zip(found, points, strict=True):
        parts = [unit(spline_sample(bridged, (x + 0.5) / 4 - 0.5, (y + 0.5) / 4 - 0.5))]
        for block, stride in zip(blocks, (16, 32, 64, 64, 128), strict=True):
            parts.append(
                spline_sample(unit(block), (x + 0.5) / stride - 0.5, (y + 0.5) / stride - 0.5)
            )
        expected = projection.matrix.numpy() @ np.concatenate(parts)
        np.testing.assert_allclose(numpy(value), expected, atol=1e-4)
    torch.testing.assert_close(projection(maps, torch.from_numpy(points), length=2), found[:, :2])
    assert projection(maps, torch.zeros(0, 2)).shape == (0, 7)


def test_descriptors_change_little_where_the_cell_changes():
    maps = Maps(torch.rand(4, 20, 28), torch.rand(8, 10, 14), torch.rand(8, 5, 7))
    projection = Projection(4, 8, 8)
    torch.nn.init.normal_(projection.matrix)
    before, after = projection(maps, torch.tensor([[49.4999, 40.0], [49.5001, 40.0]]))
    torch.testing.assert_close(before, after, atol=1e-3, rtol=0)


def test_projection_starts_as_the_place_plus_its_surroundings():
    maps = Maps(torch.rand(6, 40, 56), torch.rand(8, 20, 28), torch.rand(9, 10, 14))
    points = torch.tensor([[30.0, 40.0]])
    near = F.normalize(sample_smooth(maps.bridged, points), dim=1)
    around = F.normalize(block_means(block_means(maps.bridged, 4), 2), dim=0)
    expected = near + sample_smooth(around, points, 32)
    fitted = Projection(6, 8, 9)
    torch.testing.assert_close(fitted(maps, points), expected)
    torch.nn.init.normal_(fitted.matrix)
    torch.testing.assert_close(fitted.unfitted()(maps, points), expected)


def test_no_points_give_no_samples():
    assert sample_smooth(torch.rand(3, 5, 7), torch.zeros(0, 2)).shape == (0, 3)
    assert sample(torch.rand(1, 3, 5, 7), torch.zeros(1, 0, 2)).shape == (1, 0, 3)


def test_conv_block_is_upsampling_convolution_group_norm_elu():
    block = randomize(ConvBlock(4, 64, factor=2))
    x = torch.randn(1, 4, 3, 5)
    y = convolve_slowly(upsample_slowly(numpy(x[0]), 2), numpy(block.conv.weight))
    groups = y.reshape(32, 2, 6, 10)
    mean = groups.mean(axis=(1, 2, 3), keepdims=True)
    variance = groups.var(axis=(1, 2, 3), keepdims=True)
    y = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(64, 6, 10)
    y = y * numpy(block.norm.weight)[:, None, None] + numpy(block.norm.bias)[:, None, None]
    y = np.where(y > 0, y, np.exp(y) - 1)
    np.testing.assert_allclose(numpy(block(x)[0]), y, atol=1e-4)


def test_backbone_fuses_three_side_maps_by_a_linear_1x1_convolution():
    """Eq. 1: what comes out is H_conv of the concatenated side maps."""
    backbone = randomize(F2RBackbone("resnet10", (32, 32), 32))
    sides = {}
    for name in ("side_0", "side_1", "side_2"):
        module = getattr(backbone, name)
        module.register_forward_hook(lambda m, i, o, name=name: sides.__setitem__(name, (i[0], o)))
    descriptors, encoded = backbone(torch.rand(1, 3, 64, 96))
    assert descriptors.shape == (1, 32, 16, 24)
    assert encoded.stem.shape == (1, 64, 16, 24)
    # sides read layer3 at 1/16, the decoders at 1/8 and at 1/4, and all leave at 1/4
    assert [sides[f"side_{i}"][0].shape[-1] for i in range(3)] == [6, 12, 24]
    stacked = np.concatenate([numpy(sides[f"side_{i}"][1][0]) for i in range(3)])
    weight = numpy(backbone.fuse.weight)[:, :, 0, 0]
    expected = np.einsum("oc,chw->ohw", weight, stacked) + numpy(backbone.fuse.bias)[:, None, None]
    np.testing.assert_allclose(numpy(descriptors[0]), expected, atol=1e-4)


def test_cross_norm_follows_equation_2():
    bridge = randomize(CrossNorm(5))
    with torch.no_grad():
        bridge.weights.copy_(torch.tensor([0.9, 0.3]))
    d = torch.randn(1, 5, 8, 9)
    y = numpy(d[0])
    mean = y.mean(axis=0)
    deviation = np.sqrt(y.var(axis=0) + 1e-5)
    scale, shift = (
        convolve_slowly(mean[None], numpy(conv.weight))[0] + numpy(conv.bias)[0]
        for conv in (bridge.spatial_scale, bridge.spatial_shift)
    )
    spatial = scale * (y - mean) / deviation + shift
    channel = instance_norm_slowly(y, numpy(bridge.channel_scale), numpy(bridge.channel_shift))
    expected = (0.9 * spatial + 0.3 * channel) / 1.2
    np.testing.assert_allclose(numpy(bridge(d)[0]), expected, atol=1e-5)


def test_cross_norm_starts_with_the_papers_weights():
    np.testing.assert_allclose(numpy(CrossNorm(8).weights), [0.7, 0.3], atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_peakiness_follows_equations_4_to_6(shift):
    maps = torch.randn(1, 6, 7, 8) + shift
    expected = peakiness_slowly(numpy(maps[0]))
    np.testing.assert_allclose(numpy(peakiness(maps)[0, 0]), expected, atol=1e-6)


def test_peakiness_is_largest_at_a_peak_and_ignores_scale():
    maps = torch.zeros(1, 3, 9, 9)
    maps[0, 1, 4, 5] = 2.0
    scores = peakiness(maps)
    assert scores[0, 0].flatten().argmax() == 4 * 9 + 5
    torch.testing.assert_close(peakiness(100 * maps), scores)


@pytest.mark.parametrize("kernel", [1, 3])
def test_detection_head_follows_equations_7_to_13_times_the_reliability(kernel):
    detector = randomize(Detector(2, 4, left=4, right=3, hidden=5, upsampled_kernel=kernel))
    bridged, stem = torch.randn(1, 2, 4, 5), torch.randn(1, 4, 4, 5)
    image = torch.randn(1, 3, 16, 20)

    def norm_i(y, norm, activation):
        y = instance_norm_slowly(y, numpy(norm.weight), numpy(norm.bias))
        return np.where(y > 0, y, numpy(activation.weight) * y)

    def conv_i(module, maps):
        y = convolve_slowly(maps, numpy(module.conv.weight))
        return norm_i(y, module.norm, module.activation)

    maps = np.concatenate([numpy(bridged[0]), numpy(stem[0])])
    s_l, s_r = peakiness_slowly(maps), peakiness_slowly(numpy(image[0]))
    h_l = conv_i(detector.layer0_left, s_l * maps)
    h_r = conv_i(detector.layer0_right, s_r * numpy(image[0]))
    h_1 = convolve_slowly(upsample_slowly(h_l, 4), numpy(detector.layer1_left.weight))
    h_1 += convolve_slowly(h_r, numpy(detector.layer1_right.weight))
    h_1 = norm_i(h_1, detector.layer1_norm, detector.layer1_activation)
    response = convolve_slowly(h_1, numpy(detector.layer2.weight))
    norm = detector.layer2_norm
    response = instance_norm_slowly(response, numpy(norm.weight), numpy(norm.bias))[0]
    weight, bias = numpy(detector.reliability.weight), numpy(detector.reliability.bias)
    s_l = s_l * np.exp(np.einsum("c,chw->hw", weight, unit(numpy(bridged[0]))) + bias)
    expected = upsample_slowly(s_l[None], 4)[0] * s_r * np.log1p(np.exp(response))
    actual = detector(image, bridged, stem)[0, 0]
    np.testing.assert_allclose(numpy(actual), expected, atol=1e-4)


def test_reliability_is_one_before_it_is_fitted_and_heeds_the_direction_alone():
    reliability = Reliability(6)
    bridged = torch.randn(2, 6, 4, 5)
    bridged[0, :, 1, 2] = 0
    assert torch.equal(reliability(bridged), torch.ones(2, 1, 4, 5))
    torch.nn.init.normal_(reliability.weight)
    reliability.bias.fill_(0.3)
    found = reliability(bridged)
    assert found.isfinite().all() and found.min() > 0 and found.std() > 0.1
    torch.testing.assert_close(reliability(7 * bridged), found)
    assert torch.equal(reliability.unfitted()(bridged), torch.ones(2, 1, 4, 5))


@pytest.mark.parametrize("axis", [-1, -2])
def test_flipped_maps_give_a_flipped_score_map(axis):
    """With mirror-symmetric kernels, exactly: upsampling has no preferred side."""
    detector = randomize(Detector(2, 4, left=4, right=3, hidden=5))
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(axis)) / 2)
    bridged, stem = torch.randn(1, 2, 4, 5), torch.randn(1, 4, 4, 5)
    image = torch.randn(1, 3, 16, 20)
    scores = detector(image, bridged, stem)
    flipped = detector(image.flip(axis), bridged.flip(axis), stem.flip(axis))
    torch.testing.assert_close(flipped.flip(axis), scores, rtol=1e-4, atol=1e-5)


def test_sampling_a_flipped_map_at_flipped_points_gives_the_same():
    maps = torch.rand(1, 3, 5, 6)
    points = torch.tensor([[[0.0, 0.0], [7.3, 3.0], [22.1, 18.6], [10.0, 11.0]]])
    mirrored = torch.stack([23 - points[..., 0], points[..., 1]], dim=-1)
    torch.testing.assert_close(sample(maps.flip(-1), mirrored), sample(maps, points))


def test_encoder_is_a_resnet_with_torchvision_keys():
    """Against a functional ResNet that reads the weights by torchvision's names."""
    encoder = ResNetEncoder("resnet18").eval()
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.rand(value.shape, generator=generator) * 0.1 + 0.01
        if value.is_floating_point()
        else value
        for key, value in encoder.state_dict().items()
    }
    encoder.load_torchvision({**state, "fc.weight": torch.zeros(1000, 512)})

    def norm(x, name):
        mean, variance, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias)

    def block(x, name, stride):
        y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = norm(y, f"{name}.bn1").relu()
        y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in state:
            x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
            x = norm(x, f"{name}.downsample.1")
        return (x + y).relu()

    image = torch.rand(1, 3, 64, 64)
    x = norm(F.conv2d(image, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    expected = [x]
    for layer, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        x = block(block(x, f"{layer}.0", stride), f"{layer}.1", 1)
        expected.append(x)
    with torch.no_grad():
        for actual, wanted in zip(encoder(image), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_encoder_weights_that_do_not_fit_are_named():
    state = ResNetEncoder("resnet18").state_dict()
    del state["layer2.1.conv2.weight"]
    with pytest.raises(ValueError, match=r"layer2\.1\.conv2\.weight.*missing"):
        ResNetEncoder("resnet18").load_torchvision(state)


def test_paper_size():
    model = SCFeat(CONFIGS["scfeat"])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 22e6 < count < 23e6
    assert model.config.descriptor_dim == 128
    assert model.backbone.encoder.channels == (256, 512, 1024)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_shapes(name):
    model = SCFeat(CONFIGS[name]).eval()
    dim = model.config.descriptor_dim
    with torch.inference_mode():
        output = model(torch.rand(2, 3, 48, 80))
    assert output.descriptors.shape == output.bridged.shape == (2, dim, 12, 20)
    assert output.scores.shape == (2, 1, 48, 80)
    assert (output.scores >= 0).all()


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return SCFeat(CONFIGS["scfeat-s"]).eval()


def test_weights_survive_the_file(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small_model, path, {"steps": 3, "note": "a test"})
    loaded = load_model(path)
    assert loaded.config == small_model.config
    assert not loaded.training
    assert read_metadata(path)["provenance"] == {"steps": 3, "note": "a test"}
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    for key, value in small_model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=1e-3, atol=1e-6)


def test_the_same_weights_are_the_same_file(small_model, tmp_path):
    path = tmp_path / "weights.safetensors"
    files = set()
    for _ in range(6):
        save_model(small_model, path, {"note": "für eine Prüfung"})
        files.add(path.read_bytes())
    assert len(files) == 1


def test_weights_beyond_fp16_leave_the_old_ones_alone(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("the old ones")
    small_model.backbone.encoder.bn1.running_var[0] = 1e5
    with pytest.raises(ModelError, match=r"'backbone.encoder.bn1.running_var' is not finite"):
        save_model(small_model, path, {})
    assert path.read_text() == "the old ones"


def test_weights_that_find_no_room_leave_the_old_ones_alone(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("the old ones")
    with files_up_to(20_000), pytest.raises(OSError, match="File too large"):
        save_model(small_model, path, {})
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_text() == "the old ones"


def test_file_with_descriptors_of_another_length(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    matrix = torch.rand(90, small_model.projection.matrix.shape[1])
    small_model.projection.matrix = matrix
    save_model(small_model, path, {})
    torch.testing.assert_close(load_model(path).projection.matrix, matrix, rtol=1e-3, atol=1e-3)
    rewrite(path, lambda t: t.update({"projection.matrix": matrix[:, 1:].contiguous()}))
    with pytest.raises(ModelError, match=r"'projection.matrix' has shape \(90, 639\).*\(90, 640\)"):
        load_model(path)


def rewrite(path, change_tensors=lambda t: None, change_config=lambda c: None, **config):
    """Alter a weights file in place."""
    tensors, metadata = load_file(path), read_metadata(path)
    change_tensors(tensors)
    change_config(metadata["config"])
    config = config.get("config", metadata["config"])
    header = {"format": "scfeat", "version": "0", "config": json.dumps(config)}
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change_tensors": lambda t: t.pop("bridge.weights")}, "'bridge.weights' is missing"),
        ({"change_tensors": lambda t: t.update(extra=torch.ones(1))}, "'extra' is not part of"),
        (
            {"change_config": lambda c: c.update(descriptor_dim=32)},
            r"'backbone.side_0.conv.weight' has shape .* needs \(32,",
        ),
        ({"change_config": lambda c: c.pop("encoder")}, "field 'encoder' is missing"),
        ({"change_config": lambda c: c.update(depth=3)}, "field 'depth' is unknown"),
        ({"config": 5}, "config is not a table of fields but 5"),
        ({"config": None}, "config is not a table of fields but None"),
        ({"change_config": lambda c: c.update(encoder="vgg")}, "unknown encoder 'vgg'"),
    ],
)
def test_file_that_does_not_fit_names_what_differs(small_model, tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_model(small_model, path, {})
    rewrite(path, **change)
    with pytest.raises(ModelError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_truncated_foreign_and_missing_files(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small_model, path, {})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="truncated"):
        load_model(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="not an SCFeat model"):
        load_model(path)
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "nothing.safetensors")
