"""Compiles the Triton kernels of a frame for an NVIDIA GPU, also on a machine without one.

python compile_triton.py CAPABILITY (90: H100, H200; 87: Jetson Orin), without TRITON_INTERPRET.
Prints a line for each form of a kernel.
"""

import sys

import torch
from test_cuda_graphs import cudnn_conv2d, fused_on_meta
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from scfeat_ros.extractor import _Finder, l2_normalize
from scfeat_ros.model import triton_kernels
from scfeat_ros.model.scfeat import CONFIGS, SCFeat
from scfeat_ros.parameters import ExtractorOptions

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    int: "i32",
    float: "fp32",
}


def source_of(kernel, values):
    """A kernel with the types of its arguments; of numbers, 1 is compiled in, as at a launch."""
    types, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
        fixed = kind is int and not kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or (fixed and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = TYPES[kind]
        if isinstance(value, torch.Tensor) or (fixed and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, attributes)


def sources():
    """The kernels that the shipped networks launch for a frame, once in each of their forms."""
    found = {}

    def note(kernel, *args, grid, warmup, **constants):
        source = source_of(kernel, dict(zip(kernel.arg_names, args, strict=False)) | constants)
        found[source.hash()] = source

    JITFunction.run = note
    torch.nn.functional.conv2d = cudnn_conv2d
    image = torch.empty(1, 480, 640, 3, dtype=torch.uint8, device="meta").permute(0, 3, 1, 2)
    mask = torch.empty(480, 640, dtype=torch.bool, device="meta")
    for config in CONFIGS.values():
        model = SCFeat(config).eval()
        output = fused_on_meta(model, triton=True)(image)
        maps = output.bridged[0], output.layer2[0], output.layer3[0]
        for options, given in (
            (ExtractorOptions(), None),
            (ExtractorOptions(nms_radius=0, subpixel=False), mask),
        ):
            find = _Finder(
                options,
                model.projection.to("meta"),
                *(triton_kernels.select, triton_kernels.describe, l2_normalize),
            )
            find(output.scores[0, 0], image[0], *maps, given)
    return found.values()


def main(capability):
    for source in sources():
        compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
        constants = {source.fn.arg_names[place[0]]: v for place, v in source.constants.items()}
        print(f"{source.fn.__name__} {constants}: {len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]))
