"""The processes of a training, called ranks, and the machine that each of them runs on."""

import ctypes
import os

import torch
import torch.distributed as dist
from torch import nn

from common.cli import UserError

# Read when it is used, so that a test can set it.
ON_GPU = torch.cuda.is_available()


# ---- ranks ---------------------------------------------------------------------------------------
def setup_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device). A process group only under torchrun: NCCL on GPUs, else gloo.

    Raises UserError if something else has started several processes, each of which would train.
    """
    if "RANK" in os.environ:
        try:
            if ON_GPU:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            store, rank, world_size = next(dist.rendezvous("env://"))
        except (KeyError, ValueError) as error:
            raise UserError(f"RANK is set, but torchrun has not started this process: {error}; "
                            "unset RANK, or start with torchrun") from None
        # torchrun keeps one store over its restarts. Without a prefix of its own, a restarted run
        # would read the addresses of ranks that have died, and hang. (Each node counts its own
        # restarts: see docs/speed.md for several nodes.)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=rank,
                                world_size=world_size)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("srun has started several tasks, and each would train alone: let it start "
                        "torchrun, once on each node (see docs/speed.md)")
    return *rank_and_world_size(), torch.device("cuda" if ON_GPU else "cpu")


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier():
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_object(value) -> list:
    """The `value` of every rank, on every rank."""
    _, world_size = rank_and_world_size()
    values = [value] * world_size
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def mean_over_ranks(*values) -> list[float]:
    """The mean of each value over the ranks. All of them leave the GPU in one transfer. The first
    is a tensor, on the device where the means are computed."""
    _, world_size = rank_and_world_size()
    means = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=values[0].device)
                         for value in values]) / world_size
    if dist.is_initialized():
        dist.all_reduce(means)
    return means.tolist()


def data_parallel(model: nn.Module) -> nn.Module:
    """The model as DistributedDataParallel, which averages gradients over ranks; the model itself
    without torchrun."""
    if not dist.is_initialized():
        return model
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # The buffers are constants, so there is nothing to broadcast before each forward pass. The
    # argument for this has another name since torch 2.14, the attribute has not.
    parallel.broadcast_buffers = False
    return parallel


# ---- the machine ---------------------------------------------------------------------------------
def usable_cores() -> int:
    """The CPU cores that this process may run on. (A container's CPU quota is not looked at.)"""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_to_spare() -> int:
    """This rank's share of the usable cores, less one for the training itself; 1 to 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, usable_cores() // ranks_here - 1))


def has_fast_bf16() -> bool:
    """GPUs since Ampere, CPUs with AVX512-BF16. Others emulate bf16, slower than fp32."""
    if ON_GPU:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A private function, but PyTorch has no other query.
    return torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory():
    """Lets glibc keep the memory that a step frees. By default it returns large blocks to the
    system, which zeroes them again for the next step: a tenth of a step on a CPU."""
    libc = ctypes.CDLL(None)
    # Other C libraries, such as that of macOS, have none.
    if hasattr(libc, "mallopt"):
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, each at the largest value it takes.
        libc.mallopt(-1, 2 ** 31 - 1)
        libc.mallopt(-3, 1 << 25)
