"""Memory on pages of 2 MB, for processes that read gigabytes of weights again and again."""

import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_large_pages() -> None:
    """Start this process anew with glibc's memory on pages of 2 MB, unless it is so already or the system has none.

    A token of a language model reads all weights once; on pages of 4 KB much of that time goes into looking up where the
    pages are, and of the time of loading into getting them one by one. glibc (2.35 and later) reads its setting before a
    program's first instruction, and so the program has to start again: call this before anything has been done. Another
    program than `samf`, or one that has imported torch, is not restarted.
    """
    is_command = Path(sys.argv[0]).stem == "samf" and "torch" not in sys.modules and sys.executable
    if not is_command or not ask_for_large_pages(os.environ):
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def ask_for_large_pages(environment: MutableMapping[str, str]) -> bool:
    """Let glibc take its memory in pages of 2 MB in processes that start with an environment.

    Args:
        environment: a setting that is there is kept.

    Returns:
        Whether the environment was changed.
    """
    tunables = environment.get(_VARIABLE, "")
    if _TUNABLE in tunables or not _has_large_pages():
        return False
    environment[_VARIABLE] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
    return True


def _has_large_pages() -> bool:
    """Return whether glibc can ask the system for pages of 2 MB."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    try:
        return "[never]" not in _ENABLED.read_text(encoding="ascii")
    except OSError:  # a kernel without them
        return False
