"""What the checks of `samf listen` need around it: the process, a far end that counts, series good and broken."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from samf.phantoms.dicom import slice_dataset, write_series
from samf.phantoms.volume import Phantom, make_phantom

HOST, TITLE, FAR = "127.0.0.1", "SAMF", "FAR"
_VOXEL_MM = 9.0


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def no_delay(event: Any) -> None:
    """Send small messages at once; for pynetdicom's EVT_CONN_OPEN."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


class FarEnd:
    """A storage SCP that notes what arrives, in memory.

    Attributes:
        objects: how often each SOPInstanceUID came.
        sources: the SeriesInstanceUIDs that each object refers to.
        port: where it listens.
    """

    def __init__(self) -> None:
        from pynetdicom import AE, AllStoragePresentationContexts, evt

        self.objects: Counter[str] = Counter()
        self.sources: dict[str, set[str]] = {}
        self.port = free_port()
        entity = AE(FAR)
        entity.supported_contexts = AllStoragePresentationContexts
        handlers = [(evt.EVT_C_STORE, self._take)]
        self._server = entity.start_server((HOST, self.port), block=False, evt_handlers=handlers)

    def _take(self, event: Any) -> int:
        document = event.dataset
        name = str(document.SOPInstanceUID)
        self.sources[name] = {
            str(series.SeriesInstanceUID)
            for study in document.get("CurrentRequestedProcedureEvidenceSequence", [])
            for series in study.ReferencedSeriesSequence
        }
        self.objects[name] += 1
        return 0x0000

    def reported(self) -> Counter[str]:
        """Return how many different objects refer to each series."""
        return Counter(series for found in self.sources.values() for series in found)

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()


class Listener:
    """`samf listen` as a process.

    Args:
        out: its folder; the log goes next to it.
        options: more arguments.
    """

    def __init__(self, out: Path, *options: str):
        self.port = free_port()
        self.log = out.with_name(f"{out.name}.log")
        arguments = ["listen", "--out", str(out), "--port", str(self.port), "--aet", TITLE, *options]
        self._command = [sys.executable, "-m", "samf.cli.main", *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self._reap)  # also after an error

    def start(self) -> None:
        """Start it and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=dict(os.environ))
        if not wait_for(self.answers, 600):
            raise RuntimeError(f"{self.log}: the listener does not answer")

    def answers(self) -> bool:
        """Return whether it answers C-ECHO."""
        from pynetdicom import AE
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

        entity = AE("ECHO")
        entity.add_requested_context(Verification)
        association = entity.associate(HOST, self.port, ae_title=TITLE)
        if not association.is_established:
            return False
        status = association.send_c_echo()
        association.release()
        return bool(status) and status.Status == 0x0000

    def _reap(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()

    def kill(self) -> None:
        """Kill it, as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Stop it as a service manager would, and return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(120)

    def resources(self) -> tuple[float, int, int]:
        """Return its memory in MB (RSS), and its numbers of threads and open files."""
        assert self.process is not None
        process = Path("/proc", str(self.process.pid))
        pages = int((process / "statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return memory, len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))


def chest(seed: int) -> Phantom:
    """Return a small phantom of about 30 slices of 35 x 32 pixels."""
    return make_phantom(np.random.default_rng(seed), voxel_mm=_VOXEL_MM)


def write_broken(folder: Path) -> dict[str, Path]:
    """Write five series of which no report can be made, and return their folders by what is wrong."""
    scan = chest(1_000)
    half = np.zeros(scan.hu.shape[:2], np.int16).tobytes()[: scan.hu[..., 0].size]
    water = Phantom(np.full_like(scan.hu, 40), scan.affine, {})
    short = Phantom(scan.hu[..., 10:13], scan.affine, {})
    mr = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}
    return {
        "truncated pixels": write_series(scan, folder / "truncated", "truncated", PixelData=half),
        "no CT": write_series(scan, folder / "mr", "mr", **mr),
        "no chest": write_series(water, folder / "water", "water"),
        "missing UIDs": write_series(scan, folder / "nameless", "nameless", SeriesInstanceUID=None),
        "three slices": write_series(short, folder / "short", "short"),
    }


def send_phantom(scan: Phantom, name: str, port: int) -> None:
    """Send a phantom as a series through one association, and again from the start where that ends early.

    Args:
        scan: the phantom.
        name: from which the UIDs follow.
        port: of the listener.
    """
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

    entity = AE("SENDER")
    entity.add_requested_context(CTImageStorage)
    while True:
        association = entity.associate(HOST, port, ae_title=TITLE, evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)])
        try:
            answers = [
                association.send_c_store(slice_dataset(scan, index, name)).get("Status")
                for index in range(scan.hu.shape[2])
            ]
        except RuntimeError:  # it ended: its process may have been suspended
            continue
        association.release()
        if set(answers) == {0x0000}:
            return


class Senders:
    """Threads that send folders by storescu, again and again until each image was acknowledged or refused for good.

    Args:
        folders: to send.
        port: of the listener.
        count: of threads.
    """

    _PAUSE = 1.0  # seconds before a folder is sent again

    def __init__(self, folders: list[Path], port: int, count: int):
        self._left, self._port, self._lock = list(folders), port, threading.Lock()
        self.tries = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    return
                folder = self._left.pop(0)
            while not self._send(folder):
                time.sleep(self._PAUSE)

    def _send(self, folder: Path) -> bool:
        command = ["storescu", "-v", "-aec", TITLE, HOST, str(self._port), "+sd", str(folder)]
        environment = {**os.environ, "TCP_NODELAY": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        self.tries += 1
        said = done.stdout + done.stderr
        refused = "DataSetDoesNotMatch" in said.replace(" ", "") or "0xa900" in said.lower()
        return said.count("(Success)") == len(list(folder.iterdir())) or refused

    def wait(self, seconds: float) -> bool:
        """Return whether all was sent in time."""
        return wait_for(lambda: not any(thread.is_alive() for thread in self._threads), seconds)
