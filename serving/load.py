"""Load on an API that is running, and what it did: requests per minute, seconds, memory, nothing lost.

    samf api --port 8000 &
    python -m samf.serving.load scan.nii.gz other.nii.gz --url http://127.0.0.1:8000/v1 --clients 20 --seconds 120

Each client asks one thing after the other: reports and questions, half of them streamed. Only for a server on this machine.
"""

import argparse
import base64
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

QUESTIONS = (None, "Is there a pleural effusion?", "Is the heart enlarged?", "Is there a nodule?")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Tally:
    """What the clients saw.

    Attributes:
        seconds: of each whole answer.
        first: seconds to the first piece of each streamed answer.
        outcomes: how often each outcome came: "ok", a status, or an exception's name.
        texts: the texts of each request, by scan and question: more than one means that answers were mixed up.
    """

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    texts: dict[tuple[int, str | None], set[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client(threading.Thread):
    """One client: it asks, waits for the answer, and asks again.

    Args:
        number: of the client; its requests follow from it.
        arguments: of the command line.
        volumes: base64 of the scans.
        tally: what all clients saw.
    """

    def __init__(self, number: int, arguments: argparse.Namespace, volumes: Sequence[str], tally: Tally) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(number)
        self._arguments = arguments
        self._volumes = volumes
        self._tally = tally

    def run(self) -> None:
        """Ask until the time is over."""
        end = time.monotonic() + self._arguments.seconds
        with httpx.Client(base_url=self._arguments.url, timeout=600) as client:
            while time.monotonic() < end:
                scan, question = self._random.randrange(len(self._volumes)), self._random.choice(QUESTIONS)
                stream = self._random.random() < self._arguments.streamed
                started = time.monotonic()
                try:
                    outcome, text, first = self._ask(client, scan, question, stream, started)
                except httpx.HTTPError as error:
                    outcome, text, first = type(error).__name__, "", None
                with self._tally.lock:
                    self._tally.outcomes[outcome] += 1
                    if outcome == "ok":
                        self._tally.seconds.append(time.monotonic() - started)
                        self._tally.texts.setdefault((scan, question), set()).add(text)
                    self._tally.first += [] if first is None else [first]
                if outcome == "429":
                    time.sleep(1)

    def _ask(
        self, client: httpx.Client, scan: int, question: str | None, stream: bool, started: float
    ) -> tuple[str, str, float | None]:
        """Return the outcome, the text, and for a streamed answer the seconds to its first piece."""
        block: dict[str, Any] = {"type": "volume", "volume": {"data": self._volumes[scan]}}
        content = [block] if question is None else [block, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "stream": stream}
        if not stream:
            response = client.post("chat/completions", json=body)
            if response.status_code != 200:
                return str(response.status_code), "", None
            return "ok", response.json()["choices"][0]["message"]["content"], None
        first, pieces, whole = None, [], False
        with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                return str(response.status_code), "", None
            for line in response.iter_lines():
                whole |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: ")).get("choices") or [{"delta": {}}]
                    pieces.append(choices[0]["delta"].get("content") or "")
                    if pieces[-1] and first is None:
                        first = time.monotonic() - started
        return "ok" if whole else "cut off", "".join(pieces), first


def resident(pid: int | None) -> str:
    """Return the memory of a process in MB; Linux only."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return "?"
    return f"{next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 1024:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print the figures; return 1 where an answer was lost or mixed up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path, help="Files to ask about.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="Of the API, on this machine.")
    parser.add_argument("--clients", type=int, default=20, help="That ask at the same time.")
    parser.add_argument("--seconds", type=float, default=120, help="For which they ask.")
    parser.add_argument("--streamed", type=float, default=0.5, help="Share of requests that are streamed.")
    parser.add_argument("--pid", type=int, help="Process of the server, whose memory is shown.")
    options = parser.parse_args(arguments)
    if urlsplit(options.url).hostname not in LOOPBACK:
        parser.error(f"{options.url}: only a server on this machine is put under load.")
    volumes = [base64.b64encode(path.read_bytes()).decode() for path in options.scans]
    tally, before, started = Tally(), resident(options.pid), time.monotonic()
    clients = [Client(number, options, volumes, tally) for number in range(options.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    took = time.monotonic() - started
    mixed = sum(len(texts) > 1 for texts in tally.texts.values())
    lost = sum(count for outcome, count in tally.outcomes.items() if outcome not in ("ok", "429"))
    sys.stdout.write(
        f"{options.clients} clients, {took:.0f} s: {dict(tally.outcomes)}, lost {lost}, mixed up {mixed} of "
        f"{len(tally.texts)}\n{60 * tally.outcomes['ok'] / took:.0f} answers per minute; seconds "
        f"{_percentiles(tally.seconds)}; to the first piece {_percentiles(tally.first)}\n"
        f"memory {before} MB before, {resident(options.pid)} MB after\n"
    )
    return int(bool(lost or mixed))


def _percentiles(values: Sequence[float]) -> str:
    if not values:
        return "none"
    middle, high = np.percentile(values, [50, 95])
    return f"p50 {middle:.2f}, p95 {high:.2f}"


if __name__ == "__main__":
    sys.exit(main())
