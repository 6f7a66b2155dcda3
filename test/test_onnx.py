"""Exported networks against PyTorch."""

import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

from scfeat_ros import acceleration, cli
from scfeat_ros.errors import ModelError, OutputExistsError, ScfeatError
from scfeat_ros.extractor import Extractor
from scfeat_ros.model.scfeat import load_model
from scfeat_ros.onnx_export import OnnxSCFeat, export_onnx


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    assert cli.main(["export", "--onnx", str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["network.onnx"]
    return path


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 3, 48, 160), (2, 3, 32, 32)])
@torch.inference_mode()
def test_onnxruntime_agrees_at_any_size(file, shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(OnnxSCFeat(file)(image), load_model("scfeat-s")(image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_extractor_runs_the_file(file):
    image = acceleration.check_image()[0, :, :, :150].permute(1, 2, 0)
    image = (255 * image).numpy().astype(np.uint8)
    exported = Extractor.from_pretrained(file, "cpu", max_keypoints=200)
    plain = Extractor.from_pretrained(
        "scfeat-s", "cpu", precision="fp32", compile="off", max_keypoints=200
    )
    assert str(exported.network) == "fp32, onnxruntime"
    assert exported.descriptor_dim == plain.descriptor_dim
    a, b = exported(image), plain(image)
    np.testing.assert_allclose(a.keypoints, b.keypoints, atol=1e-2)
    np.testing.assert_allclose(a.descriptors, b.descriptors, atol=1e-3)
    copied = pickle.loads(pickle.dumps(exported))
    np.testing.assert_array_equal(copied(image).keypoints, a.keypoints)


def test_half_precision_file(tmp_path):
    import onnx

    path = export_onnx("scfeat-s", tmp_path / "half.onnx", "fp16")
    graph = onnx.load(path).graph
    half = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(half) > 15
    image = acceleration.check_image()
    network, model = OnnxSCFeat(path), load_model("scfeat-s")
    assert network.precision == "fp16"
    assert acceleration.check(network, model, torch.device("cpu")) is None
    error = network(image).descriptors - model(image).descriptors
    assert 0 < error.abs().max() < 0.05


def test_a_pytorch_that_lacks_fp16_is_named(tmp_path, monkeypatch):
    def half(*_):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", half)  # as PyTorch 2.1's
    with pytest.raises(ScfeatError, match=r"PyTorch .* cannot write .* fp16 .*'Half'.*newer"):
        export_onnx("scfeat-s", tmp_path / "half.onnx", "fp16")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(file, tmp_path, capsys):
    with pytest.raises(OutputExistsError, match="exists"):
        export_onnx("scfeat-s", file)
    with pytest.raises(ValueError, match=r"end in \.onnx"):
        export_onnx("scfeat-s", tmp_path / "network.pt")
    with pytest.raises(ValueError, match="fp32 or fp16, not 'bf16'"):
        export_onnx("scfeat-s", tmp_path / "network.onnx", "bf16")
    with pytest.raises(ModelError, match="no such file"):
        Extractor.from_pretrained(tmp_path / "missing.onnx", "cpu")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot read it"):
        Extractor.from_pretrained(damaged, "cpu")
    import onnx

    network = onnx.load(file)
    metadata = {p.key: p.value for p in network.metadata_props}
    newer = metadata | {"config": json.dumps(json.loads(metadata["config"]) | {"eyes": 3})}
    older = {key: value for key, value in metadata.items() if key != "projection"}
    for changed, message in ((older, "export it again"), (newer, "'eyes' is unknown .* newer")):
        onnx.helper.set_model_props(network, changed)
        onnx.save(network, tmp_path / "other.onnx")
        with pytest.raises(ModelError, match=message):
            Extractor.from_pretrained(tmp_path / "other.onnx", "cpu")
    assert cli.main(["export"]) == 1
    assert "--onnx FILE" in capsys.readouterr().err
