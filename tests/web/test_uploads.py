"""What visitors give: only their uploads, under no name of theirs, and errors without paths."""

import zipfile

import pytest

from samf.model.ct_common import CTReadError
from samf.web.uploads import PHANTOMS, UploadError, find_uploads, phantom_file, plain_words, take_scan


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "page" / "uploads"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "page" / "studies" / "x"
    folder.mkdir(parents=True)
    return folder


def upload(uploads, name, content=b"voxels"):
    """As gradio's route leaves it."""
    folder = uploads / f"hash-of-{name}"
    folder.mkdir()
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_uploads_are_found_also_as_gradio_s_clients_name_them(uploads):
    files = [upload(uploads, "a"), {"path": upload(uploads, "b"), "meta": {"_type": "gradio.FileData"}}]
    assert [path.name for path in find_uploads(files, uploads, 100)] == ["a", "b"]


def test_no_other_file_of_the_server_is_taken_for_an_upload(uploads, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (uploads / "hash").mkdir()
    (uploads / "hash" / "link").symlink_to(secret)
    (uploads / "loose").write_bytes(b"unfinished")
    bad = [
        str(secret), str(uploads / "hash" / "link"), str(uploads / "hash" / ".." / ".." / ".." / "secret"), "/etc/passwd",
        str(uploads / "hash"), str(uploads / "loose"), str(uploads / "hash" / "gone"), "", "a\0b", "x" * 9999, None, 7, [],
        {"path": str(secret)}, {"path": None}, {},
    ]  # fmt: skip
    for path in bad:
        with pytest.raises(UploadError, match="no longer there"):
            find_uploads([path], uploads, 100)
    for files in (None, [], "path", {}, 3):
        with pytest.raises(UploadError):
            find_uploads(files, uploads, 100)


def test_too_many_bytes_or_files_are_refused(uploads):
    files = [upload(uploads, name, bytes(60)) for name in "ab"]
    with pytest.raises(UploadError, match="Choose one series"):
        find_uploads(files, uploads, 100)
    with pytest.raises(UploadError, match="at most"):
        find_uploads(files * 3000, uploads, 100)


def test_files_are_moved_and_numbered_so_that_their_names_are_gone(uploads, study):
    files = find_uploads([upload(uploads, "Doe^Jane.dcm"), upload(uploads, "b")], uploads, 100)
    folder = take_scan(files, study)
    assert [path.name for path in sorted(folder.iterdir())] == ["000000", "000001"]
    assert list(uploads.iterdir()) == []
    single = take_scan(find_uploads([upload(uploads, "Doe_Jane.nii.gz")], uploads, 100), study)
    assert single == study / "scan"


def test_a_zip_is_unpacked_into_the_study_whatever_its_members_are_called(uploads, study, tmp_path):
    archive = tmp_path / "series.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("../../outside", "/absolute", "Doe^Jane/1.dcm"):
            packed.writestr(name, b"slice")
    folder = take_scan(find_uploads([upload(uploads, "z", archive.read_bytes())], uploads, 10_000), study)
    assert [path.name for path in sorted(folder.iterdir())] == ["000000", "000001", "000002"]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"series.zip", "000000", "000001", "000002"}


def test_bad_zips_are_one_sentence_without_a_path(uploads, study):
    for content, words in ((b"PK\x03\x04 no zip", "is damaged"), (b"PK\x05\x06" + bytes(18), "is empty")):
        files = find_uploads([upload(uploads, "z", content)], uploads, 100)
        with pytest.raises((CTReadError, UploadError), match=words) as caught:
            take_scan(files, study)
        message = plain_words(caught.value, study.parent.parent)
        assert str(study.parent.parent) not in message and message.startswith("This ")
        (study / "series").rmdir()
    files = find_uploads([upload(uploads, "one", b"PK\x03\x04"), upload(uploads, "two")], uploads, 100)
    with pytest.raises(UploadError, match="one zip, or the files of one series"):
        take_scan(files, study)


def test_messages_lose_the_server_s_paths():
    root = "/tmp/samf-page-x"
    for given, expected in {
        f"{root}/studies/ab/scan: no CT; expected HU.": "This scan: no CT; expected HU.",
        f"{root}/studies/ab/series: file {root}/studies/ab/series/000003: broken.": "This scan: file the scan: broken.",
        f"can't unpack into {root}/studies/ab.": "can't unpack into the scan.",
        "Not HU: 1st is 0. Export it again. allow_non_ct=True takes them.": "Not HU: 1st is 0. Export it again.",
        "nothing to hide\nbut lines": "nothing to hide but lines",
    }.items():
        assert plain_words(given, root) == expected


def test_phantoms_are_made_once_and_known_by_name(tmp_path):
    path = phantom_file("normal", tmp_path)
    made = path.stat().st_mtime_ns
    assert phantom_file("normal", tmp_path).stat().st_mtime_ns == made
    for name in ("../x", "", None, 3, "none"):
        with pytest.raises(UploadError):
            phantom_file(name, tmp_path)
    assert set(PHANTOMS) >= {"normal"}
