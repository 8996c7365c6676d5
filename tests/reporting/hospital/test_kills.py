"""A kill between any two steps, and a restart: no acknowledged image is lost, no report is lost, none becomes two."""

import contextlib
import os
from pathlib import Path

import pytest
from hospital_stand_ins import FarEnd, image, plan_for, stored

from samf.reporting.hospital import worker
from samf.reporting.hospital.image_store import ImageStore
from samf.reporting.hospital.journal import Journal
from samf.reporting.hospital.service import Service
from samf.reporting.hospital.status import read_failures

GOOD, BAD = "1.2.3.4", "1.2.3.5"
IMAGES = [(GOOD, *image(GOOD, 0)), (GOOD, *image(GOOD, 1)), (BAD, *image(BAD, 0, ImageComments="BROKEN"))]


class Killed(BaseException):
    """The process ends here: no handler of the code may catch it."""


class Steps:
    """Raises at the n-th step: before or after each of the patched calls."""

    def __init__(self, at: int):
        self.at, self.count = at, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Killed

    def patch(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        call = getattr(owner, name)

        def stepped(*arguments, **options):
            self.step()
            result = call(*arguments, **options)
            self.step()
            return result

        monkeypatch.setattr(owner, name, stepped)


def live(root: Path, far: FarEnd, acknowledged: set[str]) -> None:
    """One life of the process: senders send what was not acknowledged, then reports are made and sent."""
    with contextlib.closing(Journal(root)) as journal:
        store = ImageStore(root)
        service = Service(plan_for(root, far), store, journal)
        service.recover()
        for series, name, content in IMAGES:
            if name not in acknowledged:
                key, _ = store.put(series, name, content)
                service.clock.touch(key)
                acknowledged.add(name)
        for key in service.clock.advance(1.0):
            service.worker.process(key)
        while not service.senders[0].deliver():
            pass


def run(root: Path, at: int) -> int:
    """Live until nothing kills, and return how many steps there were; the first life ends at step `at`."""
    far, acknowledged, steps = FarEnd(), set(), Steps(at)
    with pytest.MonkeyPatch.context() as patches:
        for name in ("start", "report", "fail", "delivered"):
            steps.patch(patches, Journal, name)
        steps.patch(patches, FarEnd, "take")
        steps.patch(patches, worker, "write_report")
        for name in ("replace", "fsync"):
            steps.patch(patches, os, name)
        with contextlib.suppress(Killed):
            live(root, far, acknowledged)
    assert acknowledged <= stored(ImageStore(root))
    live(root, far, acknowledged)
    if not at % 5:
        live(root, far, acknowledged)  # a restart without cause changes nothing
    check(root, far)
    return steps.count


def check(root: Path, far: FarEnd) -> None:
    assert len(far.got) == 1, "one object, however often it was sent"
    copies = next(iter(far.got.values()))
    assert len(set(copies)) == 1 and len(copies) <= 2
    assert stored(ImageStore(root)) == {name for _, name, _ in IMAGES}
    (failure,) = read_failures(root)["series"]
    assert failure["series"] == BAD and "damaged" in failure["reason"]
    assert [path.stem for path in Path(failure["kept_in"]).iterdir()] == [f"{BAD}.1"]
    assert not list((root / "incoming").iterdir())
    reports = [path.relative_to(root / "reports").parts[1:] for path in (root / "reports").rglob("*") if path.is_file()]
    assert sorted(reports) == [("v1", "report.json"), ("v1", "report.sr.dcm")]


def test_a_kill_at_any_step(tmp_path):
    total = run(tmp_path / "none", 0)
    assert total > 40
    for at in range(1, total + 1):
        run(tmp_path / str(at), at)


def test_a_series_that_kills_the_process_is_given_up(tmp_path):
    """As when it needs more memory than there is."""
    root, store = tmp_path, ImageStore(tmp_path)
    store.put(*IMAGES[0])

    def deadly(scan):
        raise Killed

    for _ in range(worker.MAX_STARTS + 1):
        with contextlib.closing(Journal(root)) as journal:
            service = Service(plan_for(root, make_report=deadly), ImageStore(root), journal)
            service.recover()
            for key in service.clock.advance(1.0):
                with contextlib.suppress(Killed):
                    service.worker.process(key)
    (failure,) = read_failures(root)["series"]
    assert f"ended {worker.MAX_STARTS} times" in failure["reason"]


def test_a_power_cut_leaves_no_entry_without_its_files(tmp_path, monkeypatch):
    """Everything that the journal names was flushed before the entry was made."""
    order: list[str] = []
    flushed = os.fsync
    report = Journal.report
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(os.readlink(f"/proc/self/fd/{handle}")), flushed(handle))
    )
    monkeypatch.setattr(Journal, "report", lambda *values: (order.append("entry"), report(*values)))
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are listed in /proc, on Linux only")
    live(tmp_path, FarEnd(), set())
    before = order[: order.index("entry")]
    assert any(path.endswith("report.sr.dcm") for path in before)
    assert str(next((tmp_path / "reports").iterdir())) in before
    assert sum(path.startswith(str(tmp_path / "series") + "/") for path in before) >= 3
