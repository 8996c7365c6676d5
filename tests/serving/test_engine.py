"""Requests that wait, that are answered together, and whose clients leave."""

import asyncio
import json
import threading
import time
from collections.abc import Callable

import pytest
from chat_bodies import CHAT, QUESTION, asked, volume_block

pytest.importorskip("fastapi", reason="samf api needs the extra `api`")

from samf.serving.app import create_app
from samf.serving.engine import Engine
from samf.serving.jobs import Failed, Job
from samf.serving.settings import ApiSettings
from samf.serving.uploads import ScanFile, Spool


class Held:
    """A pipeline whose model waits until it is let go, so that requests pile up."""

    def __init__(self, reporter):
        self._reporter, self.go, self.batches = reporter, threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._reporter, name)

    def answer(self, jobs, **options):
        self.batches.append(len(jobs))
        assert self.go.wait(60)
        return self._reporter.answer(jobs, **options)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def send_all(client, slow, bodies) -> list:
    """Send the first body, and the others while the model is held; return the responses."""
    found = [None] * len(bodies)

    def send(number):
        found[number] = client.post(CHAT, json=bodies[number])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(bodies))]
    threads[0].start()
    wait_until(lambda: slow.batches == [1])
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: client.get("/health").json()["waiting"] == len(bodies) - 1)
    full = client.post(CHAT, json=bodies[0])
    assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full" and int(full.headers["retry-after"])
    slow.go.set()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def slow(reporter):
    held = Held(reporter)
    yield held
    held.go.set()


def test_waiting_requests_are_answered_together_and_a_full_queue_says_so(slow, serve, scans):
    client = serve(slow, queue=3, batch=4)
    block = volume_block(scans / "ill.nii.gz")
    bodies = [asked(block, QUESTION, max_tokens=limit) for limit in (1, 2, 3, 100)]
    together = send_all(client, slow, bodies)
    assert slow.batches == [1, 3]
    for body, response in zip(bodies, together, strict=True):  # each row has its own limit and its own end
        alone, answer = client.post(CHAT, json=body).json(), response.json()
        assert answer["choices"] == alone["choices"] and answer["usage"] == alone["usage"]
    ends = [response.json()["choices"][0]["finish_reason"] for response in together]
    assert ends == ["length", "length", "length", "stop"]


def test_streams_are_answered_together_with_others(slow, serve, scans):
    client = serve(slow, queue=3, batch=4)
    block = volume_block(scans / "ill.nii.gz")
    plain = asked(block, QUESTION, max_tokens=30)
    bodies = [plain, {**plain, "stream": True}, plain, {**plain, "samf": {"report": True}}]
    responses = send_all(client, slow, bodies)
    assert slow.batches == [1, 3]
    text = responses[0].json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in responses[1].text.split("\n\n")[:-2]]
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines) == text
    assert responses[3].json()["samf"]["report"]["text"] == text


def test_one_bad_question_among_others_is_refused_alone(slow, serve, scans):
    client = serve(slow, queue=3, batch=4)
    block = volume_block(scans / "ill.nii.gz")
    bodies = [asked(block, text, max_tokens=4) for text in (QUESTION, "<image>", QUESTION, QUESTION)]
    assert [response.status_code for response in send_all(client, slow, bodies)] == [200, 400, 200, 200]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("JANE DOE"), 500), (MemoryError(), 503), (KeyError("/home/jane"), 500)]
)
def test_failures_say_nothing_and_the_service_goes_on(error, status, serve, reporter, scans, caplog):
    class Broken(Held):
        def answer(self, jobs, **options):
            if self.go.is_set():
                return self._reporter.answer(jobs, **options)
            raise error

    broken = Broken(reporter)
    client = serve(broken)
    body = asked(volume_block(scans / "ill.nii.gz"), QUESTION, max_tokens=2)
    response = client.post(CHAT, json=body)
    assert response.status_code == status and response.json()["error"]["type"] == "server_error"
    for said in (response.text, caplog.text):
        assert "JANE" not in said and "jane" not in said and "Traceback" not in said
    broken.go.set()
    assert client.post(CHAT, json=body).status_code == 200


def test_a_client_that_leaves_ends_its_answer(reporter, temporary, scans):
    """Streamed or not: the model stops long before the answer's limit, and the upload is gone."""
    settings, made = ApiSettings(), []

    class Endless(Held):
        def answer(self, jobs, **options):
            found = self._reporter.answer(jobs, **{**options, "min_new_tokens": 900})
            made.append(found[0])
            return found

    engine = Engine(Endless(reporter), settings)
    app = create_app(engine, settings)

    async def leave(stream: bool) -> int:
        body = asked(volume_block(scans / "healthy.nii.gz"), "Go on.", stream=stream, max_tokens=900)
        sent, read = [], False

        async def receive():
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            while len(sent) < 3 if stream else not engine.running:
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b"", "scheme": "http"}
        scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await app(scope, receive, send)
        while engine.running:
            await asyncio.sleep(0.01)
        return len(sent)

    async def both():
        async with app.router.lifespan_context(app):
            for stream in (True, False):
                await leave(stream)
            assert [path.name for path in next(temporary.iterdir()).iterdir()] == ["lock"]

    asyncio.run(both())
    assert len(made) == 2
    assert all(sum(sentence.tokens for sentence in report.sentences) < 700 for report in made)


@pytest.mark.parametrize("leaves", ["client", "service"])
def test_evidence_that_nobody_waits_for_is_given_up(leaves, reporter, temporary, scans):
    class Searching(Held):
        begun = threading.Event()

        def explain(self, report, scan, mode, before_pass):
            self.begun.set()
            end = time.monotonic() + 60
            while time.monotonic() < end:
                before_pass()

    searching, told = Searching(reporter), []
    searching.go.set()
    searching.begun.clear()
    engine = Engine(searching, ApiSettings())
    job = Job(QUESTION, ScanFile("key", scans / "ill.nii.gz", "upload"), told.append, max_tokens=2, report=True)
    job.evidence = "fast"
    engine.submit(job)
    assert searching.begun.wait(60)
    if leaves == "client":
        job.cancelled = True
        wait_until(lambda: not engine.running)
    engine.close()
    assert told[-1].error.code == {"client": "cancelled", "service": "shutting_down"}[leaves]


def test_what_waits_when_the_service_ends_is_told_so(slow, reporter, temporary, scans):
    engine = Engine(slow, ApiSettings(batch=1))
    told, scan = [], ScanFile("key", scans / "ill.nii.gz", "upload")
    jobs = [Job(QUESTION, scan, told.append, max_tokens=2) for _ in range(3)]
    for job in jobs:
        engine.submit(job)
    wait_until(lambda: slow.batches == [1])
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: sum(isinstance(event, Failed) for event in told) == 2)
    slow.go.set()
    closing.join()
    assert all(job.ended for job in jobs) and {event.error.status for event in told if isinstance(event, Failed)} == {
        503
    }


def test_abandoned_uploads_of_a_killed_process_go_and_those_of_others_stay(temporary):
    killed = temporary / "samf-api-killed"
    (killed / "upload").mkdir(parents=True)
    (killed / "lock").touch()
    first = Spool()
    second = Spool()
    assert not killed.exists() and first.folder.exists() and second.folder.exists()
    first.close()
    second.close()
