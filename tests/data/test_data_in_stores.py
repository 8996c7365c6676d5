"""Tables, lists, folders and CT-RATE's layout in an object store, whose volumes are addresses. The store is in memory."""

import io
import json
import subprocess
import sys

import datasets
import launch
import pytest
import small_run
from dicom_series import stack_positions, write_series
from store_stand_ins import BUCKET, nifti_bytes, s3_server, use_memory_store

from samf.cache.volume_identity import volume_identity
from samf.cli.errors import UsageError
from samf.cli.scans import find_scans
from samf.data.loading import load_records
from samf.data.patients import PatientRule
from samf.data.table_columns import TableColumns
from samf.data.volume_discovery import SourceOptions, find_splits, find_volumes, search_volumes
from samf.model import ct_object_store
from samf.model.ct_common import DownloadError
from samf.model.ct_volume import VolumeRef, read_ct

ROWS = [{"scan": f"scans/{k}.nii.gz", "text": f"Report {k}.", "who": f"p{k}"} for k in range(3)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return use_memory_store(tmp_path, monkeypatch)


def tables() -> dict[str, bytes]:
    """The same rows in every format."""
    parquet = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(parquet)
    rows = [",".join(row.values()) for row in ROWS]
    return {
        "csv": "\n".join(["scan,text,who", *rows]).encode(),
        "tsv": "\n".join(["scan,text,who", *rows]).replace(",", "\t").encode(),
        "json": json.dumps(ROWS).encode(),
        "jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "parquet": parquet.getvalue(),
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_names_volumes_next_to_it(store, kind):
    address = store.put(f"tables/all.{kind}", tables()[kind])
    columns = TableColumns("scan", report="text", patient="who")
    records = load_records(address, "train", columns=columns)
    assert [(r["volume"], r["answer"], r["patient_id"]) for r in records] == [
        (f"{BUCKET}/tables/scans/{k}.nii.gz", f"Report {k}.", f"p{k}") for k in range(3)
    ]
    elsewhere = load_records(address, "train", columns=columns, image_root="s3://other/place/")
    assert elsewhere["volume"][0] == "s3://other/place/scans/0.nii.gz"
    found = search_volumes([address], SourceOptions(columns=columns))
    assert [volume.path for volume in found.volumes] == records["volume"][:]
    assert store.fetched == [address]


def test_names_in_a_table_may_be_addresses_or_lead_up(store, tmp_path):
    rows = "image,caption\n../a.nii.gz,One.\ns3://other/b.nii.gz,Two.\n/disk/c.nii.gz,Three.\n"
    address = store.put("tables/valid.csv", rows.encode())
    with pytest.raises(FileNotFoundError, match="/disk/c.nii.gz"):
        load_records(address.replace("valid", "{split}"), "valid")
    records = load_records(address.replace("valid", "{split}"), "valid", on_missing="keep")
    assert records["volume"][:] == [f"{BUCKET}/a.nii.gz", "s3://other/b.nii.gz", "/disk/c.nii.gz"]
    local = tmp_path / "local.csv"
    local.write_text("image,caption\ns3://bucket/a.nii.gz,One.\nb/c.nii.gz,Two.\n", encoding="utf-8")
    assert load_records(local, "train", image_root=BUCKET)["volume"][:] == [
        "s3://bucket/a.nii.gz",
        f"{BUCKET}/b/c.nii.gz",
    ]


def test_errors_of_a_table_name_its_address(store):
    address = store.put("broken.jsonl", b"{")
    columns = TableColumns("scan", report="text")
    with pytest.raises(ValueError, match=f"^{address}: not valid JSON"):
        load_records(address, "train", columns=columns)
    with pytest.raises(DownloadError, match=f"^{BUCKET}/absent.csv: there is no such file"):
        load_records(f"{BUCKET}/absent.csv", "train", columns=columns)
    with pytest.raises(ValueError, match="scan.xlsx: expected the address of a .csv"):
        load_records(f"{BUCKET}/scan.xlsx", "train", columns=columns)


def test_a_folder_is_listed_once_and_gives_volumes_and_series(store, tmp_path, monkeypatch):
    for name in ("a/1.nii.gz", "a/b/2.nrrd", "a/z.mha", "a/.hidden.nii.gz", "other/readme.txt"):
        store.put(f"data/{name}", nifti_bytes())
    series = write_series(tmp_path / "series", stack_positions(3))
    store.put_folder("data/p1/ct", series)
    store.put("data/p1/ct/notes.txt", b"text")
    found = search_volumes([f"{BUCKET}/data/"])
    names = ["a/1.nii.gz", "a/b/2.nrrd", "a/z.mha", "p1/ct"]
    assert [volume.path for volume in found.volumes] == [f"{BUCKET}/data/{name}" for name in names]
    assert found.searched == {volume.path for volume in found.volumes}
    with monkeypatch.context() as patched:
        patched.setattr(ct_object_store, "_ask", lambda address: pytest.fail("the store is asked again"))
        listed = {volume.path: volume_identity(volume.path) for volume in found.volumes}
    ct_object_store._states.clear()
    assert {path: volume_identity(path) for path in listed} == listed
    chosen = search_volumes([f"{BUCKET}/data"], SourceOptions(patterns=("p1/*", "1.nii.gz")))
    assert [volume.path for volume in chosen.volumes] == [f"{BUCKET}/data/a/1.nii.gz", f"{BUCKET}/data/p1/ct"]
    assert chosen.passed_over.total() == 2
    assert find_scans([f"{BUCKET}/data/p1", f"{BUCKET}/data/a/1.nii.gz"]) == [
        f"{BUCKET}/data/p1/ct",
        f"{BUCKET}/data/a/1.nii.gz",
    ]
    with pytest.raises(UsageError, match="there is no such file or folder"):
        find_scans([f"{BUCKET}/nothing"])


def test_a_changed_object_is_another_volume(store):
    address = store.put("scan.nii.gz", nifti_bytes())
    before = volume_identity(address)
    store.put("scan.nii.gz", nifti_bytes(1))
    assert volume_identity(address) == before  # the store is asked once per process
    ct_object_store._states.clear()
    assert volume_identity(address) != before
    states = ct_object_store.known_states()
    ct_object_store._states.clear()
    ct_object_store.remember_states(states)
    assert list(ct_object_store._states) == [address]


def test_a_list_and_single_files(store, tmp_path):
    first = min(write_series(tmp_path / "s", stack_positions(3)).iterdir())
    slice_ = store.put("one/IM0", first.read_bytes())
    address = store.put("lists/all.txt", b"a.nii.gz\n# none\n../b.nii.gz\nhf://datasets/o/n/c.nii.gz\n/d.nii.gz\n")
    assert find_volumes([address]) == [
        VolumeRef(name)
        for name in (
            f"{BUCKET}/lists/a.nii.gz",
            f"{BUCKET}/b.nii.gz",
            "hf://datasets/o/n/c.nii.gz",
            "/d.nii.gz",
        )
    ]
    assert find_volumes([slice_, f"{BUCKET}/x.nii.gz"]) == [VolumeRef(slice_), VolumeRef(f"{BUCKET}/x.nii.gz")]


def test_ct_rates_layout_and_patients_by_folder(store):
    volume = "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    store.put(f"CT-RATE/dataset/{volume}", nifti_bytes())
    reports = b"VolumeName,Findings_EN\nvalid_1_a_1.nii.gz,Lungs are clear.\n"
    store.put("CT-RATE/dataset/radiology_text_reports/validation_reports.csv", reports)
    for root in (f"{BUCKET}/CT-RATE", f"{BUCKET}/CT-RATE/dataset/"):
        (record,) = load_records(root, "valid")
        assert record["answer"] == "Lungs are clear." and record["patient_id"] == "valid_1"
        assert record["volume"] == f"{BUCKET}/CT-RATE/dataset/{volume}"
    assert find_volumes([f"{BUCKET}/CT-RATE"]) == [VolumeRef(record["volume"])]
    assert read_ct(record["volume"]).shape == (5, 4, 3)
    with pytest.raises(FileNotFoundError, match="expected CT-RATE's layout"):
        load_records(f"{BUCKET}/elsewhere", "valid")
    store.put("cohort/P1/a.nii.gz", nifti_bytes())
    store.put("cohort/P2/b.nii.gz", nifti_bytes())
    found = find_splits(f"{BUCKET}/cohort", SourceOptions(patient_rule=PatientRule.parse("folder")))
    assert sorted(found["train"].patients.values()) == ["P1", "P2"]


@pytest.mark.slow
def test_scans_in_a_bucket_are_reported_on_trained_on_and_evaluated(tmp_path):
    """Each command as it is called, with a server of S3; training and evaluation without a slice cache."""
    work = small_run.prepare(tmp_path / "work")
    scans = sorted((work / "phantoms").rglob("*.nii.gz"))[:4]
    rows = [
        {"scan": f"../scans/{k}.nii.gz", "text": "No nodule. The heart is enlarged.", "who": f"p{k}"} for k in range(4)
    ]
    with s3_server(tmp_path / "home") as server:
        for k, scan in enumerate(scans):
            server.put(f"scans/{k}.nii.gz", scan.read_bytes())
        for split, part in (("train", rows[:3]), ("valid", rows[3:])):
            server.put(f"tables/{split}.jsonl", "\n".join(map(json.dumps, part)).encode())

        def call(*command: object) -> None:
            environment = {**launch.environment(), **server.environment}
            done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]

        columns = ["--volume_column", "scan", "--report_column", "text", "--patient_column", "who"]
        options = {**small_run.options_of(work, "model"), "data": "s3://scans/tables/{split}.jsonl", "tasks": "report"}
        options.pop("slice_cache", None)
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        call(sys.executable, launch.REPOSITORY / "train.py", *flags, *columns)
        assert [server.fetched(f"scans/{k}.nii.gz") for k in range(4)] == [1, 1, 1, 0]
        out = tmp_path / "answers"
        call(
            sys.executable, launch.REPOSITORY / "eval.py", "--model", work / "model", "--data", options["data"],
            "--output_dir", out, "--tasks", "report", "--max_new_tokens", 4, "--resamples", 0, *columns,
        )  # fmt: skip
        (answered,) = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(answered)["reference"] == rows[3]["text"]
        reports = tmp_path / "reports"
        call(
            sys.executable, "-m", "samf.cli.main", "report", "s3://scans/scans", "--out", reports, "--max-new-tokens", 4
        )
        assert sorted(file.name for file in reports.glob("*.txt")) == [f"{k}.txt" for k in range(4)]
        assert [server.fetched(f"scans/{k}.nii.gz") for k in range(4)] == [1] * 4  # kept since the training
