"""Tests of processes that restart with large pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samf.utils import large_pages

PROGRAM = """
import os, sys
from samf.utils.large_pages import restart_with_large_pages
{before}
sys.stdout.write("started ")
restart_with_large_pages()
block = bytearray(64 << 20)
flags = [line for line in open("/proc/self/smaps", encoding="utf-8") if line.startswith("VmFlags")]
sys.stdout.write(f"{{os.environ.get('GLIBC_TUNABLES')}} {{any(' hg' in line for line in flags)}} {{sys.argv[1:]}}")
"""
needs_large_pages = pytest.mark.skipif(
    not large_pages._has_large_pages(), reason="needs glibc, and a kernel with transparent huge pages"
)


def run(before: str = "", program: str = "samf", **variables: str) -> str:
    """Return the output of a program that restarts itself, without torch, as the `samf` command."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | variables
    code = f"import sys; sys.argv[0] = {program!r}\n" + PROGRAM.format(before=before)
    command = [sys.executable, "-c", code, "a scan.nii.gz", "--quantize"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@needs_large_pages
@pytest.mark.parametrize(
    ("given", "tunables"), [({}, ""), ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0:")]
)
def test_a_process_restarts_once_with_its_arguments_and_its_memory_asks_for_large_pages(
    given: dict[str, str], tunables: str
):
    arguments = ["a scan.nii.gz", "--quantize"]
    assert run(**given) == f"started started {tunables}glibc.malloc.hugetlb=1 True {arguments}"


@needs_large_pages
def test_a_setting_of_the_user_stays():
    assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0").startswith("started glibc.malloc.hugetlb=0 False")


def test_a_process_with_torch_and_another_program_go_on():
    assert run(before="sys.modules['torch'] = sys").startswith("started None")
    assert run(program="dask-worker").startswith("started None")


@pytest.mark.parametrize("state", ["always madvise [never]\n", None])
def test_systems_without_large_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str | None):
    file = tmp_path / "enabled"
    if state is not None:
        file.write_text(state)
    monkeypatch.setattr(large_pages, "_ENABLED", file)
    assert not large_pages._has_large_pages()
