"""A service with the demo model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samf.cli.reporting import load_reporter
from samf.phantoms.single import write_phantom


@pytest.fixture(scope="session")
def reporter() -> Any:
    return load_reporter(None, "cpu", None)


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    """A folder of two coarse phantoms, and a text next to it."""
    folder = tmp_path_factory.mktemp("served") / "scans"
    folder.mkdir()
    write_phantom(folder / "healthy.nii.gz", 0, [], voxel_mm=8.0)
    write_phantom(folder / "ill.nii.gz", 1, ["Pleural effusion", "Cardiomegaly"], voxel_mm=8.0)
    (folder.parent / "secret.txt").write_text("not to be read")
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Iterator[Path]:
    """The system's temporary folder of this test, which must be empty at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def serve(reporter, temporary) -> Iterator[Callable[..., Any]]:
    """Returns a client of a service with these settings."""
    pytest.importorskip("fastapi", reason="samf api needs the extra `api`")
    from starlette.testclient import TestClient

    from samf.serving.app import create_app
    from samf.serving.engine import Engine
    from samf.serving.settings import ApiSettings

    clients = []

    def start(pipeline: Any = reporter, **settings: Any) -> TestClient:
        chosen = ApiSettings(**{"model_id": "demo", **settings})
        engine = Engine(pipeline, chosen)
        clients.append(TestClient(create_app(engine, chosen)))
        clients[-1].__enter__()
        clients[-1].engine = engine
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)
