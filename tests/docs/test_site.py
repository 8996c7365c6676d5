"""The docs site builds without warnings, offline, with a page for each module."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("mkdocs", "material", "mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make docs` installs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="?(https?://[^">\s]*)', page.read_text("utf-8"))
        assert not loaded, (page.name, loaded)


def test_each_module_has_a_page_and_commands_their_options(site):
    api = site / "reference" / "api"
    assert "read_ct" in (api / "model" / "ct_volume.html").read_text("utf-8")
    modules = [path for path in (REPOSITORY / "training").glob("*.py") if not path.stem.startswith("_")]
    assert {path.stem for path in modules} == {path.stem for path in (api / "training").glob("*.html")}
    options = (site / "reference" / "options.html").read_text("utf-8")
    assert "--slice_cache" in options and "--judge_endpoint" in options and "--retry_failed" in options


def test_text_is_in_the_pages_themselves(site):
    """A reader without JavaScript gets the equations, too."""
    assert "F_2d3d" in (site / "concepts" / "fusion.html").read_text("utf-8")
