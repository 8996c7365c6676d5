"""Data of users: folders with other files, tables in any layout, and the patients of volumes."""

import csv
import json
import logging
import shutil
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pytest
from dicom_series import stack_positions, write_series

from samf import preprocess
from samf.cache import slice_cache
from samf.cache.manifest import Manifest
from samf.cache.slice_cache import SliceCache
from samf.data.ct_rate.loader import check_patient_overlap, load_ct_rate
from samf.data.dicom_patients import digest
from samf.data.loading import load_records
from samf.data.patients import PatientRule
from samf.data.source_arguments import SourceArguments
from samf.data.table_columns import TableColumns, parse_splits
from samf.data.volume_discovery import SourceOptions, find_volumes, search_volumes
from samf.evaluation.answering.generation import shuffle_volumes
from samf.model.ct_volume import CTReadError, NotCTError, VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.dataset import make_phantom, write_nifti
from samf.pretraining.scans import find_scans
from samf.pretraining.slice_datasets import slice_sets
from samf.utils.recipe import RecipeError, read_recipe
from samf.utils.text_files import TextEncodingError

SMALL = SamfImageProcessor(size=16, slices_per_plane=2)


@pytest.fixture(scope="module")
def chest(tmp_path_factory) -> Path:
    """A phantom's CT of 14 mm voxels."""
    file = tmp_path_factory.mktemp("chest") / "chest.nii.gz"
    write_nifti(make_phantom(np.random.default_rng(0), voxel_mm=14), file)
    return file


def save_like(scan: Path, file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, nib.load(scan).affine), file)


def preprocess_tree(*sources: Path, cache: Path, **options: str) -> int:
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    size = ["--slices_per_plane", "2", "--image_size", "16", "--num_workers", "1"]
    return preprocess.main([*map(str, sources), "--cache", str(cache), *size, *flags])


def manifest(cache: Path) -> dict:
    return json.loads((cache / "manifest.json").read_text(encoding="utf-8"))


# ---- trees -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, chest) -> Path:
    """A scan next to masks of all kinds, one of them empty, and a folder with a radiograph."""
    folder, hu = tmp_path / "tree", np.asarray(nib.load(chest).dataobj)
    (folder / "case").mkdir(parents=True)
    shutil.copy(chest, folder / "case/ct.nii.gz")
    save_like(chest, folder / "case/masks/lung.nii.gz", (hu < -700).astype(np.uint8))
    save_like(chest, folder / "case/masks/body.nii", (hu > -300).astype(np.float32))
    save_like(chest, folder / "case/masks/none.nii.gz", np.zeros(hu.shape, np.int16))
    write_series(folder / "case/dx", stack_positions(1), Modality="DX", SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1")
    return folder


def test_what_is_found_and_is_no_ct_is_passed_over_and_counted(tree, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    assert preprocess_tree(tree, cache=cache) == 0  # and no --on_error skip
    found = manifest(cache)
    assert (found["volumes"], found["done"], found["failed"], found["passed_over"]) == (1, 1, 0, 3)
    assert found["complete"] and "3 no CT and passed over" in capsys.readouterr().out
    rows = [json.loads(line) for line in (cache / "passed_over.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {Path(row["volume"]).name for row in rows} == {"body.nii", "none.nii.gz", "dx"}
    assert not (cache / "failures.jsonl").read_text(encoding="utf-8")

    def read(volume, **options):
        raise AssertionError(f"{volume.path} is read again")

    monkeypatch.setattr(slice_cache, "read_ct", read)
    assert preprocess_tree(tree, cache=cache) == 0


def test_what_was_named_and_is_no_ct_is_a_failure(tree, tmp_path, capsys):
    assert preprocess_tree(tree / "case/dx", tree, cache=tmp_path / "cache") == 1
    assert "dx: no CT series here" in capsys.readouterr().err
    assert preprocess_tree(tree / "case/masks", cache=tmp_path / "other") == 1
    assert "None of the 2 volumes found is a CT" in capsys.readouterr().err


def test_scaled_bytes_may_be_hu(tmp_path, chest):
    """Eight-bit files with a slope hold HU; without one they are masks or images, which the header shows."""
    values = np.zeros((4, 4, 4), np.uint8)
    for name, slope in (("scaled.nii", 8.0), ("mask.nii", 1.0), ("unset.nii", float("nan"))):
        image = nib.Nifti1Image(values, np.eye(4))
        nib.save(image, tmp_path / name)
        head = bytearray((tmp_path / name).read_bytes())
        head[112:120] = np.array([slope, 0 if slope != 8 else -1024], "<f4").tobytes()
        (tmp_path / name).write_bytes(head)
    found = search_volumes([str(tmp_path)])
    assert [Path(volume.path).name for volume in found.volumes] == ["scaled.nii"]
    assert found.passed_over.total() == 2


def test_a_series_beside_its_mask_is_found(tmp_path, chest):
    write_series(tmp_path / "study", stack_positions(3))
    shutil.copy(chest, tmp_path / "study/a_mask.nii.gz")
    names = [str(tmp_path / "study"), str(tmp_path / "study/a_mask.nii.gz")]
    assert find_volumes([str(tmp_path)]) == [VolumeRef(name) for name in names]


def test_a_pattern_chooses_among_what_is_found(tmp_path):
    for name in ("a/ct.nii", "a/old/ct.nii", "a/pet.nii", "b/ct.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def chosen(*patterns):
        found = search_volumes([str(tmp_path)], SourceOptions(patterns=patterns))
        return [str(Path(volume.path).relative_to(tmp_path)) for volume in found.volumes], found.passed_over.total()

    assert chosen("ct.nii") == (["a/ct.nii", "a/old/ct.nii", "b/ct.nii"], 1)
    assert chosen("b/*", "pet*") == (["a/pet.nii", "b/ct.nii"], 2)
    with pytest.raises(FileNotFoundError, match="4 files: not matching the pattern"):
        chosen("*.mha")


def test_a_table_may_name_folders_of_dicom_and_file_addresses(tmp_path, chest):
    write_series(tmp_path / "P 1/ct", stack_positions(3))
    address = (tmp_path / "P 1/ct").as_uri()
    assert "%20" in address and address.startswith("file:///")
    table = tmp_path / "train.csv"
    table.write_text(f"image,caption\nP 1/ct,Emphysema.\n{address},Normal.\ngone/ct,None.\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="gone/ct"):
        load_records(table, "train")
    records = load_records(table, "train", on_missing="skip")
    assert records["volume"][:] == [str(tmp_path / "P 1/ct")] * 2
    np.testing.assert_array_equal(read_ct(address).hu, read_ct(tmp_path / "P 1/ct").hu)
    (tmp_path / "list.txt").write_text(f"{address}\n", encoding="utf-8")
    for source in (address, str(tmp_path / "list.txt"), str(table.with_name("P 1"))):
        assert find_volumes([source]) == [VolumeRef(str(tmp_path / "P 1/ct"))]
    cache = SliceCache(tmp_path / "cache", SMALL)
    assert cache.entry_path(address) == cache.entry_path(tmp_path / "P 1/ct")


@pytest.mark.parametrize("address", ["file://server/share/a.nii", "file:a.nii"])
def test_file_addresses_of_other_machines_are_refused(address):
    with pytest.raises(CTReadError, match=r"expected file:///absolute/path"):
        read_ct(address)


# ---- coverage --------------------------------------------------------------------------------------------------------


def test_too_little_of_a_body_is_said_and_refused(tmp_path, chest, caplog):
    """One sagittal plane is 1 x 512 x 256 voxels, and read as a volume otherwise."""
    slab = tmp_path / "slab.nii.gz"
    hu = np.random.default_rng(0).integers(-1000, 400, (1, 200, 100)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([5.0, 1.5, 3.0, 1])), slab)
    volume = read_ct(slab)
    assert volume.coverage_mm == (5.0, 300.0, 300.0)
    assert "cover 5 x 300 x 300 mm" in caplog.text and "--min_coverage" in caplog.text
    assert read_ct(slab, min_coverage=5.0).shape == (1, 200, 100)
    with pytest.raises(NotCTError, match="expected at least 5.5 mm"):
        read_ct(slab, min_coverage=5.5)
    caplog.clear()
    assert min(read_ct(chest).coverage_mm) > 60 and "cover" not in caplog.text


def test_min_coverage_leaves_small_series_out(tmp_path, chest):
    folder = tmp_path / "tree"
    write_series(folder / "reformat", stack_positions(1))
    shutil.copy(chest, folder / "ct.nii.gz")
    assert preprocess_tree(folder, cache=tmp_path / "all") == 0 and manifest(tmp_path / "all")["done"] == 2
    assert preprocess_tree(folder, cache=tmp_path / "all", min_coverage="100") == 0
    assert (manifest(tmp_path / "all")["done"], manifest(tmp_path / "all")["passed_over"]) == (1, 1)
    with pytest.raises(ValueError, match="min_coverage"):
        SourceArguments(min_coverage=-1.0).check_source()


# ---- text ------------------------------------------------------------------------------------------------------------


def test_every_file_of_text_is_read_by_its_byte_order_mark_or_refused_by_name(tmp_path):
    name = "valid_1_a_1.nii.gz"
    conversation = [{"from": "human", "value": "Größe?<short_answer>"}, {"from": "gpt", "value": "5 µm"}]
    vqa = json.dumps([{"id": "short_answer_1", "image": name, "conversations": conversation}], ensure_ascii=False)
    texts = {
        "dataset/radiology_text_reports/valid_reports.csv": f"VolumeName,Findings_EN\n{name},Größe 5 µm.\n",
        "dataset/vqa/valid_vqa.json": vqa,
        "dataset/metadata/no_chest_valid.txt": "valid_9_a_1.nii.gz\nµ\n",
        "paper.csv": f"image,caption\n{name},Größe 5 µm.\n",
        "volumes.txt": f"# µm\n{tmp_path}/a.nii\n",
        "recipe.yaml": "note: Größe\n",
        "table.jsonl": json.dumps({"v": "a", "t": "Größe"}, ensure_ascii=False),
    }
    readers = {
        **dict.fromkeys(list(texts)[:3], lambda _: load_ct_rate(tmp_path, "valid", on_missing="keep").to_list()),
        "paper.csv": lambda file: load_records(file, "valid", on_missing="keep").to_list(),
        "volumes.txt": lambda file: find_volumes([str(file)]),
        "recipe.yaml": read_recipe,
        "table.jsonl": lambda f: load_records(f, "train", columns=TableColumns("v", "t"), on_missing="keep").to_list(),
    }

    def write(place: str, encoding: str) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(texts[place].encode(encoding))

    for place in texts:
        write(place, "utf-8")
    expected = {place: readers[place](tmp_path / place) for place in texts}
    for place in texts:
        for encoding in ("utf-8-sig", "utf-16"):
            write(place, encoding)
            assert readers[place](tmp_path / place) == expected[place], (place, encoding)
        write(place, "cp1252")
        with pytest.raises((TextEncodingError, RecipeError), match=rf"{Path(place).name}: not UTF-8.*iconv"):
            readers[place](tmp_path / place)
        write(place, "utf-8")


# ---- patients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "patient"),
    [
        ("folder", "/d/P1/s/a.nii", "P1"),
        ("folder:2", "/d/P1/s/a.nii", "P1/s"),
        ("parent", "/d/P1/s/a.nii", "/d/P1/s"),
        ("file", "/d/P1/s/a.nii", "/d/P1/s/a.nii"),
        ("(P[0-9]+)/", "/d/P1/s/a.nii", "P1"),
    ],
)
def test_rules_read_the_patient_from_the_place(rule, path, patient):
    assert PatientRule.parse(rule)(path, "/d") == patient


def test_rules_that_do_not_fit_are_errors():
    for text in ("(", "P[0-9]", "(a)(b)"):
        with pytest.raises(ValueError, match="patient_rule .*Expected 'folder'"):
            PatientRule.parse(text)
    for text, path in (("folder", "/d/a.nii"), ("(P[0-9]+)", "/d/a.nii"), ("folder", "/elsewhere/x/a.nii")):
        with pytest.raises(ValueError, match=r"a\.nii: patient_rule"):
            PatientRule.parse(text)(path, "/d")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, chest) -> Path:
    """Six patients, a folder each, with three series of the same names."""
    folder = tmp_path_factory.mktemp("cohort")
    for patient in range(6):
        (folder / f"LIDC-{patient}").mkdir()
        for series in ("b30f", "b70f", "thin"):
            shutil.copy(chest, folder / f"LIDC-{patient}" / f"{series}.nii.gz")
    return folder


def test_no_patient_is_trained_on_and_held_out(cohort):
    with pytest.raises(ValueError, match=r"6 folders have several volumes each.*--patient_rule: parent"):
        find_scans([str(cohort)], valid_share=0.3)
    for rule in ("folder", "parent", "(LIDC-[0-9])"):
        found = find_scans([str(cohort)], valid_share=0.3, options=SourceOptions(patient_rule=PatientRule.parse(rule)))
        people = {split: {Path(scan.volumes[0].path).parent for scan in own} for split, own in found.items()}
        assert len(people["train"] | people["valid"]) == 6 and not people["train"] & people["valid"]
        # One item per patient: contrast must not separate two series of one patient.
        assert [len(scan.volumes) for own in found.values() for scan in own] == [3] * 6
    one_each = SourceOptions(patient_rule=PatientRule.parse("file"))
    assert sum(map(len, find_scans([str(cohort)], options=one_each).values())) == 18


def test_a_caches_records_are_held_out_by_the_patients_of_their_volumes(cohort, tmp_path):
    assert preprocess_tree(cohort, cache=tmp_path) == 0
    rule = PatientRule.parse("(LIDC-[0-9])")
    sets = slice_sets([str(tmp_path)], SMALL, tmp_path, valid_share=0.3, options=SourceOptions(patient_rule=rule))
    volumes = {line["record"]: line["volume"] for line in Manifest(tmp_path, "slices").log_lines()}
    people = [{Path(volumes[file.stem]).parent for file in part.files} for part in (sets.train, sets.queries)]
    assert [len(part) for part in people] == [4, 2] and not people[0] & people[1]


def test_dicoms_own_patients_count_as_digests(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for number, patient in enumerate(("Smith^42", "Smith^42", "Jones^7", "")):
        write_series(
            tmp_path / f"data/{number}", stack_positions(2), PatientID=patient, SeriesInstanceUID=f"1.2.{number}"
        )
    found = find_scans([str(tmp_path / "data")], valid_share=0.3)
    people = [scan.patient for own in found.values() for scan in own]
    assert sorted(len(scan.volumes) for own in found.values() for scan in own) == [1, 1, 2] and len(set(people)) == 3
    assert "patients of 1 of 4 volumes are not known" in caplog.text
    for secret in ("Smith", "Jones"):
        assert secret not in caplog.text and not any(secret in patient for patient in people)
    table = tmp_path / "data/train.csv"
    table.write_text("image,caption\n0,A.\n1,B.\n2,C.\n", encoding="utf-8")
    records = load_records(table, "train")
    ids = records["patient_id"][:]
    assert ids[0] == ids[1] != ids[2] and ids[0].startswith("dicom-")
    moved = shuffle_volumes(records)
    assert [Path(path).name for path in moved["volume"][:2]] == ["2", "2"]  # and not the other series of one's own


def test_a_tables_patients_count_and_are_not_shown(tmp_path, caplog):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"")
    rows = {"train": "a,Miller\nb,Miller\nc,Baker\n", "valid": "d,Baker\n"}
    for split, text in rows.items():
        table = "image,patient_id\n".replace("image", "image,caption") + text.replace(",", ",Normal.,")
        (tmp_path / f"{split}.csv").write_text(table, encoding="utf-8")
    train, valid = (load_records(tmp_path / "{split}.csv", split) for split in ("train", "valid"))
    assert train["patient_id"][:] == ["Miller", "Miller", "Baker"] and "not known" not in caplog.text
    with pytest.raises(ValueError, match="1 patients are in both training and validation") as error:
        check_patient_overlap(train, valid)
    assert "Baker" not in str(error.value) and digest("Baker") in str(error.value)
    named = load_records(tmp_path / "train.csv", "train", patient_column="caption")
    assert set(named["patient_id"]) == {"Normal."}
    with pytest.raises(ValueError, match="no column MRN"):
        load_records(tmp_path / "train.csv", "train", patient_column="MRN")


def test_unknown_patients_are_said(tmp_path, caplog):
    for name in ("a.nii", "b.nii", "train_1_a_1.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "t.csv").write_text("image,caption\na.nii,A.\nb.nii,B.\ntrain_1_a_1.nii.gz,C.\n", encoding="utf-8")
    records = load_records(tmp_path / "t.csv", "train")
    assert records["patient_id"][:] == [None, None, "train_1"]
    assert "patients of 2 of 3 volumes are not known" in caplog.text and "--patient_rule" in caplog.text


# ---- data sets in any layout -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, cohort) -> list[dict]:
    """Six volumes of three patients with reports and questions; paths are relative to `tmp_path`."""
    found = []
    for number, file in enumerate(sorted(cohort.rglob("*.nii.gz"))[::3]):
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / f"scans/{number}.nii.gz")
        texts = {"findings": f"Report {number}.", "q": "Which lobe? (a) upper (b) lower", "a": "b"}
        found.append({"scan": f"scans/{number}.nii.gz", "who": f"p{number // 2}", **texts})
    return found


def as_table(kind: str, rows: list[dict], folder: Path) -> Path:
    file = folder / f"data.{kind}"
    if kind == "csv":
        with open(file, "w", newline="", encoding="utf-16") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(file))
        shutil.copytree(folder / "scans", file / "scans")
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
def test_columns_are_named_and_rows_become_records(kind, rows, tmp_path):
    file = as_table(kind, rows, tmp_path)
    columns = TableColumns("scan", report="findings", question="q", answer="a", patient="who")
    records = load_records(file, "train", columns=columns)
    root = file if kind == "saved" else tmp_path
    for number, row in enumerate(rows):
        report, question = records[2 * number], records[2 * number + 1]
        assert report["volume"] == question["volume"] == str(root / row["scan"])
        assert report["answer"] == row["findings"] and report["patient_id"] == row["who"]
        assert (question["task"], question["question"]) == ("multiple_choice", "Which lobe?")
        assert question["choices"] == ["upper", "lower"] and question["answer"] == "(b) lower"
    assert len(set(records["id"])) == len(records) == 12
    assert set(load_records(file, "train", columns=columns, tasks=["report"])["task"]) == {"report"}


def test_nifti_columns_give_paths_or_the_bytes_they_hold(rows, tmp_path, monkeypatch):
    """`save_to_disk` embeds the files; the volumes are those that were put in."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"scan": datasets.Nifti(), "findings": datasets.Value("string")})
    table = {"scan": [str(tmp_path / row["scan"]) for row in rows], "findings": [row["findings"] for row in rows]}
    data = datasets.Dataset.from_dict(table, features=features)
    data.to_parquet(str(tmp_path / "paths.parquet"))
    datasets.DatasetDict({"train": data.select(range(4)), "test": data.select([4, 5])}).save_to_disk(tmp_path / "saved")
    columns = TableColumns("scan", report="findings", splits=parse_splits(["valid=test"]))
    assert load_records(tmp_path / "paths.parquet", "train", columns=columns)["volume"][:] == table["scan"]
    shutil.rmtree(tmp_path / "scans")
    for split, numbers in (("train", range(4)), ("valid", (4, 5))):
        records = load_records(tmp_path / "saved", split, columns=columns)
        assert [record["answer"] for record in records] == [rows[number]["findings"] for number in numbers]
        before = [Path(path).stat().st_mtime_ns for path in records["volume"]]
        for record, number in zip(records, numbers, strict=True):
            expected = data_of(rows[number])
            np.testing.assert_array_equal(read_ct(record["volume"]).hu, expected)
        again = load_records(tmp_path / "saved", split, columns=columns)  # unpacked once
        assert [Path(path).stat().st_mtime_ns for path in again["volume"]] == before
    found = search_volumes([str(tmp_path / "saved")], SourceOptions(columns=columns))
    assert len(found.volumes) == 6


def data_of(row: dict) -> np.ndarray:
    """All scans of the cohort are one phantom's."""
    volume = make_phantom(np.random.default_rng(0), voxel_mm=14)
    return volume.hu


def test_parts_of_splits_are_named_as_load_dataset_has_them(rows, tmp_path):
    file = as_table("parquet", rows, tmp_path)
    for items, train, valid in (
        (["train=train[:4]", "valid=train[4:]"], 4, 2),
        (["train[50%:]"], 3, 3),
    ):
        columns = TableColumns("scan", report="findings", splits=parse_splits(items))
        assert len(load_records(file, "train", columns=columns)) == train
        assert len(load_records(file, "valid", columns=columns)) == valid
    for items in (["valid=a", "valid=b"], ["test=a"], ["train="]):
        with pytest.raises(ValueError, match="dataset_split has"):
            parse_splits(items)


def test_what_a_table_lacks_is_named(rows, tmp_path):
    saved = as_table("saved", rows, tmp_path)
    with pytest.raises(
        ValueError, match=r"no split for 'valid'; it has train.*--dataset_split valid=train\[90%:\]|valid=train"
    ):
        load_records(saved, "valid", columns=TableColumns("scan", report="findings"))
    with pytest.raises(ValueError, match="no column impression; its columns are .*findings"):
        load_records(saved, "train", columns=TableColumns("scan", report="impression"))
    with pytest.raises(ValueError, match="--report_column"):
        load_records(saved, "train", columns=TableColumns("scan"))
    with pytest.raises(ValueError, match="go together"):
        TableColumns("scan", question="q")
    with pytest.raises(ValueError, match="report_column needs volume_column"):
        SourceArguments(report_column="findings").check_source()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_records(tmp_path / "nowhere/at/all", "train", columns=TableColumns("scan", report="findings"))


def test_stages_1_and_preprocessing_take_a_data_set_by_its_volume_column(rows, tmp_path):
    saved, cache = as_table("saved", rows, tmp_path), tmp_path / "cache"
    assert preprocess_tree(saved, cache=cache, volume_column="scan") == 0
    assert manifest(cache)["done"] == 6
    options = SourceArguments(volume_column="scan", patient_column="who").source_options()
    sets = slice_sets([str(saved)], SMALL, cache, options=options, valid_share=0.34)
    assert len(sets.train) == 4 * 6 and len(sets.queries) == 2 * 6  # of three patients one is held out
