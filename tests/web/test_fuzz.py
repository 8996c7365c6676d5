"""700 malformed uploads and requests, of harmless bytes: answers in words, files where they belong, nothing left behind."""

import os
import random
import zipfile
from io import BytesIO

import pytest
from served_page import Served, note

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("gradio", reason="the page needs gradio: pip install 'samf[web]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TIMES = int(os.environ.get("SAMF_FUZZ", "700"))
SECRET = "Doe^Jane"
STRANGE_NAMES = (
    *("../../outside", "..\\..\\outside", "/etc/outside", "a\0b", "x" * 4000, "", ".", ".."),
    *("~", "ü\u202e.nii", "CON", "%2e%2e%2f"),
)
STRANGE_VALUES = (
    *(None, True, 0, -1, 1e308, "", "\0", "x" * 100_000, [], {}, [[]], ["a"] * 999),
    *({"path": "/etc/passwd"}, {"files": None}, {"files": [None]}, {"files": ["/etc/passwd"]}, {"files": "x"}),
    *({"phantom": "../../x"}, {"phantom": {"a": 1}}, {"kind": "../x"}),
)
STRANGE_BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\0",
    b'{"data": 3}',
    b'{"data": [], "fn_index": 1000000000, "session_hash": "x"}',
)
STRANGE_PATHS = (
    *("gradio_api/file=/etc/passwd", "gradio_api/file=../../etc/passwd", "gradio_api/file=http://127.0.0.1:9/x"),
    *("samf/../guard.py", "gradio_api/upload", "gradio_api/run/report", "proxy=http://x", "%00", "config?x=%ff"),
)
# How scans begin.
HEADS = (
    *(b"\x5c\x01\x00\x00", b"\x1f\x8b\x08", b"NRRD0005\n", b"ObjectType = Image\n", b"PK\x03\x04", b"\x93NUMPY"),
    *(b"BZh9", b"", b"II*\0", b"%PDF"),
)


def scans(rng: random.Random) -> bytes:
    """Bytes that resemble a scan."""
    kind, noise = rng.randrange(4), rng.randbytes(rng.randrange(0, 3000))
    if kind == 0:
        return rng.choice(HEADS) + noise
    if kind == 1:
        return bytes(128) + b"DICM" + noise
    if kind == 2:
        head = bytearray(352)
        head[0:4], head[40:56] = (
            b"\x5c\x01\0\0",
            b"".join(rng.randrange(-9, 30000).to_bytes(2, "little", signed=True) for _ in range(8)),
        )
        head[344:348], head[70:74] = b"n+1\0", bytes([rng.choice([4, 8, 16, 128]), 0, 16, 0])
        return bytes(head) + noise
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for _ in range(rng.randrange(4)):
            packed.writestr(rng.choice(STRANGE_NAMES).replace("\0", "") or "x", noise)
    content = archive.getvalue()
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.5 else content


class Client:
    """A client that may say anything."""

    def __init__(self, address: str):
        fresh = httpx.Limits(max_keepalive_connections=0)  # the server closes one whose body it has not read
        self.http = httpx.Client(base_url=address, timeout=120, limits=fresh)
        self.functions = {each["api_name"]: each["id"] for each in self.http.get("config").json()["dependencies"]}

    def upload(self, content: bytes, name: str) -> list[str] | httpx.Response:
        response = self.http.post("gradio_api/upload", files=[("files", (name, content))])
        return response.json() if response.status_code == 200 else response

    def call(self, name: str, data: object, session: str) -> str:
        """The whole stream of an event's messages."""
        asked = {"data": data, "fn_index": self.functions[name], "session_hash": session}
        joined = self.http.post("gradio_api/queue/join", json=asked)
        if joined.status_code != 200:
            return joined.text
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
            lines = []
            for line in stream.iter_lines():
                lines.append(line)
                if '"close_stream"' in line:
                    break
        return "\n".join(lines)

    def leave(self, session: str) -> None:
        """As a browser does whose tab closes: its heartbeat ends."""
        with self.http.stream("GET", f"gradio_api/heartbeat/{session}"):
            pass


def test_malformed_uploads_and_requests(tmp_path):
    before = set(tmp_path.parent.rglob("*"))
    served, rng = Served(tmp_path / "page", "--max-upload", "5mb", "--evidence", "none"), random.Random(15)
    refused = answered = 0
    try:
        client = Client(served.address)
        for number in range(TIMES):
            session, words = f"fuzz{number}", ""
            kind = number % 7
            if kind < 4:
                name = rng.choice([f"{SECRET}.nii.gz", *STRANGE_NAMES])
                paths = client.upload(scans(rng), name)
                if isinstance(paths, httpx.Response):
                    words = paths.text
                else:
                    words = client.call("report", [{"files": paths}], session)
                    assert "This " in words or 'role=\\"alert\\"' in words or "no longer there" in words, words[-500:]
                    answered += 1
            elif kind == 4:
                name = rng.choice(["report", "ask", "file"])
                words = client.call(name, [rng.choice(STRANGE_VALUES)] * rng.choice([1, 1, 1, 0, 3]), session)
            elif kind == 5:
                body = rng.choice(STRANGE_BODIES)
                words = client.http.post(
                    "gradio_api/queue/join", content=body, headers={"content-type": "application/json"}
                ).text
            else:
                path = rng.choice([*STRANGE_PATHS, f"gradio_api/file={served.temporary}"])
                method = rng.choice(["GET", "POST", "PUT", "HEAD", "DELETE"])
                sent = rng.randbytes(50) if method in ("POST", "PUT") else None
                try:
                    answer = client.http.request(method, path, content=sent)
                except httpx.TransportError:  # the connection is closed before the body has been read
                    refused += 1
                    continue
                words = "" if method == "HEAD" else answer.text
                refused += answer.status_code >= 400
            sent = path if kind == 6 else ""
            for trace in ("Traceback", 'File "', "root:", str(tmp_path), "site-packages"):
                assert trace not in words or trace in sent, (kind, words[-800:])
            assert SECRET not in words
            client.http.cookies.clear()
        good = client.call("report", [{"phantom": "normal"}], "good")
        assert "Done in" in good, "the page still works"
        assert refused and answered
        outside = {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents} - before
        assert outside <= {tmp_path}, outside
        assert served.process.poll() is None
    finally:
        code = served.close()
    assert code == 0
    left = [path for path in served.temporary.rglob("*") if path.is_file()]
    assert left == [], left
    log = served.log.read_text()
    assert SECRET not in log
    note(f"{TIMES} requests, {answered} scans answered in words, {refused} refused by address")
    note(
        f"log: {log.count('A request failed')} requests failed in gradio, {log.count('Traceback')} tracebacks of its own"
    )
