"""Decoding of compressed DICOM frames in processes of their own.

SimpleITK (GDCM) decodes JPEG, JPEG-LS, JPEG 2000, HTJ2K and RLE: damaged streams can crash, hang or flood a decoder, and here
each of these becomes an error. Where imagecodecs is installed, it decodes lossless JPEG-LS, JPEG 2000, HTJ2K and RLE, which is
faster; what it refuses is left to GDCM.

A process imports NumPy and a decoder for as long as it then decodes a few frames. It therefore starts before its frames are
written, and without Python's `site`, whose time depends on what else is installed.
"""

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from .ct_common import EXPORT_AGAIN, CTReadError
from .ct_threads import thread_count

FREE_SPACE = "Free space there or set $TMPDIR."
LEAST_FRAMES = 8  # per process: starting one takes as long as decoding about as many
_SECONDS_PER_PROCESS, _SECONDS_PER_FRAME = 15, 5  # half a second and a tenth are usual
# Each thread's stack would count against the process's memory limit.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
_NO_SIMPLEITK, _DISK_FULL, _OLD_SIMPLEITK = 3, 4, 5  # exit codes of the script
_PACKAGES = ("numpy", "imagecodecs", "SimpleITK")  # all that a process imports
# Each frame is a file of its own, whose name comes through standard input; the output of one that cannot be decoded is
# missing afterwards. The process ends with its parent, even one that is killed or that ignores SIGTERM, and in any case after
# its seconds of CPU time.
_DECODE_SCRIPT = """
import os, signal, sys
parent, seconds, *folders = sys.argv[1:]
sys.path += folders
signal.signal(signal.SIGTERM, signal.SIG_DFL)
for name, limit in ("RLIMIT_AS", 4 << 30), ("RLIMIT_CPU", int(seconds)):
    try:
        import resource
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (ImportError, AttributeError, ValueError, OSError):
        pass
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, only on Linux
    if os.getppid() != int(parent):
        sys.exit(1)
except (ImportError, AttributeError, TypeError, OSError):
    pass
import numpy
try:
    import imagecodecs
except ImportError:
    imagecodecs = None

size = int.from_bytes(sys.stdin.buffer.read(8), "little")
names = os.fsdecode(sys.stdin.buffer.read(size)).split("\\0") if size else []

def planes(frame, pixels):
    starts = [int.from_bytes(frame[4 * k : 4 * k + 4], "little") for k in range(1, 1 + frame[0])] + [len(frame)]
    bytes_of = [imagecodecs.packbits_decode(frame[a:b]) for a, b in zip(starts, starts[1:])]
    image = numpy.empty((pixels, len(starts) - 1), dtype="u1")
    for k, plane in enumerate(reversed(bytes_of)):
        if not pixels <= len(plane) <= pixels + 1:
            raise ValueError
        image[:, k] = numpy.frombuffer(plane, "u1", pixels)
    return image.view(f"<u{len(bytes_of)}")

def decode(name):
    *_, pixels, _, way, kind = name.split(".")
    if way != "plain" or imagecodecs is None:
        return None
    with open(name, "rb") as stream:
        data = stream.read()
    start = data.index(bytes.fromhex("e07f1000 4f420000 ffffffff")) + 12
    start += 8 + int.from_bytes(data[start + 4 : start + 8], "little")  # the table of offsets
    frame = data[start + 8 : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")]
    try:
        if kind == "rle":
            return planes(frame, int(pixels))
        codec = {"jls": "jpegls_decode", "j2k": "jpeg2k_decode", "htj2k": "htj2k_decode"}[kind]
        return getattr(imagecodecs, codec)(frame)
    except Exception:  # of a damaged codestream, whatever a codec raises: the other reader tries it
        return None

def open_reader():
    try:
        import SimpleITK
    except ImportError:
        sys.exit(3)
    version = SimpleITK.Version.MajorVersion(), SimpleITK.Version.MinorVersion()
    if version < (2, 5) and any(name.endswith(".htj2k") for name in names):
        sys.exit(5)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    return reader, SimpleITK.GetArrayFromImage

opened = None
for name in names:
    array = decode(name)
    if array is None:
        reader, array_of = opened = opened or open_reader()
        reader.SetFileName(name)
        array = array_of(reader.Execute())
    if array.dtype.kind in "iu":
        array = array.astype(name.split(".")[-3], copy=False)
    try:
        numpy.save(name + ".npy", array)
    except OSError:
        sys.exit(4)
"""


class Decoders:
    """Processes that decode files of single frames, and are started before these files are written.

    Use it as a context manager, which starts the processes; those that still run at its end, as after an error, are killed.

    Args:
        frames: how many frames there will be, at most.
        first: the file that errors name.
    """

    def __init__(self, frames: int, first: Path):
        self.count = max(min(thread_count(), frames // LEAST_FRAMES), 1)
        self._frames, self._first = frames, first
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Decoders":
        limits = [str(os.getpid()), str(math.ceil(_seconds(math.ceil(self._frames / self.count))))]
        command = [sys.executable or "python3", "-S", "-P", "-c", _DECODE_SCRIPT, *limits, *_package_folders()]
        environment, none = {**os.environ, **_ONE_THREAD}, subprocess.DEVNULL
        try:
            for _ in range(self.count):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=none, stderr=none, env=environment)
                self._processes.append(process)
        except OSError:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def decode(self, names: Sequence[str]) -> None:
        """Decode files on all processes. Each process stops at a damaged frame, and other processes take other frames.

        Args:
            names: paths of single compressed frames; the voxels of each are saved under its name with `.npy`.

        Raises:
            CTReadError: it takes far too long, a package is missing or too old, or the disk is full.
        """
        parts = [names[k :: self.count] for k in range(self.count)]
        with ThreadPoolExecutor(self.count) as pool:
            codes = list(pool.map(self._finish, self._processes, parts))
        for code in codes:
            self._check_exit(code, Path(names[0]).parent if names else Path(tempfile.gettempdir()))

    def _finish(self, process: "subprocess.Popen[bytes]", names: Sequence[str]) -> int:
        """Send a process its files, and return its exit code."""
        listed = os.fsencode("\0".join(names))
        try:  # with their length: another process forked meanwhile would keep the pipe from ending
            process.communicate(len(listed).to_bytes(8, "little") + listed, timeout=_seconds(len(names)))
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise CTReadError(f"{self._first}: decoding its voxels takes far too long. {EXPORT_AGAIN}") from error
        return process.returncode

    def _check_exit(self, code: int, folder: Path) -> None:
        if code == _NO_SIMPLEITK:
            raise CTReadError(f"{self._first}: compressed voxels need SimpleITK: pip install SimpleITK")
        if code == _OLD_SIMPLEITK:
            raise CTReadError(
                f"{self._first}: its voxels are compressed as HTJ2K, which SimpleITK decodes from version 2.5 on: "
                f"pip install -U 'SimpleITK>=2.5', or export the series uncompressed."
            )
        if code == _DISK_FULL:
            raise CTReadError(f"{self._first}: cannot be decoded into {folder}. {FREE_SPACE}")

    def _end(self) -> None:
        for process in self._processes:
            with process:  # closes its pipe, and waits for its end
                if process.poll() is None:
                    process.kill()


def _seconds(frames: int) -> float:
    """Return how long a process may take for a number of frames."""
    return _SECONDS_PER_PROCESS + _SECONDS_PER_FRAME * frames


@lru_cache(maxsize=1)
def _package_folders() -> tuple[str, ...]:
    """Return the folders that hold the packages a process imports."""
    folders = {}
    for name in _PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a stand-in
            continue
        if spec is not None and spec.origin is not None:
            folders[str(Path(spec.origin).absolute().parents[1])] = name
    return tuple(folders)
