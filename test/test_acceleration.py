"""How the network runs, and that a backend that goes wrong is noticed."""

import logging
import platform

import numpy as np
import pytest
import torch

from scfeat_ros import acceleration
from scfeat_ros.errors import ScfeatError
from scfeat_ros.extractor import Extractor
from scfeat_ros.model import fused
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, fold_batch_norms, load_model
from scfeat_ros.native import library
from scfeat_ros.native.winograd import has_int16

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return SCFeat(CONFIGS["scfeat-s"]).eval()


@pytest.fixture
def image():
    return (255 * acceleration.check_image()[0].permute(1, 2, 0).numpy()).astype(np.uint8)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int16"])
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_every_way_finds_the_same_features(image, precision, compile):
    model = load_model("scfeat-s")
    plain = Extractor(model, "cpu", precision="fp32", compile="off", max_keypoints=100)
    assert str(plain.network) == "fp32, plain"
    extractor = Extractor(model, "cpu", precision=precision, compile=compile, max_keypoints=100)
    a, b = plain(image), extractor(image)
    distance = np.linalg.norm(a.keypoints[:, None] - b.keypoints[None], axis=2)
    near = distance.min(axis=1) < 0.5
    # bf16 in the plain network rounds the scores themselves
    assert near.mean() >= (
        0.97 if extractor.network.backend != "plain" or precision == "fp32" else 0.9
    )
    cosine = (a.descriptors * b.descriptors[distance.argmin(axis=1)]).sum(axis=1)[near]
    assert np.median(cosine) > 0.999
    assert (extractor.network.backend == "plain") == (compile == "off")
    if precision != "auto":
        runs = fused.cpu_computes(acceleration.DTYPES[precision])
        if precision == "int16":
            runs = compile == "auto" and has_int16()
        assert extractor.network.precision == (precision if runs else "fp32")


def test_a_precision_that_the_cpu_lacks_is_not_taken(model, monkeypatch, caplog):
    monkeypatch.setattr(acceleration, "cpu_computes", lambda dtype: dtype == torch.float32)
    assert acceleration.choose(model, CPU, "bf16", "auto").precision == "fp32"
    assert "bf16 was not taken: this CPU does not support it" in caplog.text


@pytest.mark.parametrize(("capability", "lacks"), [((7, 5), True), ((8, 7), False)])
def test_bfloat16_is_taken_on_gpus_that_have_it(capability, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda:0")
    assert (acceleration._unsupported(gpu, "bf16", True) is not None) == lacks
    assert acceleration._unsupported(gpu, "fp16", True) is None
    first = "fp16" if lacks else "bf16"
    assert acceleration._candidates(gpu, "auto", True) == [
        (first, True),
        ("fp32", True),
        (first, False),
    ]


@pytest.mark.parametrize(
    ("bfloat16", "int16", "expected"),
    [(True, True, "bf16"), (False, True, "int16"), (False, False, "fp32")],
)
def test_auto_takes_the_fastest_that_the_cpu_has(model, bfloat16, int16, expected, monkeypatch):
    if (bfloat16 and not acceleration.has_bfloat16(CPU)) or (int16 and not has_int16()):
        pytest.skip("not on this CPU")
    monkeypatch.setattr(acceleration, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(acceleration, "has_int16", lambda: int16)
    assert acceleration.choose(model, CPU, "auto", "auto").precision == expected
    plain = "bf16" if bfloat16 and platform.machine() == "x86_64" else "fp32"
    assert str(acceleration.choose(model, CPU, "auto", "off")) == f"{plain}, plain"


def test_integers_without_their_kernels_are_not_taken(model, monkeypatch, caplog):
    assert str(acceleration.choose(model, CPU, "int16", "off")) == "fp32, plain"
    assert "int16 was not taken: only the fast network on a CPU" in caplog.text
    monkeypatch.setattr(acceleration, "has_int16", lambda: False)
    assert acceleration.choose(model, CPU, "int16", "auto").precision == "fp32"
    assert "int16 was not taken: there are no kernels for this CPU" in caplog.text


def test_without_onednn_the_fast_network_runs_all_the_same(model, monkeypatch):
    monkeypatch.setattr(fused, "_ONEDNN", None)
    network = acceleration.choose(model, CPU, "fp32", "auto")
    assert (network.precision, network.backend) == ("fp32", acceleration.COMPILED)


@torch.inference_mode()
def test_plain_fp32_is_the_reference(model):
    network = acceleration.choose(model, CPU, "fp32", "off")
    image = acceleration.check_image()
    found, folded = network.run(image), fold_batch_norms(model)(image)
    for a, b, expected in zip(found, folded, model(image), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, atol=1e-4, rtol=1e-4)


def test_a_way_that_finds_other_features_is_not_taken(model, monkeypatch, caplog):
    right = fused.FusedSCFeat._describe

    def wrong(self, stem):
        descriptors, *encoded = right(self, stem)
        return descriptors.roll(3, dims=3), *encoded  # a decoder that is off by some cells

    monkeypatch.setattr(fused.FusedSCFeat, "_describe", wrong)
    network = acceleration.choose(model, CPU, "fp32", "auto")
    assert str(network) == "fp32, plain"
    assert "was not taken" in caplog.text


def test_a_way_that_does_not_run_is_not_taken(model, monkeypatch, caplog):
    def fail(self, image):
        raise RuntimeError("not implemented for 'Half'\nmore")

    monkeypatch.setattr(fused.FusedSCFeat, "_forward", fail)
    network = acceleration.choose(model, CPU, "auto", "auto")
    assert network.backend == "plain"
    assert "it does not run here (not implemented for 'Half')" in caplog.text


def test_without_a_compiler(model, monkeypatch, caplog):
    def fail():
        raise library.CompilerError("no C++ compiler was found")

    monkeypatch.setattr(library, "load", fail)
    caplog.set_level(logging.WARNING)
    assert acceleration.choose(model, CPU, "fp32", "auto").backend == "plain"
    assert "no C++ compiler was found" in caplog.text
    with pytest.raises(ScfeatError, match="compile 'on': no C"):
        acceleration.choose(model, CPU, "fp32", "on")


def test_a_change_of_precision_takes_effect(model):
    extractor = Extractor(model, "cpu", precision="fp32", compile="off")
    extractor.set_options(compile="auto")
    assert extractor.network.backend != "plain"
