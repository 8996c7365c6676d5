"""Shared fixtures. What needs real files (`$SAMF_TEST_DATA`, `$SAMF_TEST_REFERENCE`) skips with its reason without them."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


class PlainRoot:
    """The repository's root as a plain folder: pytest would import it a second time, as a package of the clone's name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == REPOSITORY else None


def pytest_configure(config: pytest.Config) -> None:
    # A conftest's own hooks are not asked about folders above it.
    config.pluginmanager.register(PlainRoot())


def _shared_folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(
            f"${variable} ({folder}) is not a folder: real files for these tests are not part of the repository"
        )
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real CT volumes, tokenizers and reports."""
    return _shared_folder("SAMF_TEST_DATA", "data")


@pytest.fixture(scope="session")
def test_reference() -> Path:
    """Folder of the published code's inputs and outputs."""
    return _shared_folder("SAMF_TEST_REFERENCE", "reference")
