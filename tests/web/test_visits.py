"""Visitors' files: gone when they go, not before what works with them has ended, and never those of others."""

import os
import time

import pytest

from samf.web import visits as module
from samf.web.turns import BusyError
from samf.web.visits import Visits


@pytest.fixture
def visits(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    opened = Visits(most=2)
    yield opened
    opened.close()


def test_files_go_with_their_visitor_and_with_a_new_scan(visits):
    first, other = visits.new_study("a"), visits.new_study("b")
    (first.folder / "scan").write_bytes(b"voxels")
    second = visits.new_study("a")
    assert not first.folder.exists() and second.folder.exists() and visits.study("a") is second
    visits.end("a")
    assert not second.folder.exists() and other.folder.exists() and visits.study("a") is None


def test_files_stay_while_something_works_with_them(visits):
    study = visits.new_study("a")
    study.hold()
    visits.end("a")
    assert study.folder.exists() and study.ended
    study.release()
    assert not study.folder.exists()


def test_names_of_folders_tell_nothing_and_are_no_ones_to_guess(visits):
    folder = visits.new_study("visitor-name").folder
    assert "visitor-name" not in str(folder) and len(folder.name) == 32
    assert os.stat(visits.root).st_mode & 0o077 == 0, "other users of the machine can't read them"


def test_too_many_visitors_are_refused(visits):
    visits.new_study("a"), visits.new_study("b")
    with pytest.raises(BusyError):
        visits.new_study("c")
    visits.new_study("a")  # who is known already may choose another scan


def test_sweeping_ends_idle_visits_and_removes_what_uploads_left(visits):
    study, fresh = visits.new_study("a"), visits.uploads / "fresh"
    fresh.write_bytes(b"")
    for name in ("half", "hash"):
        (visits.uploads / name).mkdir()
    old = time.time() - 10_000
    os.utime(visits.uploads / "half", (old, old))
    lost = visits.studies / "lost"
    lost.mkdir()
    os.utime(lost, (old, old))
    visits.sweep()
    assert {path.name for path in visits.uploads.iterdir()} == {"fresh", "hash"} and not lost.exists()
    assert visits.study("a") is study
    study.hold()
    visits.idle_seconds = 0.0
    visits.sweep()
    assert visits.study("a") is study, "what is worked on isn't idle"
    study.release()
    visits.idle_seconds = -1.0
    visits.sweep()
    assert len(visits) == 0 and not study.folder.exists()


def test_the_next_page_removes_what_a_killed_one_left(visits, tmp_path):
    pytest.importorskip("fcntl", reason="without file locks a page can't know that another was killed")
    killed, foreign = tmp_path / "samf-page-killed", tmp_path / "samf-page-foreign"
    for folder in (killed, foreign):
        folder.mkdir()
    (killed / "in_use").touch()
    other = Visits()
    assert not killed.exists() and foreign.exists() and visits.root.exists()
    other.close()
    assert not other.root.exists()
