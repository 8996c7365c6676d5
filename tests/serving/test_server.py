"""`samf api` as a process: signals, and requests that no client would send."""

import copy
import gzip
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter

import httpx
import pytest
from chat_bodies import CHAT, QUESTION, asked, encoded, volume_block

pytest.importorskip("uvicorn", reason="samf api needs the extra `api`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CODE = "import sys; sys.argv[0] = 'samf'; from samf.cli.main import app; app()"


class Server:
    """A process that serves the demo model from a temporary folder of its own."""

    def __init__(self, temporary, scans, *options):
        self.temporary = temporary
        environment = {**os.environ, "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", CODE, "api", "--port", "0", "--scan-folder", str(scans), *options]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def uploads(self) -> list:
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.name != "lock"]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(scans, tmp_path):
    servers = []

    def new(*options) -> Server:
        (tmp_path / "temporary").mkdir(exist_ok=True)
        servers.append(Server(tmp_path / "temporary", scans, *options))
        return servers[-1]

    yield new
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_sigterm_lets_a_request_finish_and_a_kill_leaves_nothing_for_long(start, scans):
    server = start("--max-upload", "1mb")
    body = asked(volume_block(scans / "ill.nii.gz"), stream=True)
    with server.client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and server.process.wait(60) == 0
    assert list(server.temporary.iterdir()) == []
    killed = start()
    (next(killed.temporary.iterdir()) / "left").write_text("of an upload")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL and killed.uploads()
    assert start().uploads() == []


def test_the_openai_client_works_as_it_is(start, scans, reporter):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    server = start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    data = volume_block(scans / "ill.nii.gz")["volume"]["data"]
    scan = {"type": "file", "file": {"filename": "scan", "file_data": f"data:application/octet-stream;base64,{data}"}}
    talk = [{"role": "user", "content": [scan]}]
    whole = client.chat.completions.create(model="demo_model", messages=talk)
    assert whole.choices[0].message.content == reporter(scans / "ill.nii.gz", do_sample=False).text
    pieces = client.chat.completions.create(model="demo_model", messages=talk, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=talk)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo_model", messages=[{"role": "user", "content": QUESTION}])


def odd_value(draw: random.Random):
    kinds = [
        None,
        True,
        0,
        -1,
        1e308,
        10**30,
        "",
        "x",
        "\0",
        "\ud800",
        "é" * 50,
        [],
        {},
        [[]],
        {"a": {"b": []}},
        "../../etc",
    ]
    return draw.choice(kinds)


def mutated_json(draw: random.Random, body: dict) -> bytes:
    """A valid request with some of its values replaced, or some of its bytes."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        place = body
        while isinstance(place, dict | list) and place:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            if draw.random() < 0.35 or not isinstance(place[key], dict | list):
                place[key] = odd_value(draw)
                break
            place = place[key]
    content = bytearray(json.dumps(body).encode())
    if draw.random() < 0.4:
        for _ in range(draw.randint(1, 20)):
            content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
    return bytes(content)


def mutated_file(draw: random.Random, content: bytes) -> bytes:
    """A volume with flipped bytes, cut off, of another kind, or in a zip whose names lead elsewhere."""
    kind = draw.randrange(6)
    plain = bytearray(gzip.decompress(content))
    if kind == 0:
        for _ in range(draw.randint(1, 10)):
            plain[draw.randrange(348)] = draw.randrange(256)
        return bytes(plain[: draw.choice([348, 352, 5000, len(plain)])])
    if kind == 1:
        return content[: draw.randrange(len(content))]
    if kind == 2:
        return draw.randbytes(draw.randint(1, 3000))
    if kind == 3:
        names = ["DimSize = 3 3 3", "DimSize = -1 2", "ElementType = MET_SHORT", "ElementDataFile = ../lock", "x = y"]
        return "\n".join(["NDims = 3", *draw.choices(names, k=4), "ElementDataFile = LOCAL\n"]).encode() + bytes(54)
    if kind == 4:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            for name in draw.choices(["../../escape.nii", "/tmp/escape.nii", "a/b.nii", "escape.raw", "x" * 200], k=2):
                archive.writestr(name, draw.randbytes(500))
        return held.getvalue()[: draw.choice([100, 10_000])]
    return bytes(128) + b"DICM" + draw.randbytes(800)


def raw_request(draw: random.Random, port: int) -> None:
    """Bytes that are no HTTP, or HTTP that is cut off; the connection closes."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    content = draw.choice(
        [
            draw.randbytes(300),
            head,
            head + b"Content-Length: -5\r\n\r\n",
            head + b"Content-Length: 99999999999999999999\r\n\r\n{}",
            head + b"Content-Length: 100\r\n\r\n{",
            head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            head + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\n\r\n",
            b"GET /v1/models/%00%2e%2e/ HTTP/1.1\r\nHost: x\r\n\r\n",
        ]
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(content)
            connection.settimeout(0.2)
            connection.recv(1000)
        except OSError:
            pass


def test_700_malformed_requests(start, scans, tmp_path):
    server, draw = start("--max-upload", "2mb"), random.Random(0)
    scan = (scans / "ill.nii.gz").read_bytes()
    good = asked(encoded(scan), QUESTION, max_tokens=2, model="demo_model", samf={"report": True})
    before = {path: path.read_bytes() for path in scans.parent.rglob("*") if path.is_file()}
    statuses: Counter[int] = Counter()
    for number in range(700):
        if number % 7 == 0:
            raw_request(draw, server.port)
            continue
        if number % 7 < 4:
            content = mutated_json(draw, good)
        else:
            content = json.dumps(asked(encoded(mutated_file(draw, scan)), QUESTION, max_tokens=2)).encode()
        response = server.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        statuses[response.status_code] += 1
        assert response.status_code < 500, (response.text, content[:500])
        if response.status_code != 200:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and str(tmp_path) not in error["message"]
    assert server.client.post(CHAT, json=good).status_code == 200
    time.sleep(0.2)
    assert server.uploads() == []
    assert {path: path.read_bytes() for path in scans.parent.rglob("*") if path.is_file()} == before
    assert server.end() == 0 and list(server.temporary.iterdir()) == []
    assert not [line for line in server.said if "Traceback" in line or "  File" in line], server.said
    sys.stdout.write(f"{dict(statuses)}\n")
