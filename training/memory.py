"""Peak memory of this process."""

import resource
import sys

import torch


def peak_resident() -> int:
    """Return the most bytes of main memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that this process has held so far on its GPU, or in main memory without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
