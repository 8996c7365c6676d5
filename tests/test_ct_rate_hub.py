"""CT-RATE by its name on the Hub: tables and volumes fetched on demand, and what is said to who has no access."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hub_stand_in import TOKEN, HubStandIn, Repository
from huggingface_hub import constants

from samf.ct_volume import read_ct
from samf.data.ct_rate import load_records
from samf.data.slice_images import find_scans

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
    assert found["valid"][0].volumes == ((f"hf://datasets/{NAME}/dataset/{VOLUME}", None),)
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


@pytest.mark.parametrize("token", [None, TOKEN])
def test_without_access_the_error_says_how_to_get_it(hub, monkeypatch, tmp_path, token):
    """Strangers get 401 from the Hub, those who haven't accepted the terms 403."""
    hub.repositories[NAME].gated = True
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
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
