"""The layer around gradio: what is refused before gradio sees it, and what browsers are told."""

import pytest

TestClient = pytest.importorskip("starlette.testclient", reason="the page's libraries are not installed").TestClient

from starlette.responses import PlainTextResponse  # noqa: E402

from samf.web.guard import ASSETS, Guard  # noqa: E402


@pytest.fixture
def client(tmp_path):
    async def app(scope, receive, send):
        await PlainTextResponse(f"gradio: {scope['path']}")(scope, receive, send)

    return TestClient(Guard(app, 1000, tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://example.org/x", "/gradio_api/file=https%3A%2F%2Fexample.org",
        "/gradio_api/file=http:/example.org", "/gradio_api/file=HTTP://example.org",
        "/proxy=https://x.hf.space/", "/gradio_api/proxy=http://127.0.0.1", "/gradio_api/component_server", "/monitoring/x",
    ],
)  # fmt: skip
def test_the_server_fetches_nothing_for_visitors(client, path):
    assert client.get(path).status_code == 404


def test_uploads_have_a_limit_that_is_checked_before_they_are_written(client):
    path = "/gradio_api/upload"
    assert client.post(path, content=b"x" * 500).text == f"gradio: {path}"
    assert client.post(path, content=b"x" * (2 << 20)).status_code == 413
    assert client.post(path, content=iter([b"x"])).status_code == 411  # of unknown length


def test_scans_are_not_kept_by_browsers_and_nothing_is_loaded_from_elsewhere(client):
    scan = client.get("/gradio_api/file=/tmp/samf-page-x/studies/y/ct.nii.gz")
    assert scan.headers["cache-control"] == "no-store"
    for response in (scan, client.get("/")):
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_the_viewer_comes_from_the_package_with_its_licence(client):
    served = client.get("/samf/niivue.umd.js")
    assert served.content == (ASSETS / "niivue.umd.js").read_bytes() and "javascript" in served.headers["content-type"]
    assert "Redistribution and use" in (ASSETS / "LICENSE.niivue").read_text()
    for name in ("page.js", "../guard.py", "..%2fguard.py", "", "niivue.umd.js/x"):
        assert client.get(f"/samf/{name}").text.startswith("gradio: ")


def test_errors_of_the_application_are_an_answer_without_details(tmp_path, caplog):
    async def broken(scope, receive, send):
        raise TypeError("Doe^Jane")

    response = TestClient(Guard(broken, 1000, tmp_path)).get("/")
    assert response.status_code == 500 and "Doe" not in response.text + caplog.text and "TypeError" in caplog.text
