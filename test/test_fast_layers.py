"""The layers of CPU training against PyTorch's own in fp32."""

import copy

import pytest
import torch
from torch import nn

from scfeat_ros.model.sampling import convolve_upsampled
from scfeat_training.fast_layers import accelerate, bfloat16_conv2d


def gradients(conv, x, weight_of_output):
    x = x.clone().requires_grad_()
    y = conv(x)
    (y * weight_of_output).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in conv.parameters())


@pytest.mark.parametrize("own_backward", [True, False])
@pytest.mark.parametrize(("kernel", "padding", "bias"), [(3, 1, False), (1, 0, True), (5, 1, True)])
def test_gradients_agree_with_fp32(kernel, padding, bias, own_backward):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 16, kernel, padding=padding, bias=bias)
    fast = copy.deepcopy(conv)
    assert accelerate(fast, own_backward) == 1
    x = torch.randn(2, 24, 12, 10)
    weight_of_output = torch.randn_like(conv(x))
    for exact, found in zip(
        gradients(conv, x, weight_of_output), gradients(fast, x, weight_of_output), strict=True
    ):
        assert found.dtype == torch.float32
        # bf16 has 8 bits of mantissa: a relative error of some 0.4 % per factor
        assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(("kernel", "bias"), [(3, False), (5, True)])
def test_convolution_at_the_size_before_upsampling(kernel, bias, factor):
    torch.manual_seed(2)
    conv = nn.Conv2d(24, 16, kernel, padding=kernel // 2, bias=bias)
    fast = copy.deepcopy(conv)
    accelerate(fast)
    x = torch.randn(2, 24, 5, 7)
    weight_of_output = torch.randn(2, 16, 5 * factor, 7 * factor)

    def found_by(conv):
        # as a module of its own, so that `gradients` finds the parameters
        module = nn.Sequential(conv)
        module.forward = lambda x: convolve_upsampled(conv, x, factor)
        return gradients(module, x, weight_of_output)

    for exact, found in zip(found_by(conv), found_by(fast), strict=True):
        assert found.dtype == torch.float32 and found.shape == exact.shape
        assert (found - exact).norm() < 0.01 * exact.norm()
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()  # at the border, too


def test_prelu_with_a_single_parameter():
    torch.manual_seed(3)
    prelu = nn.PReLU(init=0.3)
    fast = copy.deepcopy(prelu)
    assert accelerate(fast) == 1
    x = torch.randn(2, 5, 6, 7)
    weight_of_output = torch.randn_like(x)
    for exact, found in zip(
        gradients(prelu, x, weight_of_output), gradients(fast, x, weight_of_output), strict=True
    ):
        torch.testing.assert_close(found, exact)


def test_functional_form_matches_module():
    torch.manual_seed(1)
    x, weight = torch.randn(1, 16, 6, 7), torch.randn(16, 16, 3, 3)
    exact = nn.functional.conv2d(x, weight, padding=1)
    assert (bfloat16_conv2d(x, weight, padding=1) - exact).norm() < 0.01 * exact.norm()


def test_accelerate_leaves_parameters_and_unsuited_layers_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=2),  # too few channels
        nn.Conv2d(32, 32, 3, groups=32),  # grouped
        nn.Conv2d(32, 32, 3, stride=2),  # a stride: only with the library's backward
        nn.Conv2d(32, 32, 3, padding=1),
        nn.PReLU(32),  # a parameter for each channel
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert accelerate(copy.deepcopy(model), own_backward=True) == 1
    assert accelerate(model, own_backward=False) == 2
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
