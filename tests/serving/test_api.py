"""The OpenAI-compatible API: what it answers is what the pipeline writes, and what it refuses it refuses in OpenAI's form."""

import base64
import gzip
import json

import nibabel
import numpy as np
import pytest
from chat_bodies import CHAT, QUESTION, asked, encoded, volume_block

pytest.importorskip("fastapi", reason="samf api needs the extra `api`")


def events(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_report_and_answer_are_the_pipelines(serve, reporter, scans):
    client = serve()
    scan = scans / "ill.nii.gz"
    own = reporter(scan, question=["Write the radiology report of this chest CT.", QUESTION], do_sample=False)
    report = client.post(CHAT, json=asked(volume_block(scan), samf={"report": True})).json()
    answer = client.post(CHAT, json=asked(volume_block(scan), QUESTION, model="demo")).json()
    for found, expected in zip((report, answer), own, strict=True):
        assert found["object"] == "chat.completion" and found["model"] == "demo"
        choice = found["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == "stop" and not expected.truncated
        usage = found["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] == sum(sentence.tokens for sentence in expected.sentences) + 1  # and the end
        assert "not for diagnosis" in found["samf"]["disclaimer"] and "phantoms only" in found["samf"]["warnings"][0]
    sent = report["samf"]["report"]
    assert sent["findings"] == pytest.approx(dict(own[0].findings)) and "report" not in answer["samf"]
    assert [item["text"] for item in sent["sentences"]] == [item.text for item in own[0].sentences]
    assert (sent["provenance"]["source"], sent["provenance"]["model"]) == ("upload", "demo")
    assert (report["samf"]["cached"], answer["samf"]["cached"]) == (False, True)


def test_prompt_tokens_are_those_of_the_processor(serve, reporter, scans):
    client, scan = serve(), scans / "ill.nii.gz"
    content = [{"type": "volume", "path": str(scan)}, {"type": "text", "text": QUESTION}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    ids = reporter.processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"]
    usage = client.post(CHAT, json=asked(volume_block(scan), QUESTION, max_tokens=1)).json()["usage"]
    assert usage["prompt_tokens"] == np.size(ids) and usage["completion_tokens"] == 1


def test_a_stream_has_the_same_text_in_pieces(serve, scans):
    client = serve()
    body = asked(volume_block(scans / "healthy.nii.gz"))
    whole = client.post(CHAT, json=body).json()
    response = client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response.text)
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and len(deltas) > 20
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["stop"] and chunks[-1]["samf"]["cached"] is True


def test_openais_own_block_of_a_file_is_a_volume(serve, scans):
    client = serve()
    data = base64.b64encode((scans / "ill.nii.gz").read_bytes()).decode()
    for given in (f"data:application/gzip;base64,{data}", data):
        block = {"type": "file", "file": {"file_data": given, "filename": "JANE DOE.nii.gz"}}
        answer = client.post(CHAT, json=asked(block, QUESTION, max_tokens=3))
        assert answer.status_code == 200 and "JANE" not in answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"]["completion_tokens"] == 3


def test_evidence_comes_with_the_report(serve, scans):
    own = {"samf": {"evidence": "fast"}, "max_tokens": 16}
    found = serve().post(CHAT, json=asked(volume_block(scans / "ill.nii.gz"), **own)).json()["samf"]["report"]
    assert len(found["evidence"]["sentences"]) == len(found["sentences"]) and found["truncated"]


def test_a_conversation_is_answered_by_its_last_question_and_says_so(serve, scans):
    client = serve()
    block = volume_block(scans / "ill.nii.gz")
    single = client.post(CHAT, json=asked(block, QUESTION)).json()
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [block]},
        {"role": "assistant", "content": "A report."},
        {"role": "user", "content": QUESTION},
    ]
    found = client.post(CHAT, json={"messages": talk}).json()
    assert found["choices"] == single["choices"] and found["samf"]["cached"]
    assert [note for note in found["samf"]["warnings"] if "not read" in note] == [
        "System messages were not read.",
        "Earlier turns were not read: each question is answered by itself.",
    ]


def test_paths_are_read_below_the_scan_folder_and_nowhere_else(serve, scans):
    client = serve(scan_folder=scans)
    for path in ("ill.nii.gz", str(scans / "ill.nii.gz")):
        good = client.post(CHAT, json=asked({"type": "volume", "path": path}, max_tokens=2, samf={"report": True}))
        assert good.json()["samf"]["report"]["provenance"]["source"] == "ill.nii.gz"
    link = scans / "link.nii.gz"
    link.symlink_to(scans.parent / "secret.txt")
    secret = str(scans.parent / "secret.txt")
    outside = ["../secret.txt", secret, "link.nii.gz", ".", "", "none.nii.gz", "a\0b", "/etc/passwd", "~/x"]
    outside += ["x" * 5000, "http://127.0.0.1/x.nii.gz", "hf://datasets/a/b/c.nii.gz", "../scans/../secret.txt"]
    outside += ["s3://bucket/x.nii.gz", "S3://bucket/", "gs://bucket/x.nii.gz", "memory://bucket/x.nii.gz"]
    told = {client.post(CHAT, json=asked({"type": "volume", "path": path})).text for path in outside}
    link.unlink()
    assert len(told) == 1 and json.loads(told.pop())["error"]["code"] == "scan_not_found"
    without = serve().post(CHAT, json=asked({"type": "volume", "path": "ill.nii.gz"}))
    assert without.status_code == 404 and "--scan-folder" in without.text


def test_headers_of_uploads_reach_no_other_file(serve):
    """A detached header may name a file next to it; other uploads and the service's lock are not."""
    client = serve()
    for name in ("../lock", "/etc/passwd", "scan", "../../secret.txt", "lock"):
        header = f"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = {name}\n"
        response = client.post(CHAT, json=asked(encoded(header.encode())))
        assert response.status_code == 400 and response.json()["error"]["code"] == "bad_volume"


BAD = encoded(b"no scan" * 100)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "bad_json"),
        (b"[]", 400, "bad_json"),
        (b'{"a": NaN}', 400, "bad_json"),
        (b"\xff\xfe", 400, "bad_json"),
        (b"[" * 100_000, 400, "bad_json"),
        ({}, 400, "invalid_value"),
        ({"messages": []}, 400, "invalid_value"),
        ({"messages": "hello"}, 400, "invalid_value"),
        (asked(QUESTION), 400, "invalid_value"),
        (asked(BAD, BAD), 400, "invalid_value"),
        (asked({"type": "image_url", "image_url": {"url": "data:,"}}), 400, "invalid_value"),
        (asked({"type": "file", "file": {"file_id": "file-1"}}), 400, "invalid_value"),
        (asked({**BAD, "path": "x"}), 400, "invalid_value"),
        (asked({"type": "volume", "volume": {"data": "####"}}), 400, "bad_base64"),
        (asked({"type": "volume", "volume": {"data": ""}}), 400, "bad_base64"),
        (asked({"type": "file", "file": {"file_data": "data:text/plain,hello"}}), 400, "bad_base64"),
        (asked({"type": "volume", "volume": {"data": "A" * 2_000_000}}), 413, "volume_too_large"),
        (asked({"type": "volume", "volume": {"data": "A" * 4_000_000}}), 413, "volume_too_large"),
        (asked(BAD), 400, "bad_volume"),
        (asked(BAD, stream=True), 400, "bad_volume"),
        (asked(BAD, model="gpt-5"), 404, "model_not_found"),
        (asked(BAD, n=2), 400, "unsupported_parameter"),
        (asked(BAD, tools=[{"type": "function"}]), 400, "unsupported_parameter"),
        (asked(BAD, temperature=3), 400, "invalid_value"),
        (asked(BAD, max_tokens=0), 400, "invalid_value"),
        (asked(BAD, max_tokens="5"), 400, "invalid_value"),
        (asked(BAD, samf={"reports": True}), 400, "invalid_value"),
        (asked(BAD, "x" * 5000), 400, "question_too_long"),
    ],
    ids=range(28),
)
def test_bad_requests_are_refused_in_openais_form(serve, body, status, code):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = serve(max_upload=1 << 20).post(CHAT, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "/tmp" not in error["message"] and "samf-api" not in error["message"]


def test_bad_questions_and_lengths_are_the_clients_fault(serve, scans):
    client = serve()
    block = volume_block(scans / "healthy.nii.gz")
    assert client.post(CHAT, json=asked(block, max_tokens=10_000)).json()["error"]["code"] == "context_length_exceeded"
    assert client.post(CHAT, json=asked(block, "<image> and <image>")).json()["error"]["code"] == "bad_request"
    surrogate = json.dumps(asked(block, "\ud800"))
    assert client.post(CHAT, content=surrogate, headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post(CHAT, json=asked(block, QUESTION, max_tokens=2)).status_code == 200


def test_a_scan_without_a_chest_is_refused_unless_asked_for(serve, tmp_path):
    file = tmp_path / "thin.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((48, 48, 8), -1000, np.int16), np.diag([4.0, 4.0, 4.0, 1.0])), file)
    client = serve()
    assert client.post(CHAT, json=asked(volume_block(file))).json()["error"]["code"] == "bad_volume"
    found = client.post(CHAT, json=asked(volume_block(file), max_tokens=2, samf={"any_region": True}))
    assert found.status_code == 200 and len(found.json()["samf"]["warnings"]) > 1
    assert "samf-api" not in found.text and "/scan" not in found.text


def test_other_addresses_and_methods(serve):
    client = serve()
    assert client.get("/v1/models").json()["data"][0]["id"] == "demo" == client.get("/v1/models/demo").json()["id"]
    assert client.get("/v1/models/gpt-5").json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json()["status"] == "ok"
    for address, method, status in (("/v1/none", "GET", 404), (CHAT, "GET", 405), ("/docs", "GET", 404)):
        response = client.request(method, address)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"
    form = client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert form.status_code == 400  # as a page of another origin could send it without asking


def test_keys(serve, scans):
    client = serve(keys=frozenset({"one", "zwö"}))
    body = asked(volume_block(scans / "ill.nii.gz"), QUESTION, max_tokens=2)
    for headers in ({}, {"Authorization": "Bearer two"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
        refused = client.post(CHAT, json=body, headers=headers)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.post(CHAT, json=body, headers={"Authorization": "Bearer one"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_kept_scans_are_bounded(serve, scans):
    client = serve(cached_scans=1)
    cached = []
    for name in ("ill", "healthy", "healthy", "ill", "ill"):
        answer = client.post(CHAT, json=asked(volume_block(scans / f"{name}.nii.gz"), QUESTION, max_tokens=1))
        cached.append(answer.json()["samf"]["cached"])
        assert len(client.engine.cache) == 1
    assert cached == [False, False, True, False, True]


def test_a_header_that_claims_more_than_there_is_is_refused(serve):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1200, 1200, 1200))
    content = gzip.compress(header.binaryblock + bytes(4) + bytes(1 << 20))
    response = serve().post(CHAT, json=asked(encoded(content)))
    assert response.status_code == 400 and response.json()["error"]["code"] == "bad_volume"
