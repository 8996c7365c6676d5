"""Data sets that are known by name, on stand-ins in their layouts."""

import logging

import datasets
import numpy as np
import pytest
import set_stand_ins as stand_ins

from samf.data.loading import load_records
from samf.data.schema import IGNORE_INDEX
from samf.data.sets import NAMES, named_set
from samf.data.source_arguments import SourceArguments
from samf.data.volume_discovery import find_splits, search_volumes
from samf.model.ct_volume import read_ct
from samf.phantoms.dicom import write_series
from samf.training.arguments import DataArguments
from samf.training.datasets import _load_splits


def load(name, root, split="train", **options):
    given = {key: options.pop(key) for key in list(options) if key.endswith(("_column", "_split", "_columns"))}
    return load_records(str(root), split, **options, **SourceArguments(dataset=name, **given).record_options())


# ---- RAD-ChestCT -----------------------------------------------------------------------------------------------------


def test_rad_chest_ct_volumes_lie_as_the_dicom_series_that_they_were_made_of(tmp_path):
    """The authors' preprocessing, written anew from their code, against this project's reading of the same series."""
    phantom = stand_ins.square(stand_ins.small_phantom(3))
    assert len({*phantom.hu.shape}) == 2  # so that an exchange of slices with rows shows
    np.savez_compressed(tmp_path / "trn00001.npz", ct=stand_ins.rad_chest_ct_array(phantom))
    series = read_ct(write_series(phantom, tmp_path / "series", "rad"))
    found = read_ct(tmp_path / "trn00001.npz")
    np.testing.assert_array_equal(found.hu, np.clip(series.hu, -1000, 1000))
    assert found.spacing == pytest.approx((0.8, 0.8, 0.8))
    assert (found.stored_orientation, series.stored_orientation) == ("IPL", "LPS")
    assert not np.array_equal(found.hu, found.hu[::-1])  # the phantom has sides


@pytest.mark.parametrize("change", ["float32", "oblong", "not clipped", "another name", "two arrays"])
def test_an_npz_that_only_resembles_rad_chest_cts_has_no_geometry(tmp_path, change, caplog):
    array, name = stand_ins.rad_chest_ct_array(stand_ins.square(stand_ins.small_phantom(3))), "ct"
    array = array[:, :-1] if change == "oblong" else array.astype(np.float32) if change == "float32" else array
    array = np.where(array == -1000, -1024, array).astype(np.int16) if change == "not clipped" else array
    more = {"spacing": np.array([2.0, 2.0, 2.0])} if change == "two arrays" else {}
    np.savez(tmp_path / "trn00001.npz", **{"hu" if change == "another name" else name: array}, **more)
    assert read_ct(tmp_path / "trn00001.npz").stored_orientation == "RAS"


def test_an_npz_like_rad_chest_cts_under_another_name_says_what_it_is_taken_for(tmp_path, caplog):
    array = stand_ins.rad_chest_ct_array(stand_ins.square(stand_ins.small_phantom(3)))
    for name in ("trn00001.npz", "mine.npz"):
        np.savez(tmp_path / name, ct=array)
    caplog.set_level(logging.WARNING, "samf.model")
    read_ct(tmp_path / "trn00001.npz", min_coverage=0)
    assert "RAD-ChestCT" not in caplog.text
    read_ct(tmp_path / "mine.npz")
    assert "as in RAD-ChestCT" in caplog.text
    given = read_ct(tmp_path / "mine.npz", axes="SPL", spacing=(1.0, 2.0, 2.0))
    assert given.stored_orientation == "SPL"
    assert sorted(given.spacing) == [1.0, 2.0, 2.0]


def test_rad_chest_ct(tmp_path):
    root = stand_ins.rad_chest_ct(tmp_path)
    names = ["Lung nodule", "Pleural effusion", "nodule", "Hiatal hernia"]
    records = load("rad_chest_ct", root, finding_names=names, needs_text=False)
    assert records["patient_id"][:] == ["mrn1", "mrn1"]
    assert records["scan_id"][:] == ["trn00001", "trn00002"]
    # A nodule of the liver is no lung nodule; RAD-ChestCT has no label of a hiatal hernia.
    assert records["finding_labels"][:] == [[1, 0, 1, IGNORE_INDEX], [0, 1, 1, IGNORE_INDEX]]
    assert read_ct(records["volume"][0]).spacing == pytest.approx((0.8, 0.8, 0.8))
    (valid,) = load("rad_chest_ct", root, "valid", finding_names=names, needs_text=False)
    assert valid["scan_id"] == "val00002"  # val00001 is not in the summary of the release
    (test,) = load("rad_chest_ct", root, "valid", dataset_split=["valid=test"], finding_names=names, needs_text=False)
    assert test["patient_id"] == "mrn4"


@pytest.mark.parametrize("text", ["trn00001,0,2,0,0,0", "trn00001,0,1", "trn00001,0,yes,0,0,0"])
def test_a_label_that_is_none_is_named_by_its_row(tmp_path, text):
    root = stand_ins.rad_chest_ct(tmp_path)
    path = root / "imgtrain_Abnormality_and_Location_Labels.csv"
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n" + text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="imgtrain_Abnormality.*row 1 below the header"):
        load("rad_chest_ct", root, finding_names=["nodule"], needs_text=False)


def test_rad_chest_ct_trains_findings_and_no_text(tmp_path):
    root = str(stand_ins.rad_chest_ct(tmp_path / "data"))
    args = DataArguments(data=root, dataset="rad_chest_ct", objective="findings")
    data = _load_splits(args, ["Pleural effusion"], True, str(tmp_path))
    assert {name: part["finding_labels"][:] for name, part in data.items()} == {"train": [[0], [1]], "valid": [[0]]}
    args = DataArguments(data=root, dataset="rad_chest_ct")
    with pytest.raises(ValueError, match="rad_chest_ct has no reports and no questions.*--objective findings"):
        _load_splits(args, [], True, str(tmp_path))


# ---- sets with reports -----------------------------------------------------------------------------------------------


def test_merlin(tmp_path):
    root = stand_ins.merlin(tmp_path)
    records = load("merlin", root, finding_names=["Pleural effusion", "hepatomegaly"])
    assert records["answer"][0] == "Liver of AC1: normal. IMPRESSION: normal."
    assert records["id"][:] == ["report_AC1", "report_AC2"]
    assert records["finding_labels"][:] == [[1, 0], [IGNORE_INDEX, 0]]  # -1: the report doesn't mention it
    assert load("merlin", root, "valid")["scan_id"][:] == ["AC3"]
    assert read_ct(records["volume"][0]).hu.min() < -900


def test_inspect(tmp_path):
    root = stand_ins.inspect(tmp_path)
    records = load("inspect", root, finding_names=["pe_positive_nlp", "12_month_mortality"])
    assert records["patient_id"][:] == ["p1", "p1"]
    assert records["answer"][:] == ["1. No embolism in 10.", "1. No embolism in 11."]
    assert [path.rsplit("/", 1)[1] for path in records["volume"][:]] == ["PE1a.nii.gz", "PE2b.nii.gz"]
    assert records["finding_labels"][:] == [[1, 0], [0, IGNORE_INDEX]]  # a censored outcome is unknown
    # A time to an event is no label.
    assert load("inspect", root, finding_names=["tte_mortality"])["finding_labels"][0] == []


def test_inspect_of_2023(tmp_path):
    stand_ins.write_scan(tmp_path / "CTPA/PE452ac3f.nii.gz", 0)
    rows = [{"impression_id": "PE452ac3f", "impressions": "No embolism."}]
    stand_ins.write_table(tmp_path / "Final_Impressions.csv", rows)
    (record,) = load("inspect", tmp_path)
    assert record["volume"] == str(tmp_path / "CTPA/PE452ac3f.nii.gz")


def test_abdomen_atlas(tmp_path):
    root = stand_ins.abdomen_atlas(tmp_path)
    records = load("abdomen_atlas", root, finding_names=["liver lesion"])
    assert records["finding_labels"][:] == [[0], [1]]
    assert records["answer"][0] == "The liver of BDMAP_00000001 is normal."
    (test,) = load("abdomen_atlas", root, "valid", dataset_split=["valid=test"], report_column="structured report")
    assert (test["answer"], test["id"]) == ("FINDINGS: BDMAP_00000003", "report_BDMAP_00000003")


# ---- DICOM -----------------------------------------------------------------------------------------------------------


def test_lidc_idri(tmp_path):
    root = stand_ins.lidc_idri(tmp_path)
    options = SourceArguments(dataset="lidc_idri").source_options()
    found = find_splits(str(root), options)["train"]
    assert [path.path.rsplit("/", 1)[1] for path in found.volumes] == ["3000566-NA-03192"] * 2  # no radiograph, no part
    assert sorted(found.patients.values()) == ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]
    assert named_set("lidc_idri").open(root, "train")["annotations"][:] == ["1", "1"]
    with pytest.raises(ValueError, match="lidc_idri has no reports and no questions"):
        load("lidc_idri", root)


@pytest.mark.parametrize("with_metadata", [False, True])
def test_nlst_uses_the_thin_soft_series_of_each_year(tmp_path, with_metadata):
    root = stand_ins.nlst(tmp_path, with_metadata)
    options = SourceArguments(dataset="nlst").source_options()
    found = find_splits(str(root), options)["train"]
    assert [ref.path.rsplit("/", 1)[1] for ref in found.volumes] == [stand_ins.NLST_BEST] * 2
    assert {*found.patients.values()} == {"100002"}
    assert read_ct(found.volumes[0]).shape[2] == stand_ins.NLST_SERIES[stand_ins.NLST_BEST][1]


def test_a_metadata_table_with_rows_of_other_lengths_is_not_used(tmp_path, caplog):
    """Some releases of the retriever leave a field out, so that every later column is another one's."""
    root = stand_ins.nlst(tmp_path, with_metadata=True)
    lines = (root / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (root / "metadata.csv").write_text("\n".join([lines[0], *(line.replace("NLST,", "", 1) for line in lines[1:])]))
    found = search_volumes([str(root)], SourceArguments(dataset="nlst").source_options())
    assert [ref.path.rsplit("/", 1)[1] for ref in found.volumes] == [stand_ins.NLST_BEST] * 2
    assert "rows of other lengths" in caplog.text


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_one_line_that_says_what_is_expected_and_from_where(tmp_path, name):
    known = named_set(name)
    with pytest.raises(FileNotFoundError) as error:
        find_splits(str(tmp_path), SourceArguments(dataset=name).source_options())
    assert known.layout in str(error.value)
    assert known.home in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_splits(str(tmp_path / "nowhere"), SourceArguments(dataset=name).source_options())


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'rad_chestct' is not known. Did you mean rad_chest_ct"):
        SourceArguments(dataset="rad_chestct").check_source()


# ---- plain tables ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    rows = [
        {
            "scan": f"{n}.nii.gz",
            "text": f"report {n}",
            "who": f"p{n // 2}",
            "part": part,
            "nodule": label,
            "case": f"c{n}",
        }
        for n, (part, label) in enumerate([("train", 1), ("TRAIN ", 0), ("dev", 1), ("test", None)])
    ]
    for n in range(4):
        (tmp_path / f"{n}.nii.gz").touch()
    return rows, tmp_path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "save_to_disk"])
def test_a_table_in_any_format_with_named_columns(table, kind):
    rows, folder = table
    data = datasets.Dataset.from_list(rows)
    source = folder / f"table.{kind}"
    if kind == "csv":
        stand_ins.write_table(source, rows)
    elif kind == "save_to_disk":
        data.save_to_disk(source)
    else:
        getattr(data, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(source)
    named = {"volume_column": "scan", "report_column": "text", "patient_column": "who", "split_column": "part"}
    more = {"scan_column": "case", "label_columns": ["Lung nodule=nodule"], "image_root": str(folder)}
    args = SourceArguments(**named, **more)
    found = {
        split: load_records(str(source), split, finding_names=["Lung nodule"], **args.record_options())
        for split in ("train", "valid")
    }
    assert {name: part["id"][:] for name, part in found.items()} == {
        "train": ["report_c0", "report_c1"],
        "valid": ["report_c2"],
    }
    assert found["train"]["finding_labels"][:] == [[1], [0]]
    assert found["valid"]["patient_id"][:] == ["p1"]
    assert found["train"]["volume"][0] == str(folder / "0.nii.gz")
    test = SourceArguments(**named, **more, dataset_split=["valid=test"])
    (record,) = load_records(str(source), "valid", finding_names=["Lung nodule"], **test.record_options())
    assert (record["answer"], record["finding_labels"]) == ("report 3", [IGNORE_INDEX])


def test_options_of_tables_that_need_others():
    with pytest.raises(ValueError, match="split_column, label_columns needs volume_column"):
        SourceArguments(split_column="part", label_columns=["nodule"]).check_source()
    with pytest.raises(ValueError, match="label_columns has 'a='"):
        SourceArguments(volume_column="scan", label_columns=["a="]).check_source()
