"""Twenty visitors at once, through gradio's own client: all are answered, memory doesn't grow, nothing is lost or left."""

import os
import threading
import time
from pathlib import Path

import pytest
from served_page import Served, note

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'samf[web]'")
gradio_client = pytest.importorskip("gradio_client", reason="gradio_client comes with gradio")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VISITORS, SECONDS = 20, float(os.environ.get("SAMF_LOAD_SECONDS", "30"))


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_twenty_visitors(tmp_path):
    served = Served(tmp_path / "page")
    times: dict[str, list[float]] = {"report": [], "ask": []}
    errors, lock, memory = [], threading.Lock(), []
    try:
        clients = [
            gradio_client.Client(served.address, verbose=False, analytics_enabled=False) for _ in range(VISITORS)
        ]
        end = time.monotonic() + SECONDS

        def timed(kind, *arguments):
            started = time.monotonic()
            result = arguments[0].predict(*arguments[1:], api_name=f"/{kind}")
            with lock:
                times[kind].append(time.monotonic() - started)
            return result

        def visit(number):
            names = ("effusion", "consolidation", "emphysema", "normal")
            try:
                while time.monotonic() < end:
                    status, *_ = timed("report", clients[number], {"phantom": names[number % 4]})
                    assert "Done in" in status, status
                    status, *rest = timed("ask", clients[number], "Is there a pleural effusion?")
                    assert "Answered" in status and "Is there a pleural effusion?" in str(rest), status
            except Exception as error:  # noqa: BLE001 - counted below
                errors.append(repr(error)[:300])

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(VISITORS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(memory_mb(served.process.pid))
            time.sleep(1)
        for client in clients:
            client.close()
    finally:
        assert served.close() == 0
    assert errors == []
    spent = SECONDS + max(0.0, time.monotonic() - end)
    for kind, values in times.items():
        values.sort()
        p95 = values[int(0.95 * (len(values) - 1))]
        note(f"{kind}: {len(values)} in {spent:.0f} s, median {values[len(values) // 2]:.1f} s, p95 {p95:.1f} s")
    half = len(memory) // 2
    note(f"memory: {memory[0]:.0f} MB at first, {max(memory[:half]):.0f} then {max(memory[half:]):.0f} MB")
    assert len(times["report"]) == len(times["ask"]) >= VISITORS
    assert [path for path in served.temporary.rglob("*") if path.is_file()] == []
    assert "Traceback" not in served.log.read_text()
