"""README's first command and first snippet run; links in README and docs lead somewhere."""

import re
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from tiny import model_for, tiny_processor

from samf.evaluation.metrics.bootstrap import SampledMetric
from samf.evaluation.metrics.sampled_metric import ratio
from samf.experiments import demo
from samf.phantoms.dataset import write_nifti
from samf.phantoms.volume import make_phantom

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# Pages that the site generates; tests/docs/test_site.py builds it and so checks their links.
GENERATED = {"docs/contributing.md", "docs/changelog.md", "docs/reference/options.md"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    root = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    templates = sorted((REPOSITORY / ".github").rglob("*.md"))
    return [*root, *templates, *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [textwrap.dedent(code) for _, name, code in FENCE.findall(text) if name == language]


def anchors(page: Path) -> set[str]:
    """The ids that GitHub and MkDocs both give to a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)).strip("-"))
    return found


def test_readme_is_short_and_says_what_has_not_run():
    assert len(README.splitlines()) <= 130
    assert "research only" in README and "not for diagnosis" in README
    status = README[README.index("| status |") : README.index("## Install")]
    assert "| not run |" in status and "GPU" in status


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc and "localhost" not in parts.netloc, target
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        name = file.relative_to(REPOSITORY).as_posix()
        assert file.exists() or name in GENERATED or name.startswith("docs/reference/api/"), target
        if page.is_relative_to(REPOSITORY / "docs"):
            assert file.is_relative_to(REPOSITORY / "docs"), f"{target}: the site holds nothing outside docs/"
        if parts.fragment and file.exists():
            assert parts.fragment in anchors(file), target


def test_paths_in_code_spans_exist():
    """`recipes/ct_rate.yaml` and the like, in pages that describe the repository as it is."""
    path = re.compile(
        r"`((?:model|data|cache|training|evaluation|reporting|phantoms|utils|recipes|examples|findings|tests)/[\w./-]+)`"
    )
    for page in pages():
        if page.name != "CHANGELOG.md":
            for name in path.findall(page.read_text(encoding="utf-8")):
                assert (REPOSITORY / name).exists(), f"{page.relative_to(REPOSITORY)}: {name}"


def test_pages_that_the_sources_name_exist():
    """Error messages of saved models send their readers to docs/reference/components.md, among others."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.yaml"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        for page in re.findall(r"docs/[\w/]+\.md", (REPOSITORY / name).read_text(encoding="utf-8")):
            assert (REPOSITORY / page).is_file() or page in GENERATED, f"{name}: {page}"


def test_identifiers_on_pages_by_hand_exist():
    """What concepts, how-to and contributing call by name has this name in the sources."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.yaml", "Makefile"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    words = set()
    for name in listed.stdout.split():
        words |= set(re.findall(r"\w+", (REPOSITORY / name).read_text(encoding="utf-8")))
    libraries = {"from_pretrained", "TorchAoConfig", "BitsAndBytesConfig", "SFTTrainer", "TYPECHECK_PACKAGES"}
    identifier = re.compile(r"`(_?[A-Za-z]+(?:_[A-Za-z0-9]+)+|[A-Z]+[a-z]+[A-Z]\w+)`")
    for page in [
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "docs" / "concepts").glob("*.md"),
        *(REPOSITORY / "docs" / "howto").glob("*.md"),
    ]:
        unknown = set(identifier.findall(page.read_text(encoding="utf-8"))) - words - libraries
        assert not unknown, f"{page.relative_to(REPOSITORY)} names {sorted(unknown)}, which the sources don't have"


def test_readme_and_results_have_the_same_table():
    results = (REPOSITORY / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:reports|multiple choice): .*$", README, re.MULTILINE)
    assert len(rows) == 10 and all(row in results for row in rows)


def test_the_first_command_is_the_demo():
    """What it runs, tests/experiments/test_demo.py runs with few steps."""
    command = next(line for line in blocks("bash")[0].splitlines() if line).split("#")[0].split()
    assert command == ["make", "demo"]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    planned = subprocess.run(
        [*command, "--dry-run", "--old-file", ".venv/.ready"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert planned.stdout.split()[-2:] == ["-m", demo.__spec__.name]


def test_the_first_snippets_of_readme_and_howto_print_a_report(tmp_path):
    """As they are printed, on a tiny model in the demo's folder; in a process of their own, without `import samf`."""
    processor = tiny_processor()
    folder = tmp_path / "runs" / "demo" / "model"
    model_for(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    write_nifti(make_phantom(np.random.default_rng(0)), tmp_path / "scan.nii.gz")
    snippets = [blocks("python")[0], blocks("python", "docs/howto/report.md")[0]]
    assert "import samf" not in str(snippets) and len(snippets[0].splitlines()) <= 13
    code = "\n".join([*snippets, "assert snippet_reports[0] == snippet_reports[1] != ''"])
    code = code.replace("max_new_tokens=512", "max_new_tokens=8").replace("print(", "snippet_reports.append(")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", f"snippet_reports = []\n{code}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_the_snippets_on_metrics_run():
    names: dict[str, Any] = {"np": np, "ratio": ratio, "SampledMetric": SampledMetric, "Sequence": Sequence}
    exec(next(code for code in blocks("python", "docs/howto/extend.md") if "def length_ratio" in code), names)
    assert names["length_ratio"](["a b c"], ["a b"]).value() == 1.5
    exec(blocks("python", "docs/howto/evaluate.md")[0], names)
    assert names["results"]["tasks"]["report"]["findings"]["micro"]["f1"] is None  # neither text has a finding
