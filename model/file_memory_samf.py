"""Give memory back to the system that a process holds without need: of files that it can read again, and of freed blocks."""

import contextlib
import ctypes
import mmap
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import constants

_MADV_PAGEOUT = 21
_MADV_POPULATE_READ = 22
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BLOCKS = 16  # of the largest size, as much as is kept free at the end of the memory
WHILE_LOADING = 1 << 20
AFTERWARDS = 1 << 23
_files: MutableMapping[int, mmap.mmap] = WeakValueDictionary()  # of the tensors that begin at these addresses


def release_memory() -> None:
    """Ask Linux to give back the memory of safetensors files that were read, which counts as this process's own.

    It reads a page again where it is still needed. Other systems, and kernels before 5.4, keep the pages for as long as
    nothing else needs the memory.
    """
    for start, end, file in _mapped_files():
        if file.endswith(".safetensors"):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def keep_freed_blocks(largest: int) -> None:
    """Let glibc keep freed blocks of memory for later up to a size, from now on, and give back what it keeps now.

    By itself it keeps blocks of up to 32 MB: the copies of weights that are rounded or arranged are many, and of many
    sizes, so that gigabytes are kept of a Phi-3-mini with 4-bit weights. `WHILE_LOADING` keeps none of them. Hidden states
    are in blocks that are needed again and again, and new memory costs more time than the products of a prompt: `AFTERWARDS`
    keeps them.

    Args:
        largest: bytes of the largest block that is kept.
    """
    if not sys.platform.startswith("linux"):
        return
    system = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library
        system.mallopt(_M_MMAP_THRESHOLD, largest)
        system.mallopt(_M_TRIM_THRESHOLD, _KEPT_BLOCKS * largest)
        system.malloc_trim(0)


def in_file(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose content is in a temporary file, of which `release_pages` frees the memory.

    A tensor that can't be copied, without Linux or without room on the disk, is returned as it is, and so is one that is in
    such a file already.
    """
    if not sys.platform.startswith("linux") or tensor.data_ptr() in _files:
        return tensor
    try:
        with _temporary_file() as file:
            # Written, not assigned to mapped memory: a full disk is an error then, not the end of the process.
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            # Shared: what is written to it goes to the file, so that its memory can be freed at any time.
            memory = mmap.mmap(file.fileno(), 0)
    except OSError:
        return tensor
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    _files[copy.data_ptr()] = memory
    return copy


def fetch_pages(tensor: torch.Tensor) -> None:
    """Bring all of a tensor that `in_file` returned into memory: at once is faster than page after page.

    Other tensors stay as they are, and so do all where the system can't (Linux before 5.14).
    """
    if (memory := _files.get(tensor.data_ptr())) is not None:
        with contextlib.suppress(OSError):
            memory.madvise(_MADV_POPULATE_READ)


def release_pages(tensor: torch.Tensor) -> None:
    """Free the memory of a tensor that `in_file` returned; what is needed of it again comes from the file.

    The system keeps the file's content as long as nothing else needs the memory. Other tensors stay as they are.
    """
    if (memory := _files.get(tensor.data_ptr())) is not None:
        memory.madvise(mmap.MADV_DONTNEED)


def _temporary_file() -> Any:
    """Open a temporary file next to the models: the system's folder for temporary files is often in memory."""
    folder = Path(constants.HF_HOME, "samf")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder, prefix="samf-")
    except OSError:
        return tempfile.TemporaryFile(prefix="samf-")


def _mapped_files() -> Iterator[tuple[int, int, str]]:
    """Yield start, end and file of this process's memory that is mapped from files; nothing without Linux."""
    if not sys.platform.startswith("linux"):
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, *_, inode, file = line.split(maxsplit=5) if line.count("/") else ("", "0", "")
        if inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end, file
