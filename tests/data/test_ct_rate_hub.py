"""Data sets by their names on the Hub: tables and volumes fetched on demand, and what is said to who has no access."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import launch
import nibabel as nib
import numpy as np
import pytest
import small_run
from hub_stand_in import STRANGER_TOKEN, TOKEN, HubStandIn, Repository
from huggingface_hub import constants

from samf.data.loading import load_records
from samf.data.table_columns import TableColumns
from samf.model.ct_volume import CTReadError, VolumeRef, read_ct
from samf.pretraining.scans import find_scans

NAME = "someone/CT-RATE"
VOLUME = "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
REPORTS = "VolumeName,Findings_EN\nvalid_1_a_1.nii.gz,Lungs are clear.\n"
QUESTION = [{"from": "human", "value": "<image>\nIs it clear?<short_answer>"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubStandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        volume = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.diag([-1, -1, 2, 1]))
        files = {
            "dataset/radiology_text_reports/validation_reports.csv": REPORTS.encode(),
            "dataset/vqa/valid_vqa.json": json.dumps(
                [{"id": "short_answer_1", "image": "valid_1_a_1.nii.gz", "conversations": QUESTION}]
            ).encode(),
            f"dataset/{VOLUME}": gzip.compress(volume.to_bytes()),
        }
        repository = hub.repositories[NAME] = Repository(NAME, private=False)
        repository.commit("main", files, "files")
        yield hub


def fetched(hub: HubStandIn) -> set[str]:
    return {line.partition("/resolve/main/dataset/")[2] for line in hub.requests if line.startswith("GET")}


def test_stages_1_and_2_take_the_name_too(hub):
    tables = {"train": REPORTS.replace("valid_1", "train_7"), "validation": REPORTS}
    files = {f"dataset/radiology_text_reports/{name}_reports.csv": table.encode() for name, table in tables.items()}
    hub.repositories[NAME].commit("main", files, "both splits")
    found = find_scans([NAME])
    assert {split: [scan.scan_id for scan in scans] for split, scans in found.items()} == {
        "train": ["train_7_a"],
        "valid": ["valid_1_a"],
    }
    assert found["valid"][0].volumes == (VolumeRef(f"hf://datasets/{NAME}/dataset/{VOLUME}"),)
    assert VOLUME not in fetched(hub)


@pytest.mark.parametrize("spelling", [NAME, f"hf://datasets/{NAME}", f"https://huggingface.co/datasets/{NAME}"])
def test_records_are_those_of_the_folder_with_addresses_for_volumes(hub, spelling):
    found = load_records(spelling, "valid")
    assert [(r["task"], r["answer"], r["scan_id"]) for r in found] == [
        ("report", "Lungs are clear.", "valid_1_a"),
        ("short_answer", "Yes.", "valid_1_a"),
    ]
    assert set(found["volume"]) == {f"hf://datasets/{NAME}/dataset/{VOLUME}"}
    assert VOLUME not in fetched(hub)


def test_reports_alone_do_not_fetch_the_questions(hub):
    assert load_records(NAME, "valid", tasks=["report"])["task"][:] == ["report"]
    assert fetched(hub) == {"radiology_text_reports/validation_reports.csv"}


def test_a_volume_is_fetched_when_it_is_read(hub, monkeypatch):
    address = load_records(f"{NAME}@main", "valid")[0]["volume"]
    assert address.startswith(f"hf://datasets/{NAME}@main/dataset/")
    assert read_ct(address, rescale=None).shape == (5, 4, 3)
    assert VOLUME in fetched(hub)


def test_offline_the_cache_is_read(hub, monkeypatch):
    online = load_records(NAME, "valid").to_list()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_records(NAME, "valid").to_list() == online
    assert len(hub.requests) == asked
    with pytest.raises(FileNotFoundError, match="can't be reached, and the file isn't in the cache"):
        load_records("someone/other", "valid")


@pytest.mark.parametrize("token", [None, STRANGER_TOKEN])
def test_without_access_the_error_says_how_to_get_it(hub, monkeypatch, tmp_path, token):
    """Strangers get 401 from the Hub, those who haven't accepted the terms 403."""
    hub.repositories[NAME].gated = True
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError) as error:
        load_records(NAME, "valid")
    message = str(error.value)
    for words in (f"https://huggingface.co/datasets/{NAME}", "accept the terms", "hf auth login", "HF_TOKEN"):
        assert words in message
    assert ("You are not logged in here" in message) == (token is None)


def test_what_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match=rf"someone/nothing: no data set.*no(ne)? under {Path.cwd()}"):
        load_records("someone/nothing", "valid")
    with pytest.raises(FileNotFoundError, match=f"{NAME} has no revision 'v9'"):
        load_records(f"{NAME}@v9", "valid")
    with pytest.raises(FileNotFoundError, match="nothing to read report"):
        load_records(NAME, "train", tasks=["report"])


def test_a_folder_of_that_name_is_read_instead(hub, tmp_path):
    folder = tmp_path / NAME / "dataset"
    (folder / "radiology_text_reports").mkdir(parents=True)
    (folder / "radiology_text_reports/validation_reports.csv").write_text(REPORTS, encoding="utf-8")
    found = load_records(NAME, "valid", on_missing="keep")
    assert found["volume"][:] == [str(folder / VOLUME)]
    assert not hub.requests


# ---- data sets in any layout -----------------------------------------------------------------------------------------


def parquet(rows: list[dict], features: datasets.Features | None = None) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def datasets_hub(hub, tmp_path, monkeypatch):
    """`hub` as `datasets` sees it, which has copies of its own of the client's settings."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / name))
    return hub


def test_any_data_set_on_the_hub_by_its_columns(datasets_hub):
    """Paths become addresses of the repository, fetched when they are read; Nifti columns of Parquet hold the files."""
    scans = [
        gzip.compress(nib.Nifti1Image(np.full((5, 4, 3), 10 * k, np.int16), np.eye(4)).to_bytes()) for k in range(3)
    ]
    rows = [{"scan": f"scans/{k}.nii.gz", "text": f"Report {k}.", "who": f"p{k}"} for k in range(3)]
    embedded = [{"scan": {"bytes": scans[k], "path": None}, "text": f"Report {k}.", "who": f"p{k}"} for k in range(3)]
    features = datasets.Features(
        {"scan": datasets.Nifti(), "text": datasets.Value("string"), "who": datasets.Value("string")}
    )
    files = {f"scans/{k}.nii.gz": scan for k, scan in enumerate(scans)}
    for name, part in (("paths", rows), ("nifti", embedded)):
        kind = features if name == "nifti" else None
        repository = datasets_hub.repositories[f"someone/{name}"] = Repository(f"someone/{name}", private=False)
        tables = {
            "data/train-00000-of-00001.parquet": parquet(part[:2], kind),
            "data/test-00000-of-00001.parquet": parquet(part[2:], kind),
        }
        repository.commit("main", {**(files if name == "paths" else {}), **tables}, "files")
    columns = TableColumns("scan", report="text", patient="who", splits={"valid": "test"})
    for name in ("paths", "nifti"):
        for split, numbers in (("train", (0, 1)), ("valid", (2,))):
            records = load_records(f"someone/{name}", split, columns=columns)
            assert [(r["answer"], r["patient_id"]) for r in records] == [(f"Report {k}.", f"p{k}") for k in numbers]
            for record, number in zip(records, numbers, strict=True):
                assert set(read_ct(record["volume"]).hu.ravel()) == {10 * number}
        assert name == "nifti" or records["volume"][:] == ["hf://datasets/someone/paths/scans/2.nii.gz"]
    with pytest.raises(FileNotFoundError, match="someone/nothing: `datasets.load_dataset` can't read it"):
        load_records("someone/nothing", "train", columns=columns)


def test_a_table_in_a_repository_by_its_address(datasets_hub):
    """Its volumes are next to it, in the same revision; the table is fetched once."""
    scan = gzip.compress(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.eye(4)).to_bytes())
    rows = [{"scan": f"scans/{k}.nii.gz", "text": f"Report {k}."} for k in range(3)]
    repository = datasets_hub.repositories["someone/tables"] = Repository("someone/tables", private=False)
    files = {f"a/scans/{k}.nii.gz": scan for k in range(3)}
    repository.commit("main", {"a/all.parquet": parquet(rows), **files}, "files")
    columns = TableColumns("scan", report="text")
    for _ in range(2):
        records = load_records("hf://datasets/someone/tables@main/a/all.parquet", "train", columns=columns)
        assert records["answer"][:] == [row["text"] for row in rows]
        assert records["volume"][2] == "hf://datasets/someone/tables@main/a/scans/2.nii.gz"
    assert read_ct(records["volume"][2]).shape == (5, 4, 3)
    assert sum(line == "GET /datasets/someone/tables/resolve/main/a/all.parquet" for line in datasets_hub.requests) <= 1
    with pytest.raises(CTReadError, match="hf://datasets/someone/tables/none.csv: cannot be fetched"):
        load_records("hf://datasets/someone/tables/none.csv", "train", columns=columns)


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_preprocessed_trained_on_and_evaluated(tmp_path):
    """Each script as it is called, with the columns' names on its command line."""
    work = small_run.prepare(tmp_path / "work")
    scans = sorted((work / "phantoms").rglob("*.nii.gz"))[:6]
    rows = [
        {"scan": f"scans/{k}.nii.gz", "text": "No nodule. The heart is enlarged.", "who": f"p{k}"} for k in range(6)
    ]
    with HubStandIn() as hub:
        repository = hub.repositories["someone/chests"] = Repository("someone/chests", private=False)
        files = {f"scans/{k}.nii.gz": scan.read_bytes() for k, scan in enumerate(scans)}
        files |= {f"data/{split}-00000-of-00001.parquet": parquet(part) for split, part in split_of(rows).items()}
        repository.commit("main", files, "files")
        environment = {**launch.environment(), **hub.environment(tmp_path / "home")}

        def call(script: str, *arguments: object) -> None:
            command = [sys.executable, str(launch.REPOSITORY / script), *map(str, arguments)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
            assert done.returncode == 0, done.stderr[-3000:]

        columns = ["--volume_column", "scan", "--dataset_split", "valid=test"]
        texts = ["--report_column", "text", "--patient_column", "who"]
        cache = tmp_path / "cache"
        call(
            "preprocess.py",
            "someone/chests",
            "--cache",
            cache,
            "--processor",
            work / "encoder",
            *columns,
            "--num_workers",
            1,
        )
        made = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
        assert (made["done"], made["volumes"]) == (6, 6)
        options = {
            **small_run.options_of(work, "model"),
            "data": "someone/chests",
            "slice_cache": cache,
            "tasks": "report",
        }
        call("train.py", *(part for key, value in options.items() for part in (f"--{key}", value)), *columns, *texts)
        out = tmp_path / "answers"
        call(
            "eval.py", "--model", work / "model", "--data", "someone/chests", "--output_dir", out, "--tasks", "report",
            "--max_new_tokens", 4, "--resamples", 0, "--slice_cache", cache, *columns, *texts,
        )  # fmt: skip
        answered = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["reference"] for row in answered] == [row["text"] for row in rows[4:]]


def split_of(rows: list[dict]) -> dict[str, list[dict]]:
    return {"train": rows[:4], "test": rows[4:]}
