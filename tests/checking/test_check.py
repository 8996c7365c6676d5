"""`samf data check`: what was planted in a data set is found, with its reason."""

import gzip
import json
import os
import signal

import nibabel
import numpy as np
import pytest
import set_stand_ins as stand_ins
from typer.testing import CliRunner

from samf import preprocess
from samf.checking import command, files
from samf.checking.files import RESULTS, FileOptions, check_files
from samf.checking.volumes import MASK, MISSING, check_volume
from samf.cli.main import app
from samf.model.ct_common import VolumeRef
from samf.model.ct_volume import CTReadError, read_ct

COLUMNS = ["--volume_column", "scan", "--report_column", "text", "--patient_column", "who", "--split_column", "part"]


def run(capsys, *argv) -> tuple[int, dict]:
    code = command.main([*map(str, argv), "--json", "--num_workers", "1"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four different scans."""
    folder = tmp_path_factory.mktemp("scans")
    return [stand_ins.write_scan(folder / f"{seed}.nii.gz", seed) for seed in range(4)]


@pytest.fixture
def planted(scans, tmp_path):
    """A table with all that a check should find: patient p1, one text and one scan in both splits, and broken files."""
    folder = tmp_path / "data"
    for number in range(3):
        stand_ins.copy_scan(scans[number], folder / f"{number}.nii.gz")
    stand_ins.copy_scan(scans[0], folder / "copy.nii.gz")
    whole = scans[3].read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "page.nii.gz").write_text("<html>not found</html>", encoding="utf-8")
    mask = nibabel.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4))
    nibabel.save(mask, folder / "mask.nii.gz")
    rows = [
        ("0.nii.gz", "Clear lungs.", "p0", "train", 0),
        ("1.nii.gz", "A nodule of 5 mm.", "p1", "train", 1),
        ("gone.nii.gz", "Normal  chest.", "p4", "train", ""),
        ("cut.nii.gz", "An effusion on the left.", "p5", "train", 1),
        ("copy.nii.gz", "normal chest.", "p2", "valid", 0),
        ("2.nii.gz", "Emphysema of both lungs.", "p1", "valid", 1),
        ("page.nii.gz", "Fibrosis.", "p6", "valid", 0),
        ("mask.nii.gz", "", "p7", "valid", 0),
        ("3.nii.gz", "Clear.", "p8", "", 0),
    ]
    names = ("scan", "text", "who", "part", "nodule")
    stand_ins.write_table(folder / "table.csv", [dict(zip(names, row, strict=True)) for row in rows])
    return folder


def test_what_was_planted_is_found(planted, tmp_path, capsys):
    out = tmp_path / "out"
    code, found = run(capsys, planted / "table.csv", *COLUMNS, "--label_columns", "nodule", "--out", out)
    assert code == command.PROBLEMS
    train, valid = found["splits"]["train"], found["splits"]["valid"]
    assert (train["volumes"], train["patients"], train["records"]) == (4, 4, {"report": 4})
    assert (valid["volumes"], valid["left_out"][0]["reason"]) == (3, "report without text")
    assert [entry["count"] for entry in train["left_out"] if "without a split" in entry["reason"]] == [1]
    assert train["labels"]["nodule"] == {"present": 2, "absent": 1, "unknown": 1}
    words = [
        len(text.split()) for text in ("Clear lungs.", "A nodule of 5 mm.", "Normal chest.", "An effusion on the left.")
    ]
    assert train["report_words"]["mean"] == round(float(np.mean(words)), 1)
    assert train["report_words"]["median"] == float(np.median(words))
    (overlap,) = found["overlaps"]
    assert overlap["patients"]["count"] == 1
    assert "p1" not in json.dumps(found)  # messages show digests of patients
    assert {os.path.basename(path) for path in overlap["volumes"]["first"]} == {"0.nii.gz", "copy.nii.gz"}
    assert overlap["reports"] == {"texts": 1, "records": {"train": 1, "valid": 1}}
    broken = {os.path.basename(entry["path"]): entry["reason"] for entry in found["files"]["broken"]}
    assert broken.keys() == {"cut.nii.gz", "page.nii.gz"}  # the row of the mask has no report
    assert "web page" in broken["page.nii.gz"]
    assert "ends" in broken["cut.nii.gz"]
    assert (found["files"]["missing"], found["files"]["good"]) == (1, 4)
    assert len(found["problems"]) == 4
    assert json.loads((out / "check.json").read_text(encoding="utf-8")) == found
    page = (out / "check.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 4
    assert "http" not in page.replace("http-equiv", "")


def test_a_clean_set_has_no_problems_and_its_text_says_so(scans, tmp_path, capsys):
    rows = [
        {"scan": str(scan), "text": f"report {number}", "who": f"p{number}", "part": part}
        for number, (scan, part) in enumerate(zip(scans, ("train", "train", "valid", "test"), strict=True))
    ]
    table = stand_ins.write_table(tmp_path / "table.csv", rows)
    result = CliRunner().invoke(app, ["data", "check", str(table), *COLUMNS, "--num_workers", "1"])
    assert result.exit_code == 0, result.output
    assert "train: 2 volumes of 2 patients" in result.output
    assert "files: 4 of 4 good" in result.output
    assert result.output.endswith("no problems found\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.csv", *COLUMNS], "no such file or folder"),
        (["nowhere"], "no such file or folder"),
        ([], "no data"),
        (["nowhere", "--dataset", "merlin"], "no such folder. Expected reports_final"),
        (["nowhere", "--dataset", "marlin"], "Did you mean merlin"),
        (["nowhere", "--reed"], "unknown key 'reed'"),
        (["{table}", *COLUMNS, "--label_columns", "a=b=c", "a=d"], "label_columns"),
        (["{table}", "--volume_column", "scans"], "no column scans; its columns are scan, text"),
        (["{table}", "--volume_column", "scan", "--split_column", "splits"], "no column splits"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, planted, capsys):
    code = command.main([part.format(table=planted / "table.csv") for part in argv])
    captured = capsys.readouterr()
    assert (code, captured.out) == (command.BAD_INPUT, "")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_check_resumes_and_looks_again_at_what_has_changed(scans, tmp_path, monkeypatch):
    folder, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    refs = [VolumeRef(str(stand_ins.copy_scan(scan, folder / scan.name))) for scan in scans]
    options = FileOptions(folder=out)
    first = check_files(refs, options)
    assert first.resumed == 0
    with (out / RESULTS).open("a") as stream:
        stream.write('{"path": "cut o')  # as a killed run leaves it
    (folder / "3.nii.gz").write_bytes(b"")
    asked = []
    monkeypatch.setattr(files, "_checked", lambda volumes, _: asked.extend(volumes) or map(check, volumes))
    check = lambda volume: check_volume(volume, read=False)  # noqa: E731
    again = check_files(refs, options)
    assert [ref.path for ref in asked] == [str(folder / "3.nii.gz")]
    assert again.resumed == 3
    assert "an empty file" in again.broken()[str(folder / "3.nii.gz")]
    assert {path: facts for path, facts in again.facts.items() if facts.problem is None} == {
        path: facts for path, facts in first.facts.items() if path != str(folder / "3.nii.gz")
    }


def test_only_reading_finds_what_a_header_does_not_show(scans, tmp_path):
    """Damage in the middle of a compressed file, and a copy that is another file."""
    whole = scans[0].read_bytes()
    middle = len(whole) // 2
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(
        whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 50]) + whole[middle + 50 :]
    )
    again = tmp_path / "again.nii"
    again.write_bytes(gzip.decompress(whole))
    paths = [VolumeRef(str(path)) for path in (scans[0], damaged, again)]
    by_header, by_reading = (check_files(paths, FileOptions(read=read)) for read in (False, True))
    assert by_header.broken() == {}
    assert by_header.copies() == []
    assert by_reading.broken().keys() == {str(damaged)}
    assert by_reading.copies() == [sorted([str(scans[0]), str(again)])]


def test_a_header_check_agrees_with_reading(scans, tmp_path):
    """Of all kinds of files: the shape that the reader finds, or the reader's own error."""
    root = stand_ins.lidc_idri(tmp_path / "lidc")
    series = root / "LIDC-IDRI-0002/01-01-2000-NA-NA-30178/3000566-NA-03192"
    array = stand_ins.rad_chest_ct_array(stand_ins.square(stand_ins.small_phantom(0)))
    np.savez_compressed(tmp_path / "trn00001.npz", ct=array)
    np.save(tmp_path / "array.npy", array)
    (tmp_path / "plain.nii").write_bytes(gzip.decompress(scans[0].read_bytes()))
    good = [scans[0], tmp_path / "plain.nii", tmp_path / "trn00001.npz", tmp_path / "array.npy", series]
    for path in good:
        facts, volume = check_volume(VolumeRef(str(path)), read=False), read_ct(path)
        assert facts.problem is None
        assert not facts.is_read
        assert sorted(facts.shape) == sorted(volume.shape)
        assert not facts.spacing or sorted(facts.spacing) == pytest.approx(sorted(volume.spacing), rel=1e-4)
    for path in good[1:4]:
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(CTReadError) as error:
            read_ct(cut)
        problem = check_volume(VolumeRef(str(cut)), read=False).problem
        assert problem == " ".join(str(error.value).split()).removeprefix(f"{cut}: ")
    assert check_volume(VolumeRef(str(tmp_path / "gone")), read=False).problem == MISSING
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    assert check_volume(VolumeRef(str(tmp_path / "mask.nii.gz")), read=False).problem == MASK


def test_a_file_that_kills_its_reader_is_named_and_no_other_is_lost(scans, monkeypatch):
    def work(volume, read):
        if volume.path.endswith("1.nii.gz"):
            os.kill(os.getpid(), signal.SIGKILL)
        return check_volume(volume, read)

    monkeypatch.setattr(files, "check_volume", work)
    found = check_files([VolumeRef(str(scan)) for scan in scans], FileOptions(workers=2))
    assert {os.path.basename(path) for path in found.broken()} == {"1.nii.gz"}
    assert "killed" in found.broken()[str(scans[1])]


def test_named_sets_are_checked_in_all_their_splits(tmp_path, capsys):
    code, found = run(capsys, stand_ins.rad_chest_ct(tmp_path / "rad"), "--dataset", "rad_chest_ct")
    assert {name: split["volumes"] for name, split in found["splits"].items()} == {"train": 2, "valid": 1, "test": 1}
    assert found["splits"]["train"]["labels"]["nodule"] == {"present": 2, "absent": 0, "unknown": 0}
    assert found["splits"]["train"]["labels"]["Lung nodule"] == {"present": 1, "absent": 1, "unknown": 0}
    # The stand-in's volumes are all one: that is found.
    assert code == command.PROBLEMS
    assert [len(group) for group in found["files"]["copies_first"]] == [4]
    assert [overlap["volumes"]["count"] for overlap in found["overlaps"]] == [3, 3, 2]
    code, found = run(capsys, stand_ins.nlst(tmp_path / "nlst"), "--dataset", "nlst")
    assert (found["splits"]["train"]["volumes"], found["splits"]["train"]["patients"]) == (2, 1)
    code, found = run(capsys, stand_ins.inspect(tmp_path / "inspect"), "--dataset", "inspect")
    assert (code, found["overlaps"], found["splits"]["valid"]["patients"]) == (0, [], 1)


def test_a_folder_of_volumes_is_checked_without_a_table(scans, capsys):
    code, found = run(capsys, scans[0].parent, "--patient_rule", "file")
    assert (code, found["splits"]["train"]["volumes"], found["splits"]["train"]["patients"]) == (0, 4, 4)


def test_preprocessing_takes_a_named_set(tmp_path):
    root, cache = stand_ins.inspect(tmp_path / "data"), tmp_path / "cache"
    size = ["--slices_per_plane", "2", "--image_size", "16", "--num_workers", "1"]
    assert preprocess.main([str(root), "--dataset", "inspect", "--cache", str(cache), *size]) == 0
    assert json.loads((cache / "manifest.json").read_text(encoding="utf-8"))["volumes"] == 3
