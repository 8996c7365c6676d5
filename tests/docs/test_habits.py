"""CI, pre-commit and `make lint` run the same checks, and the changelog knows every old module name."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from samf.utils.moved import MOVED

REPOSITORY = Path(__file__).resolve().parents[2]


def planned(*targets: str) -> str:
    """What make would run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--always-make", *targets]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_pre_commit_runs_what_make_lint_runs():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    lint = planned("lint", "typecheck")
    for tool in ("ruff check", "ruff format"):
        assert f".venv/bin/{tool}" in lint and any(f".venv/bin/{tool}" in entry for entry in entries)
    assert "mypy -p samf.model" in lint and any(entry.endswith("make --silent typecheck") for entry in entries)


def test_ci_runs_targets_that_exist():
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert set(commands) == {"make lint", "make test", "make test-oldest", "make docs"}
    for command in commands:
        assert planned(command.removeprefix("make "))
    gate = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "make lint" in gate and "make test" in gate


def test_issue_templates_ask_for_no_patient_data():
    templates = list((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in templates if path.name != "config.yml"]
    assert len(forms) == 3 and all({"name", "description", "body"} <= set(form) for form in forms)
    assert all("No patient data" in str(form) for form in forms if "enhancement" not in form["labels"])


def test_the_changelog_names_the_packages_that_modules_moved_to():
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    for new in {new.rpartition(".")[0] for new in MOVED.values()}:
        assert new in text, f"CHANGELOG.md doesn't mention {new}, where utils/moved.py says that modules are"
