"""Two builds side by side: each process in its own tree, turns, equality, failures of one build, and what is left behind."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from samf.benchmarks import builds as command
from samf.benchmarks import process_memory
from samf.benchmarks.build_lines import builds as build_module
from samf.benchmarks.build_lines.builds import NOW, Build, BuildError, open_builds
from samf.benchmarks.build_lines.lines import LINES
from samf.benchmarks.build_lines.plan import PROGRAMS, Inputs, Target, Workload
from samf.benchmarks.build_lines.processes import Outcome, Reading
from samf.benchmarks.build_lines.results import compare_rounds, difference
from samf.benchmarks.build_lines.table import markdown
from samf.benchmarks.build_programs.driver import Recorder, load_program
from samf.benchmarks.workloads import LineSkipped
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor

NO_TARGET = Target()
# Says where samf comes from, without the classes that `import samf` brings in other programs.
_WHERE = "import sys; sys.argv[0] = 'samf'; import samf; open('where', 'w').write(samf.__file__)"


@pytest.fixture
def earlier(tmp_path):
    """A package that stands for an earlier build: it has almost nothing of this one."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def inputs(folder):
    for name in ("line", "shared"):
        (folder / name).mkdir()
    return Inputs(folder / "line", folder / "shared", is_tiny=True)


def where(out):
    return str(Path((out / "where").read_text()).resolve().parent)


# --- Processes --------------------------------------------------------------------------------------------------------


def test_each_process_imports_its_own_build_and_the_order_turns(earlier, scratch):
    imported = []

    def note(out):
        imported.append(where(out))

    workload = Workload("where", command=["-c", _WHERE], read_results=note, rounds=3)
    with open_builds(str(earlier), scratch) as builds:
        result = command.run_rounds(workload, builds, scratch / "where", rounds=5)
    before, now = str(earlier), str(NOW)
    assert imported == [before, now, now, before, before, now]
    assert not result.error and result.figures[0].ratio["repeats"] == 3


def test_neither_the_working_folder_nor_that_of_a_script_hides_a_build(earlier, scratch, monkeypatch):
    """The process starts in a folder with another samf, and PYTHONPATH had one before."""
    (scratch / "other" / "samf").mkdir(parents=True)
    (scratch / "other" / "samf" / "__init__.py").write_text("raise ImportError('another samf')")
    monkeypatch.setenv("PYTHONPATH", str(scratch / "other"))
    script = scratch / "other" / "script.py"
    script.write_text(_WHERE)
    imported = []
    workload = Workload("where", command=[str(script)], read_results=lambda out: imported.append(where(out)))
    with open_builds(str(earlier), scratch) as builds:
        result = command.run_rounds(workload, builds, scratch / "where", rounds=1)
    assert not result.error and imported == [str(earlier), str(NOW)]


def test_a_build_that_is_not_the_one_imported_is_refused(earlier, scratch):
    with open_builds(str(earlier), scratch) as builds:
        mixed = Build("before", NOW, builds[0].path, "mixed")
        with pytest.raises(BuildError, match="imported samf from"):
            mixed.check()


def test_modules_that_a_build_lacks_are_not_taken_from_an_installed_checkout(monkeypatch):
    """Finders like setuptools' for `pip install -e`: of this package, and of another one."""
    finders = []
    for package in ("samf", "other"):
        module = ModuleType(f"finder_of_{package}")
        exec(f"MAPPING = {{{package!r}: '/a/folder'}}\nclass Finder: pass", module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        finders.append(module.Finder)
    usual = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    monkeypatch.setattr(sys, "meta_path", [*usual, *finders])
    exec(build_module.WITHOUT_INSTALLED)
    assert sys.meta_path == [*usual, finders[1]]


def test_a_workload_that_fails_in_one_build_costs_no_other(earlier, scratch):
    good = Workload("good", command=["-c", _WHERE], rounds=1)
    newer = Workload("newer", command=["-c", f"{_WHERE}; import samf.utils.files"], rounds=1)
    lines = {
        "first": lambda given: [newer, good],
        "second": lambda given: 1 / 0,
        "third": lambda given: (_ for _ in ()).throw(LineSkipped("needs a moon")),
        "fourth": lambda given: [good],
    }
    args = command.parse_args(["--before", str(earlier), f"--json={scratch / 'a.json'}", f"--folder={scratch}"])
    args.lines = list(lines)
    first, second, third, fourth = command.run(args, lines)
    assert "before: exit status 1: ModuleNotFoundError" in first.workloads[0].error and not first.workloads[0].figures
    assert first.workloads[1].figures and fourth.workloads[0].figures
    assert "ZeroDivisionError" in second.error and third.skipped == "needs a moon"
    found = json.loads((scratch / "a.json").read_text())
    assert [line["name"] for line in found["lines"]] == list(lines)
    assert list(scratch.iterdir()) == [scratch / "a.json"]


def test_memory_counts_the_processes_that_a_command_starts():
    block = "import time; held = bytearray(80_000_000); time.sleep(0.5)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {block!r}])"
    found = process_memory.run_measured([sys.executable, "-c", script])
    assert found.status == 0 and 80e6 < found.memory < 200e6


def test_an_interrupt_ends_the_command(tmp_path):
    pid = tmp_path / "pid"

    def interrupt(*_):
        """Once the command runs."""
        if pid.is_file() and pid.read_text():
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    script = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    try:
        with pytest.raises(KeyboardInterrupt):
            process_memory.run_measured([sys.executable, "-c", script], folder=tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_results_that_cannot_be_read_are_a_failure_of_their_build(earlier, scratch):
    workload = Workload("where", command=["-c", "pass"], read_results=where)
    with open_builds(str(earlier), scratch) as builds:
        result = command.run_rounds(workload, builds, scratch / "where", rounds=1)
    assert result.error.startswith("before: its results can't be read: FileNotFoundError")


# --- Checkouts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository that stands for this one: its second commit changes the package."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("init", "--quiet")
    for text in ("NAME = 'first'", "NAME = 'second'"):
        (root / "__init__.py").write_text(text)
        git("add", ".")
        git("commit", "--quiet", "--no-verify", "-m", text)
    monkeypatch.setattr(build_module, "NOW", root)
    return git


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit])
def test_an_earlier_commit_is_checked_out_and_removed_whatever_happens(repository, scratch, error):
    trees = repository("worktree", "list")
    names = {}
    with pytest.raises(error) if error else nullcontext(), open_builds("HEAD~1", scratch) as builds:
        for build in builds:
            names[build.name] = (build.path / "samf" / "__init__.py").read_text()
        assert builds[0].commit == repository("rev-parse", "--short", "HEAD~1").strip()
        if error:
            raise error
    assert names == {"before": "NAME = 'first'", "now": "NAME = 'second'"}
    assert repository("worktree", "list") == trees
    assert not (scratch / "before" / "samf").exists()


def test_what_is_neither_commit_nor_package_is_named(repository, scratch, capsys):
    assert command.main(["--before", "no-such-commit", "--folder", str(scratch)]) == 2
    message = capsys.readouterr().err
    assert "no-such-commit" in message and "PATH/samf" in message
    assert not list(scratch.iterdir())


def test_files_that_differ_from_the_commit_are_said(repository, scratch):
    (build_module.NOW / "__init__.py").write_text("NAME = 'third'")
    with open_builds("HEAD", scratch) as builds:
        assert [build.commit.endswith("with changes") for build in builds] == [False, True]


# --- Figures ----------------------------------------------------------------------------------------------------------


def outcome(seconds, memory=None, results=None):
    return Outcome({"task": Reading(seconds, seconds / 2, memory)}, results)


def compared(pairs, target=NO_TARGET, tolerance=0.0):
    rounds = [dict(zip(("before", "now"), pair, strict=True)) for pair in pairs]
    return compare_rounds(Workload("task", targets={"task": target}, tolerance=tolerance), rounds, seconds=1.0)


def test_ratios_are_those_of_pairs():
    result = compared([(outcome(8.0), outcome(4.0)), (outcome(30.0), outcome(10.0)), (outcome(5.0), outcome(5.0))])
    (figure,) = result.figures
    assert (figure.before["median"], figure.now["median"], figure.ratio["median"]) == (8.0, 5.0, 2.0)
    assert (figure.ratio["minimum"], figure.ratio["maximum"]) == (1.0, 3.0)
    assert result.difference is None and figure.reached is None


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target(seconds=4.0), True),
        (Target(seconds=3.9), False),
        (Target(gain=2.0), True),
        (Target(gain=2.1), False),
        (Target(memory=50), True),
        (Target(seconds=4.0, gain=2.0, memory=49), False),
        (Target(limit="the speed of light"), None),
    ],
)
def test_a_target_is_reached_if_all_its_parts_are(target, reached):
    assert compared([(outcome(8.0, 90), outcome(4.0, 50))], target).figures[0].reached is reached


def test_results_of_every_round_are_compared():
    same, other = {"a": [1.0, "x"]}, {"a": [1.0, "y"]}
    pairs = [
        (outcome(1, results=same), outcome(1, results=same)),
        (outcome(1, results=same), outcome(1, results=other)),
    ]
    assert compared(pairs[:1]).difference == ""
    assert compared(pairs).difference == "/a/1: x and y"


@pytest.mark.parametrize(
    ("first", "second", "tolerance", "found"),
    [
        ({"a": 1.0}, {"a": 1.0 + 1e-10}, 1e-9, ""),
        ({"a": 1.0}, {"a": 1.0 + 1e-8}, 1e-9, "/a"),
        ({"a": 1.0}, {"a": 1.0 + 1e-10}, 0.0, "/a"),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, 1e-9, "only one build has /a/2"),
        ({"a": 1, "b": None}, {"a": 1}, 1e-9, "only one build has /b"),
        ({"a": "1"}, {"a": 1}, 1e-9, "/a"),
        ({"a": None}, {"a": 0.0}, 1e-9, "/a"),
        ("text", "text", 0.0, ""),
        ("text", "Text", 0.0, "the result"),
        ({"a": math.nan}, {"a": math.nan}, 0.0, ""),
        ({"a": math.nan}, {"a": 0.0}, 1.0, "/a"),
    ],
)
def test_the_first_difference_is_named(first, second, tolerance, found):
    assert difference(first, second, tolerance).startswith(found) and bool(
        difference(first, second, tolerance)
    ) == bool(found)


def test_the_table_shows_misses_differences_and_failures():
    missed = compared([(outcome(8.0, 90, "x"), outcome(4.0, 50, "y"))], Target(seconds=1.0, limit="0.5 s of reading"))
    failed = command.WorkloadResult("gone", [], None, 1.0, error="before: a | b")
    text = markdown([command.LineResult("some", [missed, failed], 2.0)], {"before": "abc", "gpu": None})
    row = next(line for line in text.splitlines() if line.startswith("| some | task"))
    for cell in ("8 s", "4 s", "≤ 1 s **(missed)**", "0.5 s of reading", "2.00 ×", "90 → 50 MB", "DIFFERENT"):
        assert f"| {cell} |" in row
    assert "FAILED: before: a \\| b" in text and "results differ: the result: x and y" in text
    assert "before abc." in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1


# --- Lines and programs -----------------------------------------------------------------------------------------------


def test_slices_are_digested_as_they_are_read(tmp_path):
    workload = LINES["formats"](inputs(tmp_path))[0]
    digests = load_program(PROGRAMS / "read_volumes.py").run(dict(workload.task), Recorder())
    for name, path in workload.task["volumes"].items():
        slices = SamfImageProcessor().extract(read_ct(path))["slices"]
        assert digests[name] == hashlib.sha256(slices.tobytes()).hexdigest()
    assert len(set(digests.values())) > 1  # the oblique one shows other slices
    assert digests["int16"] == digests[".nrrd"] == digests[".mha"] == digests["float32"]


@pytest.mark.parametrize("line", ["caches", "answers", "step", "dino"])
def test_the_programs_of_a_line_run_twice_alike(line, tmp_path):
    """In this process; what they return is what the builds are compared by."""
    try:
        workloads = LINES[line](inputs(tmp_path))
    except LineSkipped as reason:
        pytest.skip(str(reason))
    for workload in workloads:
        if workload.program is None:
            continue
        program, found = load_program(PROGRAMS / f"{workload.program}.py"), []
        for name in ("first", "second"):
            folders = {"folder": str(tmp_path / name), "out": str(tmp_path / f"{name}_out")}
            for folder in folders.values():
                Path(folder).mkdir()
            if workload.prepare is not None:
                program.run({**workload.prepare, **folders}, Recorder())
            recorder = Recorder()
            found.append(program.run({**workload.task, **folders}, recorder))
            assert recorder.figures and all(figure["seconds"] > 0 for figure in recorder.figures.values())
        assert found[0] and not difference(*found, workload.tolerance)


def test_resuming_finds_nothing_left(tmp_path):
    workload = next(one for one in LINES["caches"](inputs(tmp_path)) if one.name == "resume")
    program, folder = load_program(PROGRAMS / "resume_cache.py"), {"folder": str(tmp_path), "out": str(tmp_path)}
    program.run({**workload.prepare, **folder}, Recorder())
    assert program.run({**workload.task, **folder}, Recorder()) == {
        "volumes": 40,
        "entries": 40,
        "failed": 0,
        "left": 0,
    }


def test_a_build_equals_itself(tmp_path, capsys):
    """Both sides are this build: its import and its help."""
    arguments = ["--before", str(NOW), "--lines=start", "--rounds=1", "--size=tiny", f"--markdown={tmp_path / 'a.md'}"]
    assert command.main([*arguments, f"--json={tmp_path / 'a.json'}"]) == 0
    (line,) = json.loads((tmp_path / "a.json").read_text())["lines"]
    figures = [figure for workload in line["workloads"] for figure in workload["figures"]]
    names = ["import samf", "samf --help", "samf report --help"]
    assert [figure["name"] for figure in figures] == names
    assert all(0 < figure["ratio"]["median"] < math.inf for figure in figures)
    assert capsys.readouterr().out == (tmp_path / "a.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("line", [line for line in LINES if line != "start"])
def test_results_of_a_line_are_equal_in_equal_builds(line, tmp_path):
    arguments = ["--before", str(NOW), f"--lines={line}", "--rounds=1", "--size=tiny", f"--json={tmp_path / 'a.json'}"]
    assert command.main(arguments) == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())["lines"]
    if not found["skipped"]:
        assert all(workload["difference"] == "" and workload["figures"] for workload in found["workloads"])
