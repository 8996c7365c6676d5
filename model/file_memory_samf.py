"""Give memory back to the system that a process holds without need: of files that it can read again, and of freed blocks."""

import contextlib
import ctypes
import mmap
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_MADV_PAGEOUT = 21
_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20  # bytes: hidden states of a prompt are a few million


def release_memory() -> None:
    """Ask Linux to give back the memory of safetensors files that were read, which counts as this process's own.

    It reads a page again where it is still needed. Other systems, and kernels before 5.4, keep the pages for as long as
    nothing else needs the memory.
    """
    for start, end, file in _mapped_files():
        if file.endswith(".safetensors"):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def keep_no_freed_blocks() -> None:
    """Let glibc give large blocks back to the system as soon as they are freed, from now on, and those that it keeps.

    It keeps blocks of up to 32 MB for later: the copies of weights that are rounded or arranged, and of a prompt's hidden
    states, are many, and of many sizes, so that without this gigabytes are kept of a Phi-3-mini with 4-bit weights.
    """
    if not sys.platform.startswith("linux"):
        return
    system = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library
        system.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        system.malloc_trim(0)


def in_file(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose content is in a file: a copy in a temporary one, or the tensor itself where it is in one already.

    A tensor that can't be copied, without Linux or without room on the disk, is returned as it is.
    """
    if not sys.platform.startswith("linux") or _is_in_file(tensor):
        return tensor
    try:
        with tempfile.NamedTemporaryFile(prefix="samf-") as file:
            # Written, not assigned to mapped memory: a full disk is an error then, not the end of the process.
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return tensor
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _is_in_file(tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    return any(start <= address < end for start, end, _ in _mapped_files())


def _mapped_files() -> Iterator[tuple[int, int, str]]:
    """Yield start, end and file of this process's memory that is mapped from files; nothing without Linux."""
    if not sys.platform.startswith("linux"):
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, *_, inode, file = line.split(maxsplit=5) if line.count("/") else ("", "0", "")
        if inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end, file
