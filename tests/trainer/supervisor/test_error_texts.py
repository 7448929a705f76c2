"""What CUDA, NCCL and the libraries on top of them say of a failure, in their own words, and the
reason that it stands for. No GPU said these things here; the texts are those of their sources and
of published reports."""

from __future__ import annotations

import pytest

from finetune_api.reasons import cause
from finetune_trainer.errors import run_error_from
from finetune_trainer.supervisor.exit_reason import RankEnd, root_cause

_CREATE = "CUDA error: {} when calling `cublasCreate(handle)`"
_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {} (run with NCCL_DEBUG=INFO for details), "
    "NCCL version 2.29.7\n{}\nLast error:\n{}"
)
_COUNT = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error {}"
)


def _of_nccl(last: str, kind: str = "ncclSystemError: System call (e.g. socket, malloc) or external library call "
             "failed or device error.") -> str:  # fmt: skip
    return _NCCL.format("unhandled system error", kind, last)


def _of_cuda_in_nccl(last: str) -> str:
    return _NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed.", last)


_MEMORY = {
    "PyTorch": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA": "CUDA error: out of memory",
    "CUDA's driver": "CUDA driver error: out of memory",
    "cuBLAS": _CREATE.format("CUBLAS_STATUS_ALLOC_FAILED"),
    "cuBLAS cannot start": _CREATE.format("CUBLAS_STATUS_NOT_INITIALIZED"),
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN cannot start": "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuSOLVER": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "NCCL": _of_cuda_in_nccl("Cuda failure 2 'out of memory'"),
    "Triton": "Triton Error [CUDA]: out of memory",
    "bitsandbytes": "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp",
    "C++": "std::bad_alloc",
    "C++, ended": "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
    "Rust": "memory allocation of 17179869184 bytes failed",
    "NumPy": "Unable to allocate 3.00 GiB for an array with shape (805306368,) and data type float32",
    "mmap": "unable to mmap 9663676416 bytes from file </scratch/model/model.safetensors>: Cannot allocate memory (12)",
}
_FAULT = {
    "ECC": "CUDA error: uncorrectable ECC error encountered",
    "ECC through NCCL": _of_cuda_in_nccl("Cuda failure 214 'uncorrectable ECC error encountered'"),
    "NVLink": "CUDA error: uncorrectable NVLink error detected during the execution",
    "contained": "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "stack": "CUDA error: hardware stack error",
    "lost": "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system",
    "kernel log": "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.",
}
_UNAVAILABLE = {
    "no kernels": "CUDA error: no kernel image is available for execution on the device",
    "no kernels of Triton": "Triton Error [CUDA]: device kernel image is invalid",
    "old driver for a program": "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    "old driver": "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
    "no driver": "Found no NVIDIA driver on your system.",
    "Fabric Manager": _COUNT.format("802: system not yet initialized"),
    "libraries of another driver": _COUNT.format(
        "803: system has unsupported display driver / cuda driver combination"
    ),
    "compatibility package": _COUNT.format("804: forward compatibility was attempted on non supported HW"),
    "unknown at the start": "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing "
    "env variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.",
    "unknown": "CUDA error: unknown error",
    "unknown through NCCL": _of_cuda_in_nccl("Cuda failure 999 'unknown error'"),
    "ordinal": "CUDA error: invalid device ordinal",
    "initialization": "CUDA error: initialization error",
    "busy": "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "busy, older words": "CUDA error: all CUDA-capable devices are busy or unavailable",
    "one GPU twice": _NCCL.format(
        "invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000",
    ),
}  # fmt: skip
_PROGRAM = {
    "address": "CUDA error: an illegal memory access was encountered",
    "assertion": "CUDA error: device-side assert triggered",
    "launch": "CUDA error: unspecified launch failure",
    "alignment": "CUDA error: misaligned address",
    "address through NCCL": _of_cuda_in_nccl("Cuda failure 700 'an illegal memory access was encountered'"),
    "NCCL's watchdog": "[PG ID 0 PG GUID 0(default_pg) Rank 0] Process group watchdog thread terminated with "
    "exception: CUDA error: an illegal memory access was encountered\n[E ProcessGroupNCCL.cpp] HeartbeatMonitor",
    "a peer's connection": "CUDA error: device-side assert triggered\nConnection closed by peer",
    "Triton's shared memory": "out of resource: shared memory, Required: 180224, Hardware limit: 101376. Reducing "
    "block sizes or `num_stages` may help.",
    "cuDNN": "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
}
_PEER = {
    "socket": _of_nccl("socketProgress: Connection closed by remote peer 10.0.0.3<41312>"),
    "InfiniBand": _NCCL.format(
        "remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NET/IB: Got completion from peer 10.0.0.3<41312> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=0 vendor err 129",
    ),
    "timeout": "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran for "
    "3600011 milliseconds before timing out.",
    "no interface": _of_nccl("Bootstrap : no socket interface found"),
    "a log that names shared memory": "NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct /dev/shm/nccl-x\nConnection "
    "reset by peer",
}
_LIMIT = {
    "shared memory of NCCL": _of_nccl(
        "Error while creating shared memory segment /dev/shm/nccl-DDR9Xo (size 33030528), error: No space left on "
        "device (28)"
    ),
    "shared memory of PyTorch": "unable to write to file </torch_123_1>: No space left on device (28)",
    "locked memory": _of_nccl("Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory"),
    "locked memory of queues": _of_nccl("Call to ibv_create_qp failed with error Cannot allocate memory errno 12"),
}
_TABLE = {
    f"{reason}: {name}": (reason, text)
    for reason, texts in (
        ("OutOfMemory", _MEMORY), ("GpuFault", _FAULT), ("GpuUnavailable", _UNAVAILABLE), ("TrainingError", _PROGRAM),
        ("PeerLost", _PEER), ("InvalidConfig", _LIMIT),
    )
    for name, text in texts.items()
}  # fmt: skip


@pytest.mark.parametrize(("reason", "text"), _TABLE.values(), ids=_TABLE)
def test_an_error_and_a_log_are_reported_with_the_reason_that_their_text_stands_for(reason: str, text: str) -> None:
    assert run_error_from(RuntimeError(text)).reason == reason
    assert root_cause((RankEnd(2, 1, None, f"earlier lines\nRuntimeError: {text}\n"),), 0).reason == reason
    assert root_cause((RankEnd(2, -6, None, text),), 0).reason == reason


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        pytest.param(RuntimeError(_LIMIT["shared memory of NCCL"]), "resources.sharedMemory: ", id="shared memory"),
        pytest.param(OSError(28, "No space left on device", "/dev/shm/x"), "resources.sharedMemory: ", id="its file"),
        pytest.param(OSError(28, "No space left on device", "/scratch/x"), "raise resources.scratch", id="disk"),
        pytest.param(OSError(122, "Disk quota exceeded"), "raise resources.scratch", id="quota"),
        pytest.param(RuntimeError(_LIMIT["locked memory"]), "pod.network: .* IPC_LOCK", id="locked memory"),
        pytest.param(RuntimeError(_UNAVAILABLE["no kernels"]), "pod.nodeSelector", id="no kernels"),
        pytest.param(RuntimeError(_UNAVAILABLE["Fabric Manager"]), "Fabric Manager", id="Fabric Manager"),
    ],
)  # fmt: skip
def test_the_message_has_the_field_and_the_remedy(error: Exception, remedy: str) -> None:
    with pytest.raises(Exception, match=remedy):
        raise run_error_from(error)
    logged = RankEnd(0, 1, None, f"{type(error).__name__}: {error}")
    with pytest.raises(Exception, match=remedy):
        raise root_cause((logged,), 0)


def test_what_a_person_must_change_costs_no_restart() -> None:
    assert cause(run_error_from(RuntimeError(_LIMIT["locked memory"])).reason) == "user"
    assert cause(run_error_from(OSError(12, "Cannot allocate memory")).reason) == "memory"
