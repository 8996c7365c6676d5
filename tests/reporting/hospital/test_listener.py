"""The listener on the loopback: echo, storing, refusing, back-pressure, storage commitment, and a report at the far end."""

import contextlib
import http.server
import json
import logging
import shutil
import threading
from types import SimpleNamespace

import pytest
from dicom_series import slice_dataset, slice_hu, stack_positions
from hospital_stand_ins import image, no_delay, plan_for, stored

from samf.reporting.hospital.address import PeerAddress
from samf.reporting.hospital.destinations import (
    AUTHORIZATION,
    DicomDestination,
    RefusedError,
    StowDestination,
    UnreachableError,
)
from samf.reporting.hospital.image_store import ImageStore
from samf.reporting.hospital.receiver import Listening
from samf.reporting.hospital.service import BusyFolderError, listen
from samf.reporting.hospital.status import read_failures, read_status

pynetdicom = pytest.importorskip("pynetdicom", reason="the listener needs pynetdicom")
evt = pynetdicom.evt
CT, COMMITMENT, VERIFICATION = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.20.1", "1.2.840.10008.1.1"
SERIES = "1.2.3.4"


@pytest.fixture
def far():
    """A storage SCP; `.got` lists what arrived."""
    found = SimpleNamespace(got=[], status=0x0000)

    def take(event):
        found.got.append(event.dataset)
        return found.status

    entity = pynetdicom.AE("FAR")
    entity.add_supported_context("1.2.840.10008.5.1.4.1.1.88.11")
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    found.peer = PeerAddress("FAR", "127.0.0.1", server.server_address[1])
    yield found
    server.shutdown()


@contextlib.contextmanager
def listening(out, *destinations, **options):
    """A listener in a thread; yields its port, and the service."""
    started, state = threading.Event(), SimpleNamespace()

    def ready(service, port):
        state.service, state.port = service, port
        started.set()

    plan = plan_for(out, *destinations, quiet=options.pop("quiet", 0.5))
    settings = Listening("127.0.0.1", 0, "SAMF", options.pop("min_free", 0), **options)
    thread = threading.Thread(target=lambda: setattr(state, "finished", listen(plan, settings, ready)))
    hook = threading.excepthook
    thread.start()
    try:
        assert started.wait(30)
        yield state
    finally:
        state.service.stopped.set()
        thread.join(30)
        threading.excepthook = hook
        assert state.finished


@contextlib.contextmanager
def associated(port, title="SENDER", handlers=()):
    entity = pynetdicom.AE(title)
    for context in (CT, COMMITMENT, VERIFICATION):
        entity.add_requested_context(context)
    both = [(evt.EVT_CONN_OPEN, no_delay), *handlers]
    association = entity.associate("127.0.0.1", port, ae_title="SAMF", evt_handlers=both)
    yield association
    if association.is_established:
        association.release()


def dataset(number, **tags):
    names = {"SOPInstanceUID": f"{SERIES}.{number + 1}", "SeriesInstanceUID": SERIES, **tags}
    return slice_dataset(slice_hu(stack_positions()[number]), stack_positions()[number], **names)


def until(condition, seconds=30.0):
    tick = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        tick.wait(0.05)
    return False


def test_from_images_to_a_report_at_the_far_end(tmp_path, far, caplog):
    destination = DicomDestination(far.peer, "SAMF")
    with caplog.at_level(logging.DEBUG, "samf"), listening(tmp_path / "out", destination, quiet=4.0) as listener:
        with associated(listener.port) as association:  # a slow machine takes longer than half a second between images
            assert association.send_c_echo().Status == 0x0000
            for number in range(3):
                assert association.send_c_store(dataset(number)).Status == 0x0000
                assert f"{SERIES}.{number + 1}" in stored(ImageStore(tmp_path / "out"))
            assert association.send_c_store(dataset(3, SeriesInstanceUID=None)).Status == 0xA900
            assert association.send_c_store(dataset(3, SeriesInstanceUID="")).Status == 0xA900
            assert association.send_c_store(dataset(3, StudyInstanceUID=None)).Status == 0xA900
        assert until(lambda: read_status(tmp_path / "out").sent)
    assert len(far.got) == 1 and not read_status(tmp_path / "out").waiting
    refused = {item["reason"]: item["images"] for item in read_failures(tmp_path / "out")["refused"]}
    assert refused == {"an image without SeriesInstanceUID": 2, "an image without StudyInstanceUID": 1}
    assert "SECRET" not in caplog.text and SERIES not in caplog.text and "report 1 written" in caplog.text


def test_images_are_refused_when_the_disk_fills(tmp_path, monkeypatch):
    free = [10_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with listening(tmp_path, min_free=9_900) as listener, associated(listener.port) as association:
        assert association.send_c_store(dataset(0)).Status == 0xA700  # it has more than the 100 bytes that are left
        assert not stored(ImageStore(tmp_path))
        free[0] = 100_000
        assert association.send_c_store(dataset(0)).Status == 0x0000


def test_only_allowed_titles_may_call(tmp_path):
    with listening(tmp_path, allowed=("PACS",)) as listener:
        with associated(listener.port, "OTHER") as association:
            assert association.is_rejected
        with associated(listener.port, "PACS") as association:
            assert association.send_c_echo().Status == 0x0000


@pytest.mark.parametrize("own_association", [False, True])
def test_storage_commitment(tmp_path, own_association):
    """One image that is there, one that isn't, one of another class; the result comes where it was asked for."""
    results = []
    came = threading.Event()

    def result(event):
        results.append((event.event_type, event.event_information))
        came.set()
        return 0x0000, None

    handlers = [(evt.EVT_N_EVENT_REPORT, result)]
    entity = pynetdicom.AE("SENDER")
    entity.add_supported_context(COMMITMENT, scu_role=False, scp_role=True)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    peer = PeerAddress("SENDER", "127.0.0.1", server.server_address[1])
    nodes = {"SENDER": peer} if own_association else {}
    with listening(tmp_path, commit_to=nodes) as listener:
        own = [] if own_association else handlers
        with associated(listener.port, handlers=own) as association:
            association.send_c_store(dataset(0))
            association.send_c_store(dataset(1))
            request = _request([(CT, 0), (CT, 9), (COMMITMENT, 1)])
            status, _ = association.send_n_action(request, 1, COMMITMENT, "1.2.840.10008.1.20.1.1")
            assert status.Status == 0x0000 and came.wait(20)
            assert until(lambda: association.is_established)
            empty, _ = association.send_n_action(_request([]), 1, COMMITMENT, "1.2.840.10008.1.20.1.1")
            assert empty.Status == 0x0115
    server.shutdown()
    ((kind, found),) = results
    assert kind == 2 and found.TransactionUID == "1.2.3.99"
    assert [item.ReferencedSOPInstanceUID for item in found.ReferencedSOPSequence] == [f"{SERIES}.1"]
    assert [item.FailureReason for item in found.FailedSOPSequence] == [0x0112, 0x0119]


def _request(instances):
    from pydicom.dataset import Dataset

    request = Dataset()
    request.TransactionUID = "1.2.3.99"
    request.ReferencedSOPSequence = []
    for kind, number in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, f"{SERIES}.{number + 1}"
        request.ReferencedSOPSequence.append(item)
    return request


def test_two_processes_never_share_a_folder(tmp_path):
    with listening(tmp_path), pytest.raises(BusyFolderError, match="another samf listen"):
        listen(plan_for(tmp_path), Listening("127.0.0.1", 0, "SAMF", 0))


def test_what_a_far_end_answers_is_told_apart(tmp_path, far):
    file = tmp_path / "x.dcm"
    sr = slice_dataset(slice_hu((0, 0, 0)), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    sr.save_as(file, enforce_file_format=True)
    destination = DicomDestination(far.peer, "SAMF")
    with destination.connected([file]) as send:
        send(file)
        far.status = 0xB000  # stored, with a warning
        send(file)
        far.status = 0xC123
        with pytest.raises(RefusedError, match="0xC123"):
            send(file)
    assert len(far.got) == 3
    nowhere = DicomDestination(PeerAddress("FAR", "127.0.0.1", 1), "SAMF")
    with pytest.raises(UnreachableError), nowhere.connected([file]):
        pass
    (tmp_path / "ct.dcm").write_bytes(image(SERIES, 0)[1])
    with pytest.raises((RefusedError, UnreachableError)), destination.connected([tmp_path / "ct.dcm"]) as send:
        send(tmp_path / "ct.dcm")


class Answers(http.server.BaseHTTPRequestHandler):
    """A DICOMweb server that answers STOW-RS as `server.answers` says."""

    def do_POST(self):
        self.server.bodies.append((self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
        code, body = self.server.answers.pop(0)
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_stow_and_what_a_server_answers(tmp_path, monkeypatch):
    pytest.importorskip("dicomweb_client", reason="STOW-RS needs dicomweb-client")
    monkeypatch.setenv(AUTHORIZATION, "Bearer abc")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.bodies = []
    stored_item = {"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}]}}
    refused_item = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xC000]}}]}}
    server.answers = [(200, stored_item), (202, refused_item), (409, refused_item), (503, {}), (401, {})]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "x.dcm"
    content = image(SERIES, 0)[1]
    file.write_bytes(content)
    destination = StowDestination(f"http://127.0.0.1:{server.server_address[1]}/dicom-web/")
    with destination.connected([file]) as send:
        send(file)
        for error, words in (
            (RefusedError, "0xC000"),
            (RefusedError, "409"),
            (UnreachableError, "503"),
            (UnreachableError, "401"),
        ):
            with pytest.raises(error, match=words):
                send(file)
    path, headers, body = server.bodies[0]
    assert path == "/dicom-web/studies" and headers["Authorization"] == "Bearer abc"
    assert headers["Content-Type"].startswith("multipart/related") and b"DICM" in body
    server.shutdown()
    server.server_close()
    with pytest.raises(UnreachableError), destination.connected([file]) as send:
        send(file)
