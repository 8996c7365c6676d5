"""Completeness, store, journal, worker and sender, each by itself."""

import contextlib
import errno
import http.server
import json
import os
import threading
import time
import zipfile

import pytest
from hospital_stand_ins import FarEnd, export, image, plan_for, report_of, stored

from samf.reporting.hospital.address import PeerAddress
from samf.reporting.hospital.destinations import RefusedError, StowDestination, UnreachableError
from samf.reporting.hospital.folder_inbox import FolderInbox, FolderWatch
from samf.reporting.hospital.image_store import ImageStore, is_uid
from samf.reporting.hospital.inbox import make_key
from samf.reporting.hospital.journal import Journal
from samf.reporting.hospital.quiet import QuietClock
from samf.reporting.hospital.sender import LONGEST_PAUSE, pause
from samf.reporting.hospital.service import Service
from samf.reporting.hospital.status import (
    FAILURES,
    read_failures,
    read_status,
    retry_failures,
    status_text,
    write_failures,
)

SERIES = "1.2.840.1"
KEY = make_key(SERIES)


@pytest.fixture
def journal(tmp_path):
    with contextlib.closing(Journal(tmp_path)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


def put(store, *numbers, **tags):
    for number in numbers:
        store.put(SERIES, *image(SERIES, number, **tags))


def work(service):
    """Let the quiet time pass, make the reports and send them."""
    for _ in range(2):
        for key in service.clock.advance(1.0):
            service.worker.process(key)
    for sender in service.senders:
        while not sender.deliver():
            pass


def come(service, store, *numbers, **tags):
    put(store, *numbers, **tags)
    service.clock.touch(KEY)
    work(service)


# --- Completeness -----------------------------------------------------------------------------------------------------


def test_a_series_is_complete_when_nothing_comes_for_the_quiet_time():
    clock = QuietClock(3.0)
    clock.touch("a")
    assert clock.advance(1.5) == [] and "a" in clock
    clock.touch("a")
    clock.touch("b")
    assert clock.advance(2.0) == [] and len(clock) == 2
    clock.touch("b")
    assert clock.advance(1.5) == ["a"] and "a" not in clock
    assert clock.advance(1.5) == ["b"] and not len(clock)


def test_time_in_which_the_process_was_suspended_is_no_quiet_time():
    clock = QuietClock(10.0)
    clock.touch("a")
    assert clock.advance(3600.0) == []


# --- Store ------------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_came(store):
    name, content = image(SERIES, 0)
    assert store.put(SERIES, name, content) == (KEY, True)
    assert store.put(SERIES, name, content) == (KEY, False)
    assert (store.series / KEY / f"{name}.dcm").read_bytes() == content
    before = store.fingerprint(KEY)
    assert store.put(SERIES, name, image(SERIES, 0, ImageComments="corrected")[1]) == (KEY, True)
    assert store.fingerprint(KEY) != before and store.fingerprint(KEY).files == 1
    assert store.name(KEY) == SERIES and store.find([name, "1.2.3", "../x"]) == {
        name: store.series / KEY / f"{name}.dcm"
    }


def test_a_series_that_was_set_aside_comes_back_with_its_next_image(store):
    put(store, 0)
    store.set_aside(KEY, store.fingerprint(KEY))
    assert store.origin(KEY) == store.failed / KEY and not list(store.present())
    put(store, 1)
    assert store.fingerprint(KEY).files == 2 and not list(store.failed.iterdir())


def test_a_series_that_changed_is_neither_set_aside_nor_removed(store):
    put(store, 0)
    state = store.fingerprint(KEY)
    put(store, 1)
    store.set_aside(KEY, state)
    store.discard(KEY, state.digest)
    assert store.fingerprint(KEY).files == 2
    store.discard(KEY, store.fingerprint(KEY).digest)
    assert store.fingerprint(KEY) is None and stored(store) == set()


def test_an_image_that_can_t_be_stored_leaves_nothing(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        put(store, 0)
    assert not [path for path in store.series.parent.rglob("*") if path.is_file()]


@pytest.mark.parametrize("text", ["", ".", "..", "1.2/../..", "1..2", "1.2\n", "١.٢", "1." * 33, "a"])
def test_what_is_no_uid_names_no_file(text):
    assert not is_uid(text) and is_uid("1.2.840.10008")


# --- Reports and their versions ---------------------------------------------------------------------------------------


def test_late_images_make_a_new_version_and_repeated_ones_do_not(tmp_path, store, journal):
    far = FarEnd()
    service = Service(plan_for(tmp_path, far), store, journal)
    come(service, store, 0, 1)
    come(service, store, 0, 1)
    assert len(far.got) == 1 and journal.find(KEY).version == 1
    come(service, store, 2)
    assert len(far.got) == 2 and journal.find(KEY).version == 2
    texts = [json.loads((tmp_path / "reports" / KEY / v / "report.json").read_text())["text"] for v in ("v1", "v2")]
    assert [text.partition(",")[0] for text in texts] == ["2 images", "3 images"]


def test_images_that_come_during_a_report_delay_it(tmp_path, store, journal):
    calls = []

    def slow(scan):
        calls.append(scan)
        if len(calls) == 1:
            put(store, 1)
        return report_of(scan)

    far = FarEnd()
    service = Service(plan_for(tmp_path, far, make_report=slow), store, journal)
    come(service, store, 0)
    assert len(calls) == 2 and len(far.got) == 1 and journal.find(KEY).files == 2 and journal.find(KEY).version == 1


def test_a_report_that_waits_is_replaced_by_its_next_version(tmp_path, store, journal):
    far = FarEnd()
    far.error = UnreachableError("no answer")
    service = Service(plan_for(tmp_path, far), store, journal)
    for numbers in ((0, 1), (2,)):
        put(store, *numbers)
        service.clock.touch(KEY)
        for key in service.clock.advance(1.0):
            service.worker.process(key)
    far.error = None
    work(service)
    assert len(far.got) == 1 and read_status(tmp_path).waiting == {}


def test_images_are_removed_after_their_time_and_late_ones_are_no_series(tmp_path, store, journal):
    far = FarEnd()
    service = Service(plan_for(tmp_path, far, keep_images=0.0), store, journal)
    come(service, store, 0, 1)
    assert stored(store)
    service.tidy()
    assert not stored(store) and read_status(tmp_path).reported == 1
    come(service, store, 2)
    (failure,) = read_failures(tmp_path)["series"]
    assert "send the whole series again" in failure["reason"] and len(far.got) == 1
    come(service, store, 0, 1)  # the rest: the whole series is there now
    assert len(far.got) == 2 and not read_failures(tmp_path)["series"]


def test_images_of_reports_that_have_not_arrived_are_kept(tmp_path, store, journal):
    far = FarEnd()
    far.error = UnreachableError("no answer")
    service = Service(plan_for(tmp_path, far, keep_images=0.0), store, journal)
    come(service, store, 0)
    service.tidy()
    assert stored(store)


def test_a_failure_is_written_for_people_and_ends_with_its_cause(tmp_path, store, journal):
    service = Service(plan_for(tmp_path), store, journal)
    come(service, store, 0, ImageComments="BROKEN")
    (failure,) = json.loads((tmp_path / FAILURES).read_text())["series"]
    assert failure["series"] == SERIES and failure["kept_in"] == str(store.failed / KEY)
    assert str(tmp_path) not in failure["reason"]
    come(service, store, 0)  # the image, repaired
    write_failures(tmp_path)
    assert not (tmp_path / FAILURES).exists() and journal.find(KEY).state == "reported"


def test_a_person_can_let_failures_be_tried_again(tmp_path, store, journal):
    broken = [True]

    def sometimes(scan):
        if broken[0]:
            raise ValueError("no model today")
        return report_of(scan)

    service = Service(plan_for(tmp_path, make_report=sometimes), store, journal)
    come(service, store, 0)
    assert not list(store.present())
    broken[0] = False
    assert retry_failures(tmp_path) == 1
    service.tidy()
    work(service)
    assert journal.find(KEY).state == "reported" and not list(store.failed.iterdir())
    assert retry_failures(tmp_path) == 0


def test_errors_of_the_program_name_no_value(tmp_path, store, journal):
    def wrong(scan):
        raise KeyError("SECRET^NAME")

    come(Service(plan_for(tmp_path, make_report=wrong), store, journal), store, 0)
    (failure,) = read_failures(tmp_path)["series"]
    assert "SECRET" not in failure["reason"] and "KeyError in hospital_stand_ins" not in failure["reason"]
    assert failure["reason"].startswith("internal error: KeyError in test_parts.py")


def test_a_full_disk_is_no_fault_of_a_series(tmp_path, store, journal):
    full = [True]

    def export_if_there_is_room(*arguments):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return export(*arguments)

    service = Service(plan_for(tmp_path, export=export_if_there_is_room), store, journal)
    put(store, 0)
    with pytest.raises(OSError):
        service.worker.process(KEY)
    assert journal.find(KEY).state == "started"
    full[0] = False
    service.worker.process(KEY)
    assert journal.find(KEY).state == "reported"


# --- Sending ----------------------------------------------------------------------------------------------------------


def test_pauses_grow_and_end_growing():
    assert [pause(tries, LONGEST_PAUSE) for tries in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert pause(10_000, LONGEST_PAUSE) == LONGEST_PAUSE


def test_a_far_end_that_is_down_gets_everything_when_it_is_back(tmp_path, store, journal):
    far = FarEnd()
    service = Service(plan_for(tmp_path, far), store, journal)
    far.error = UnreachableError("no answer")
    put(store, 0)
    service.worker.process(KEY)
    (sender,) = service.senders
    assert [sender.deliver() for _ in range(3)] == [1, 2, 4]
    assert read_status(tmp_path).waiting == {far.name: 1} and "no answer" in status_text(read_status(tmp_path))
    assert read_failures(tmp_path)["undelivered"][0]["reason"] == "no answer"
    far.error = None
    assert sender.deliver() == 0 and len(far.got) == 1
    assert read_status(tmp_path).sent == {far.name: 1} and not read_failures(tmp_path)["undelivered"]


def test_a_file_that_is_refused_stops_no_other(tmp_path, store, journal, monkeypatch):
    far = FarEnd()
    refused, take = [], far.take

    def choosy(file):
        if not refused:
            refused.append(file)
            raise RefusedError("status 0xA900")
        take(file)

    far.take = choosy
    service = Service(plan_for(tmp_path, far), store, journal)
    for series in (SERIES, "1.2.840.2"):
        key, _ = store.put(series, *image(series, 0))
        service.worker.process(key)
    assert service.senders[0].deliver() == 0
    assert len(far.got) == 1 and read_failures(tmp_path)["undelivered"][0]["reason"] == "status 0xA900"
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    service.senders[0].deliver()
    assert len(far.got) == 2


@pytest.mark.parametrize(
    "text", ["PACS", "PACS@host", "@host:1", "A" * 17 + "@host:1", "PACS@host:0", "PACS@host:70000"]
)
def test_addresses(text):
    with pytest.raises(ValueError, match="AE@host:port"):
        PeerAddress.parse(text)
    assert PeerAddress.parse("MY PACS@[::1]:104") == PeerAddress("MY PACS", "::1", 104)
    assert str(PeerAddress.parse("MY PACS@[::1]:104")) == "MY PACS@[::1]:104"


def test_an_address_with_a_password_is_refused_without_naming_it():
    with pytest.raises(ValueError, match="SAMF_STOW_AUTHORIZATION") as error:
        StowDestination("https://user:geheim@host/dicom-web")
    assert "geheim" not in str(error.value)


STORED = {"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}]}}
FAILED = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA700]}}]}}


@pytest.mark.parametrize("media", ["application/dicom+json", "Application/dicom+json; charset=utf-8"])
@pytest.mark.parametrize(
    ("code", "body", "error", "words"),
    [
        (200, STORED, None, ""),
        (200, None, None, ""),
        (202, STORED, None, ""),  # with a warning
        (202, FAILED, RefusedError, "0xA700"),
        (202, None, RefusedError, "202"),
        (409, FAILED, RefusedError, "409"),
        (400, None, RefusedError, "400"),
        (401, None, UnreachableError, "401"),
        (503, None, UnreachableError, "503"),
    ],
)
def test_answers_of_a_dicomweb_server(tmp_path, media, code, body, error, words):
    file = tmp_path / "report.dcm"
    file.write_bytes(image(SERIES, 0)[1])
    with answering(code, media, body) as (address, requests):
        destination = StowDestination(address)
        with destination.connected([file]) as send:
            if error is None:
                send(file)
            else:
                with pytest.raises(error, match=words):
                    send(file)
    assert [path for path, _ in requests] == ["/dicom-web/studies"]
    assert file.read_bytes()[128:132] in requests[0][1] and b'type="application/dicom"' not in requests[0][1]


def test_a_dicomweb_server_that_is_gone_is_unreachable(tmp_path):
    (tmp_path / "report.dcm").write_bytes(image(SERIES, 0)[1])
    with answering(200, "", None) as (address, _):
        destination = StowDestination(address)
    with destination.connected([]) as send, pytest.raises(UnreachableError):
        send(tmp_path / "report.dcm")


@contextlib.contextmanager
def answering(code, media, body):
    """Serve one answer to every POST; yields the address and the list of what was posted."""
    posted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            content = b"" if body is None else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dicom-web", posted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- The watched folder -----------------------------------------------------------------------------------------------


def test_a_watched_folder_tells_what_is_new_or_has_changed(tmp_path):
    folder = tmp_path / "in"
    (folder / "series").mkdir(parents=True)
    inbox = FolderInbox(folder, tmp_path / "scratch")
    watch = FolderWatch(inbox)
    assert watch.changed() == []  # an empty folder is no series yet
    (folder / "series" / "1.dcm").write_bytes(image(SERIES, 0)[1])
    (folder / ".hidden").write_bytes(b"x")
    (folder / "scan.nii.gz.part").write_bytes(b"x")
    assert len(watch.changed()) == 1 and watch.changed() == []
    (folder / "series" / "2.dcm").write_bytes(image(SERIES, 1)[1])
    (key,) = watch.changed()
    assert inbox.name(key) == "series" and inbox.fingerprint(key).files == 2


def test_zips_of_slices_are_unpacked_while_they_are_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("../../out.dcm", image(SERIES, 0)[1])
    inbox = FolderInbox(folder, tmp_path / "scratch")
    (key,) = inbox.present()
    with inbox.opened(key) as scan:
        assert [path.read_bytes() for path in scan.iterdir()] == [image(SERIES, 0)[1]]
        assert scan.is_relative_to(tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir()) and not (tmp_path / "out.dcm").exists()


def test_files_in_a_watched_folder_are_never_changed(tmp_path, journal):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good").mkdir()
    (folder / "bad").mkdir()
    (folder / "good" / "1").write_bytes(image(SERIES, 0)[1])
    (folder / "bad" / "1").write_bytes(image(SERIES, 0, ImageComments="BROKEN")[1])
    inbox = FolderInbox(folder, tmp_path / "scratch")
    far = FarEnd()
    service = Service(plan_for(tmp_path, far, keep_images=0.0), inbox, journal)
    watch = FolderWatch(inbox)
    for key in watch.changed():
        service.clock.touch(key)
    work(service)
    service.tidy()
    assert len(far.got) == 1 and [item["series"] for item in read_failures(tmp_path)["series"]] == ["bad"]
    assert sorted(path.name for path in folder.rglob("1")) == ["1", "1"] and watch.changed() == []
