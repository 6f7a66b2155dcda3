"""Memory that runs out, and memory that is given back."""

import pytest
import torch

from scfeat_ros.memory import free_memory, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":838'),
    ],
)
def test_what_libraries_say_when_memory_runs_out(error):
    assert is_out_of_memory(error)


def test_other_errors_are_none_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_memory_is_given_back_as_far_as_a_failed_gpu_lets_it(monkeypatch):
    def empty_cache():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    free_memory()
