"""CT-RATE's tables and the paper's CSVs as records: hand-written files with every oddity, checked against what they say."""

import csv
import json
import logging
import tracemalloc
from pathlib import Path

import datasets
import pytest

import samf.data.ct_rate as ct_rate_package
from samf.data.ct_rate import loader
from samf.data.ct_rate.loader import (
    FEATURES,
    VolumeName,
    check_patient_overlap,
    load_ct_rate,
    read_json_array,
    settle_answer,
    split_options,
    volume_path,
)
from samf.data.ct_rate.tables import read_labels
from samf.data.loading import load_records
from samf.data.prompts import REPORT_QUESTION
from samf.data.samf_csv import load_samf_csv
from samf.data.schema import volume_of
from samf.data.volume_discovery import distinct_volumes
from samf.model.ct_volume import VolumeRef
from samf.phantoms.dataset import DEMO_FINDINGS, PhantomSettings, write_dataset
from samf.utils.text_files import TextEncodingError

REPORT_COLUMNS = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
QUESTION = "Which lobe is affected? (a) upper (b) middle (c) lower (d) none"


def write_rows(path: Path, columns: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def touch(root: Path, *names: str, layout: str = "v2") -> None:
    """Empty files: the reader of tables never opens a volume."""
    for name in names:
        path = volume_path(root, name, layout)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def turn(value: str, answer: str | None, **more) -> list[dict]:
    human = [{"from": "human", "value": value, **more}]
    return human if answer is None else [*human, {"from": "gpt", "value": answer}]


def write_vqa(path: Path, *records: tuple) -> None:
    """(id, image or None, conversation) triples as CT-RATE's JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [
        {"id": name, **({"image": image} if image is not None else {}), "conversations": conversation}
        for name, image, conversation in records
    ]
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def ct_rate(tmp_path):
    """A v2 validation split: two patients, one scan with two reconstructions, one head CT, one report without text."""
    root = tmp_path / "CT-RATE" / "dataset"
    names = [
        "valid_1_a_1.nii.gz",
        "valid_1_a_2.nii.gz",
        "valid_2_a_1.nii.gz",
        "valid_2_b_1.nii.gz",
        "valid_3_a_1.nii.gz",
    ]
    touch(root, *names)
    write_rows(
        root / "radiology_text_reports/validation_reports.csv",
        REPORT_COLUMNS,
        [
            [names[0], "Cough.", "t", "Lungs are  clear.\nHeart is normal.", "Normal."],
            [names[1], "Cough.", "t", "Lungs are  clear.\nHeart is normal.", "Normal."],
            [names[2], "Not given.", "t", "Emphysema is observed.", "Not given."],
            [names[3], "", "t", "Not given.", "No text above."],
            [names[4], "", "t", "Brain.", ""],
        ],
    )
    write_rows(
        root / "multi_abnormality_labels/valid_predicted_labels.csv",
        ["VolumeName", "Emphysema", "Consolidation", "Cardiomegaly"],
        [[names[0], 0, 1, 0], [names[1], 0, 1, 0], [names[2], 1, "", 0]],
    )
    (root / "metadata").mkdir()
    (root / "metadata/no_chest_valid.txt").write_text("valid_3_a_1.nii.gz\n\n")
    write_vqa(
        root / "vqa/valid_vqa.json",
        (
            "multiple_choice_0",
            names[0],
            turn(f"<image>\n{QUESTION}<multiple_choice>", "(c) lower", type="multiple_choice"),
        ),
        ("multiple_choice_0", names[0], turn(f"<image>\n{QUESTION}<multiple_choice>", "(d) none")),
        ("report_generation_0", names[0], turn("<image>\nGenerate report<report_generation>", "Lungs are clear.")),
        (
            "short_answer_1",
            f"valid_fixed/valid_2/valid_2_a/{names[2]}",
            turn("<image>\nIs there emphysema?<short_answer>", "Yes.")
            + turn("How much?<long_answer>", "A great deal of it."),
        ),
        ("long_answer_2", None, turn("What is emphysema?<long_answer>", "Destroyed lung.")),
        ("short_answer_3", "valid_3_a_1.nii.gz", turn("<image>\nIs it a chest?<short_answer>", "No.")),
    )
    return root.parent


# ---- names ---------------------------------------------------------------------------------------------------------


def test_volume_names_and_paths():
    name = VolumeName.parse("valid_53_a_1.nii.gz")
    assert (name.split, name.patient, name.scan, name.reconstruction) == ("valid", 53, "a", 1)
    assert (name.scan_id, name.patient_id, str(name)) == ("valid_53_a", "valid_53", "valid_53_a_1.nii.gz")
    assert volume_path("/d", "valid_53_a_1") == Path("/d/valid_fixed/valid_53/valid_53_a/valid_53_a_1.nii.gz")
    assert volume_path("/d", "x/train_7_ab_12.nii.gz", "v1") == Path("/d/train/train_7/train_7_ab/train_7_ab_12.nii.gz")
    with pytest.raises(ValueError, match="expected one like valid_53_a_1"):
        VolumeName.parse("scan.nii.gz")


# ---- CT-RATE -------------------------------------------------------------------------------------------------------


def test_every_record_of_the_hand_written_split(ct_rate):
    """The whole contract at once, against values written out by hand."""
    found = load_ct_rate(ct_rate, "valid", finding_names=("Cardiomegaly", "Emphysema", "Consolidation"))
    assert found.features == FEATURES
    first = str(ct_rate / "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz")
    other = first.replace("a_1.nii", "a_2.nii")
    second = str(ct_rate / "dataset/valid_fixed/valid_2/valid_2_a/valid_2_a_1.nii.gz")
    text, options = "Lungs are clear. Heart is normal.", ["upper", "middle", "lower", "none"]
    clear, ill, unknown = [0, 0, 1], [0, 1, -100], [-100, -100, -100]
    expected = [
        (first, "report", REPORT_QUESTION, None, text, "report_valid_1_a_1", "valid_1_a", clear),
        (other, "report", REPORT_QUESTION, None, text, "report_valid_1_a_2", "valid_1_a", clear),
        (second, "report", REPORT_QUESTION, None, "Emphysema is observed.", "report_valid_2_a_1", "valid_2_a", ill),
        (
            first,
            "multiple_choice",
            "Which lobe is affected?",
            options,
            "(c) lower",
            "multiple_choice_0",
            "valid_1_a",
            clear,
        ),
        (
            first,
            "multiple_choice",
            "Which lobe is affected?",
            options,
            "(d) none",
            "multiple_choice_0#2",
            "valid_1_a",
            clear,
        ),
        (second, "short_answer", "Is there emphysema?", None, "Yes.", "short_answer_1", "valid_2_a", ill),
        (second, "long_answer", "How much?", None, "A great deal of it.", "short_answer_1#2", "valid_2_a", ill),
        (None, "long_answer", "What is emphysema?", None, "Destroyed lung.", "long_answer_2", "long_answer_2", unknown),
    ]
    patients = found["patient_id"][:]
    assert patients == ["valid_1", "valid_1", "valid_2", "valid_1", "valid_1", "valid_2", "valid_2", None]
    found = found.remove_columns("patient_id")
    assert [tuple(record.values()) for record in found] == [tuple(row) for row in expected]


@pytest.mark.parametrize("spelling", ["valid", "validation"])
def test_the_root_may_be_given_with_or_without_its_last_folder(ct_rate, spelling):
    assert load_ct_rate(ct_rate / "dataset", spelling)["id"][:] == load_ct_rate(ct_rate, "valid")["id"][:]


def test_what_is_left_out_is_counted(ct_rate, caplog):
    with caplog.at_level(logging.INFO):
        load_ct_rate(ct_rate, "valid")
    assert "1 left out: report without text (first: valid_2_b_1.nii.gz)" in caplog.text
    assert "2 left out: listed in no_chest_valid.txt (first: valid_3_a_1.nii.gz)" in caplog.text
    assert "8 records" in caplog.text


def test_labels_are_empty_without_a_file_or_a_question_for_them(ct_rate, caplog):
    assert set(map(tuple, load_ct_rate(ct_rate, "valid")["finding_labels"])) == {()}
    (ct_rate / "dataset/multi_abnormality_labels/valid_predicted_labels.csv").unlink()
    found = load_ct_rate(ct_rate, "valid", finding_names=["Emphysema"])
    assert set(map(tuple, found["finding_labels"])) == {()}
    assert "No label file" in caplog.text


@pytest.mark.parametrize(
    ("text", "label"),
    [("1", 1), ("0.0", 0), ("1.0", 1), ("", -100), ("nan", -100), ("-1", -100), ("-1.0", -100), ("Not given.", -100)],
)
def test_labels_are_0_1_or_unknown(tmp_path, text, label, caplog):
    table = tmp_path / "labels.csv"
    table.write_text(f"VolumeName,A,B\ntrain_1_a_1.nii.gz,1,0\ntrain_2_a_1.nii.gz,{text},1\n", encoding="utf-8")
    labels = read_labels(table, ["A", "B"])
    assert list(labels.values()) == [[1, 0], [label, 1]]
    assert ("1 labels are -1 (uncertain)" in caplog.text) == text.startswith("-1")


@pytest.mark.parametrize("text", ["0.97", "2", "-100", "inf", "yes", "1e-3"])
def test_a_label_that_is_none_is_refused_by_its_row_and_column(tmp_path, text):
    table = tmp_path / "labels.csv"
    table.write_text(f"VolumeName,A,B\ntrain_1_a_1.nii.gz,1,0\ntrain_2_a_1.nii.gz,1,{text}\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"labels.csv: row 2 below the header, column 'B': '{text}' is not a label; expected 0"
    ):
        read_labels(table, ["A", "B"])


def test_an_unknown_label_names_the_columns(ct_rate):
    with pytest.raises(ValueError, match=r"valid_predicted_labels.csv: no column Pneumothorax.*Emphysema"):
        load_ct_rate(ct_rate, "valid", finding_names=["Pneumothorax"])


def test_tasks_are_chosen_and_ids_do_not_depend_on_the_choice(ct_rate):
    everything = load_ct_rate(ct_rate, "valid")
    for task in ("report", "multiple_choice", "short_answer", "long_answer"):
        chosen = load_ct_rate(ct_rate, "valid", tasks=[task])
        assert chosen["id"][:] == [r["id"] for r in everything if r["task"] == task]
    with pytest.raises(ValueError, match="expected some of report"):
        load_ct_rate(ct_rate, "valid", tasks=["captions"])


def test_report_sections(ct_rate):
    def reports(*sections):
        found = load_ct_rate(ct_rate, "valid", tasks=["report"], report_sections=sections)
        return {record["id"]: (record["question"], record["answer"]) for record in found}

    both = reports("findings", "impression")
    assert both["report_valid_1_a_1"][1] == "Findings: Lungs are clear. Heart is normal.\nImpression: Normal."
    assert both["report_valid_2_a_1"][1] == "Findings: Emphysema is observed.", "a missing impression leaves no heading"
    assert set(reports("impression")) == {"report_valid_1_a_1", "report_valid_1_a_2", "report_valid_2_b_1"}
    asked = reports("findings", "clinical_information")
    assert asked["report_valid_1_a_1"][0] == f"Clinical information: Cough. {REPORT_QUESTION}"
    assert asked["report_valid_2_a_1"] == (REPORT_QUESTION, "Emphysema is observed.")
    with pytest.raises(ValueError, match="report_sections"):
        reports("clinical_information")


def test_first_reconstruction_of_each_scan(ct_rate):
    """The lowest number that may be used: a reconstruction that is excluded is not a scan's first."""
    ids = load_ct_rate(ct_rate, "valid", tasks=["report"], reconstructions="first")["id"][:]
    assert ids == ["report_valid_1_a_1", "report_valid_2_a_1"]
    (ct_rate / "dataset/metadata/no_chest_valid.txt").write_text("valid_1_a_1.nii.gz\nvalid_3_a_1.nii.gz")
    ids = load_ct_rate(ct_rate, "valid", tasks=["report"], reconstructions="first")["id"][:]
    assert ids == ["report_valid_1_a_2", "report_valid_2_a_1"]


def test_missing_volumes_are_one_error_that_lists_them(ct_rate):
    for name in ("valid_1_a_2", "valid_2_a_1"):
        volume_path(ct_rate / "dataset", name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_ct_rate(ct_rate, "valid")
    message = str(error.value)
    assert message.startswith("2 of 3 volumes") and "on_missing='skip'" in message
    assert "valid_1_a_2.nii.gz" in message and "valid_2_a_1.nii.gz" in message and "valid_1_a_1.nii.gz" not in message


def test_missing_volumes_can_be_skipped_and_counted(ct_rate, caplog):
    volume_path(ct_rate / "dataset", "valid_2_a_1").unlink()
    with pytest.raises(FileNotFoundError), pytest.warns(FutureWarning, match="on_missing='error' is now 'raise'"):
        load_ct_rate(ct_rate, "valid", on_missing="error")
    skipped = load_ct_rate(ct_rate, "valid", on_missing="skip")
    assert [r["id"] for r in skipped if r["scan_id"] == "valid_2_a"] == []
    assert "3 left out: volume file missing" in caplog.text
    assert len(load_ct_rate(ct_rate, "valid", on_missing="keep")) == len(skipped) + 3


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"0 volumes under .*train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"):
        load_ct_rate(tmp_path, "train")


def test_a_task_without_its_file_is_an_error(ct_rate):
    (ct_rate / "dataset/vqa/valid_vqa.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"nothing to read multiple_choice from.*vqa/valid_vqa.json"):
        load_ct_rate(ct_rate, "valid", tasks=["report", "multiple_choice"])
    assert set(load_ct_rate(ct_rate, "valid")["task"]) == {"report"}


def test_vqa_reports_stand_in_for_a_missing_csv(ct_rate):
    (ct_rate / "dataset/radiology_text_reports/validation_reports.csv").unlink()
    found = load_ct_rate(ct_rate, "valid", tasks=["report"])
    assert [(r["id"], r["question"], r["answer"]) for r in found] == [
        ("report_generation_0", "Generate report", "Lungs are clear.")
    ]


def test_the_older_column_name_and_missing_columns(ct_rate):
    path = ct_rate / "dataset/radiology_text_reports/validation_reports.csv"
    write_rows(path, ["AccessionNo", *REPORT_COLUMNS[1:]], [["valid_1_a_1", "", "", "Old.", ""]])
    assert load_ct_rate(ct_rate, "valid", tasks=["report"])["id"][:] == ["report_valid_1_a_1"]
    write_rows(path, ["Volume", "Findings_EN"], [["valid_1_a_1", "Old."]])
    with pytest.raises(
        ValueError, match=r"no column VolumeName or AccessionNo; its columns are \['Volume', 'Findings_EN'\]"
    ):
        load_ct_rate(ct_rate, "valid", tasks=["report"])
    write_rows(path, REPORT_COLUMNS, [["scan 7", "", "", "Odd.", ""]])
    with pytest.raises(ValueError, match=r"validation_reports.csv: 'scan 7' is not a CT-RATE volume name"):
        load_ct_rate(ct_rate, "valid", tasks=["report"])


def test_v1_records_carry_the_metadata_rescale(tmp_path, caplog):
    names = ["train_1_a_1.nii.gz", "train_1_a_2.nii.gz", "train_2_a_1.nii.gz"]
    touch(tmp_path, *names, layout="v1")
    rows = [[name, "", "", "Clear.", ""] for name in names]
    write_rows(tmp_path / "radiology_text_reports/train_reports.csv", REPORT_COLUMNS, rows)
    with pytest.raises(FileNotFoundError, match="slope and intercept"):
        load_ct_rate(tmp_path, "train")
    metadata = [[names[0], 1, -1024], [names[1], "1.0", "-8192"], [names[2], 1, ""]]
    write_rows(tmp_path / "metadata/train_metadata.csv", ["VolumeName", "RescaleSlope", "RescaleIntercept"], metadata)
    found = load_ct_rate(tmp_path, "train")
    assert [record["rescale"] for record in found] == [[1.0, -1024.0], [1.0, -8192.0]]
    assert volume_of(found[0]) == VolumeRef(found[0]["volume"], (1.0, -1024.0))
    assert distinct_volumes(found) == [volume_of(record) for record in found]
    assert "/train/train_1/train_1_a/" in found[0]["volume"]
    assert "3 volumes without XYSpacing" not in caplog.text and "2 volumes without XYSpacing" in caplog.text
    assert "without slope and intercept in the metadata (first: train_2_a_1.nii.gz)" in caplog.text


def test_v1_records_carry_the_voxel_size_where_the_metadata_have_it(tmp_path):
    """XYSpacing is DICOM's: distance of rows, then of columns; the stored axes are columns, rows, slices."""
    names = [f"train_{k}_a_1.nii.gz" for k in range(1, 5)]
    touch(tmp_path, *names, layout="v1")
    rows = [[name, "", "", "Clear.", ""] for name in names]
    write_rows(tmp_path / "radiology_text_reports/train_reports.csv", REPORT_COLUMNS, rows)
    columns = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
    sizes = [["[0.7, 0.8]", "1.5"], ["[0.7, 0.8]", "nan"], ["", "1.5"], ["[0.7]", "0"]]
    metadata = [[name, 1, -1024, *size] for name, size in zip(names, sizes, strict=True)]
    write_rows(tmp_path / "metadata/train_metadata.csv", columns, metadata)
    found = load_ct_rate(tmp_path, "train")["rescale"][:]
    assert found == [[1.0, -1024.0, 0.8, 0.7, 1.5], *[[1.0, -1024.0]] * 3]


def test_v2_is_taken_where_both_are_and_is_never_rescaled(tmp_path, caplog):
    touch(tmp_path, "train_1_a_1", layout="v1")
    touch(tmp_path, "train_1_a_1", layout="v2")
    write_rows(
        tmp_path / "radiology_text_reports/train_reports.csv", REPORT_COLUMNS, [["train_1_a_1", "", "", "Clear.", ""]]
    )
    write_rows(
        tmp_path / "metadata/train_metadata.csv",
        ["VolumeName", "RescaleSlope", "RescaleIntercept"],
        [["train_1_a_1.nii.gz", 1, -1024]],
    )
    with caplog.at_level(logging.INFO):
        found = load_ct_rate(tmp_path, "train")
    assert "train_fixed" in found[0]["volume"] and "rescale" not in found.features
    assert "holds v1 and v2" in caplog.text
    assert load_ct_rate(tmp_path, "train", layout="v1")[0]["rescale"] == [1.0, -1024.0]


def test_real_metadata_are_read(tmp_path, test_data):
    """CT-RATE's own validation metadata serve the v1 hook: -1024 and -8192, all 3,039 volumes."""
    metadata = test_data / "reports/CT-RATE_validation_metadata.csv"
    with metadata.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "valid").mkdir()
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/validation_metadata.csv").write_bytes(metadata.read_bytes())
    reports = [[row["VolumeName"], "", "", "Clear.", ""] for row in rows]
    write_rows(tmp_path / "radiology_text_reports/validation_reports.csv", REPORT_COLUMNS, reports)
    found = load_ct_rate(tmp_path, "valid", on_missing="keep")
    assert len(found) == len(rows) == 3039
    assert [r["rescale"][1] for r in found] == [float(row["RescaleIntercept"]) for row in rows]
    sizes = [[*map(float, row["XYSpacing"].strip("[]").split(",")), float(row["ZSpacing"])] for row in rows]
    assert [r["rescale"][2:] for r in found] == sizes  # their pixels are square
    firsts = load_ct_rate(tmp_path, "valid", on_missing="keep", reconstructions="first")
    sampled, again, other = (
        load_ct_rate(tmp_path, "valid", on_missing="keep", reconstructions="sample", reconstruction_seed=seed)["id"][:]
        for seed in (0, 0, 1)
    )
    assert len(firsts) == len(sampled) == len(set(found["scan_id"]))
    assert set(sampled) <= set(found["id"])
    assert sampled == again != other
    assert {"1", "2"} <= {name.rsplit("_", 1)[1] for name in sampled}


# ---- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("What? (a) one (b) two", "What?", ["one", "two"]),
        (
            "What (a) is (a) one (b) two, (c)three (d) four (e) five",
            "What (a) is",
            ["one", "two,", "three", "four", "five"],
        ),
        ("Which stage (b) is it? (a) first (b) second", "Which stage (b) is it?", ["first", "second"]),
        ("What? (a) one (x) more (b) two", "What?", ["one (x) more", "two"]),
        ("No options here (a) bit", "No options here (a) bit", []),
    ],
)
def test_options_are_split_from_the_question(text, question, options):
    assert split_options(text) == (question, options)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(b) two", "(b) two"),
        ("(B) Two.", "(b) two"),
        ("b) two", "(b) two"),
        ("(b)", "(b) two"),
        ("b", "(b) two"),
        ("two", "(b) two"),
        ("(b) something else", "(b) two"),  # the letter decides where the text is no option
        ("(a) two", None),  # the letter says one thing, the text another
        ("(f) six", None),
        ("six", None),
    ],
)
def test_answers_are_settled(answer, expected):
    assert settle_answer(answer, ["one", "two", "three"]) == expected


def test_odd_vqa_records(ct_rate, caplog):
    """Task by tag, by type, by id; unusable turns are dropped and counted, the others kept."""
    path = ct_rate / "dataset/vqa/odd.json"
    image = "valid_1_a_1.nii.gz"
    write_vqa(
        path,
        ("x", image, turn("<image>\nBy type?", "Yes.", type="<short_answer>")),
        ("long_answer_12", image, turn("<image>By id?", "Yes.")),
        ("x", image, turn("<image>\nNo task at all?", "Yes.")),
        ("multiple_choice_5", image, turn("<image>\nNo options?<multiple_choice>", "(a) yes")),
        ("multiple_choice_5", image, turn(f"{QUESTION}<multiple_choice>", "(c) middle")),
        ("multiple_choice_5", image, turn(f"{QUESTION}<multiple_choice>\n<image>", "(b) middle<multiple_choice>")),
        ("short_answer_6", image, turn("<image>\nUnanswered?<short_answer>", None)),
        ("short_answer_6", image, turn("A?<short_answer>", "") + turn("B?<short_answer>", "None")),
        ("short_answer_7", "", turn("<image>\nImage named by nothing?<short_answer>", "Yes.")),
        ("short_answer_8", [image], turn("<image>\nTwo images?<short_answer>", "Yes.")),
        ("short_answer_9", image, "no turns"),
        ("short_answer_9", image, [{"from": "human", "value": ["?"]}, {"from": "gpt", "value": "Yes."}]),
    )
    found = load_ct_rate(
        ct_rate, "valid", tasks=["short_answer", "long_answer", "multiple_choice"], vqa_files=["odd.json"]
    )
    assert [(r["task"], r["question"], r["answer"]) for r in found] == [
        ("short_answer", "By type?", "Yes."),
        ("long_answer", "By id?", "Yes."),
        ("multiple_choice", "Which lobe is affected?", "(b) middle"),
        ("short_answer", "B?", "None"),
        ("short_answer", "Image named by nothing?", "Yes."),
    ]
    assert found[2]["choices"] == ["upper", "middle", "lower", "none"]
    assert found[4]["volume"] is None
    assert len(set(found["id"])) == len(found)
    assert "2 left out: multiple choice without options" in caplog.text
    assert "1 left out: no task tag" in caplog.text
    assert "3 left out: no question or no answer" in caplog.text
    assert "1 left out: image that is no file name" in caplog.text
    assert "1 left out: conversation that is no list of turns" in caplog.text


def test_several_vqa_files_and_one_that_is_absent(ct_rate, tmp_path):
    extra = tmp_path / "text.json"
    write_vqa(extra, ("t", None, turn("Why?<short_answer>", "Because.")))
    found = load_ct_rate(ct_rate, "valid", tasks=["short_answer"], vqa_files=["valid_vqa.json", extra])
    assert found["question"][:] == ["Is there emphysema?", "Why?"]
    with pytest.raises(FileNotFoundError, match="VQA file nowhere.json not found"):
        load_ct_rate(ct_rate, "valid", vqa_files=["nowhere.json"])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_json_is_read_in_pieces(tmp_path, chunk):
    content = [{"id": "é" * k, "n": [k, {"deep": "]},{"}]} for k in range(9)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        assert list(read_json_array(path, chunk)) == content
    path.write_text("[]")
    assert list(read_json_array(path, chunk)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', "expected a JSON array"),
        ('[{"id": 1}, {"id": ', "record 1 is broken or cut off"),
        ('[{"id": 1}', "record 1 is broken or cut off"),
        ("[1, 2]", "record 0 is int"),
        ("", "expected a JSON array"),
        ('[{"id": 1} {"id": 2}]', "record 1 is broken or cut off"),
    ],
)
def test_broken_json_names_file_and_record(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(read_json_array(path))
    assert "broken.json" in str(error.value)


def test_an_error_of_broken_json_quotes_no_report(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[{"id": 1}, {"value": "Nodule of Mr Smith." "x"}]')
    with pytest.raises(ValueError, match="record 1 is broken") as error:
        list(read_json_array(path))
    assert "Smith" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_is_read_by_its_byte_order_mark(tmp_path, encoding):
    path, content = tmp_path / "a.json", [{"text": "Öd, 5 µm, 肺"}] * 3
    path.write_text(" " * 30 + json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert list(read_json_array(path, 7)) == content
    path.write_bytes('[{"text": "Öd"}]'.encode("latin-1"))
    with pytest.raises(TextEncodingError, match="byte 0xd6 in line 1"):
        list(read_json_array(path))


def test_reading_json_takes_the_memory_of_a_record(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{"id": k, "value": "word " * 2000} for k in range(500)]))
    assert path.stat().st_size > 5_000_000
    tracemalloc.start()
    assert sum(1 for _ in read_json_array(path, 1 << 16)) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ---- the paper's CSVs ----------------------------------------------------------------------------------------------


def test_the_papers_sample_files(test_data):
    folder = test_data / "reports"
    files = (folder / "SAMF_sample_mrg_data.csv", folder / "SAMF_sample_mcq_data.csv")
    found = load_samf_csv(*files, "/data", on_missing="keep")
    reports, questions = found.select(range(4)), found.select(range(4, 15))
    assert len(found) == 15 and len(set(found["id"])) == 15
    assert set(reports["task"]) == {"report"} and set(questions["task"]) == {"multiple_choice"}
    assert reports[0]["volume"] == "/data/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    assert reports[1]["answer"].startswith("As far as can be seen; A stable soft tissue mass")
    assert reports["scan_id"][:] == ["valid_1_a", "valid_2_a", "valid_3_a", "valid_4_a"]
    assert not any("<" in choice for choices in questions["choices"] for choice in choices)
    assert all(len(choices) == 4 for choices in questions["choices"])
    assert questions[0]["answer"] == "(b) A few millimetric nonspecific nodules"
    assert questions[2]["choices"][3] == "No, no aeration", "a comma inside a quoted choice"
    assert "".join(answer[1] for answer in questions["answer"]) == "bbbbbbacbbb"
    assert questions["id"][:3] == ["multiple_choice_0", "multiple_choice_0#2", "multiple_choice_0#3"]


def test_paper_csv_with_other_names_and_missing_files(tmp_path):
    """A set of one's own in this format needs no CT-RATE names."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/p1.nii.gz").touch()
    csv_path = tmp_path / "mrg.csv"
    write_rows(csv_path, ["image", "caption"], [["mine/p1.nii.gz", "Clear."], ["mine/p2.nii.gz", "Not clear."]])
    with pytest.raises(FileNotFoundError, match=r"1 of 2 volumes(.|\n)*mine/p2.nii.gz"):
        load_samf_csv(csv_path, None, tmp_path)
    found = load_samf_csv(csv_path, None, tmp_path, on_missing="skip")
    assert (found[0]["id"], found[0]["scan_id"]) == ("report_p1", "mine/p1.nii.gz")


# ---- splits and sources --------------------------------------------------------------------------------------------


def records_of(*volumes: str | None) -> datasets.Dataset:
    rows = [
        {"volume": v, "task": "report", "question": "", "choices": None, "answer": "", "id": str(k), "scan_id": "s"}
        for k, v in enumerate(volumes)
    ]
    rest = {"finding_labels": [], "patient_id": None}
    return datasets.Dataset.from_list([{**row, **rest} for row in rows], features=FEATURES)


def test_patient_overlap_names_the_patients():
    """Another scan or reconstruction of a patient is the same patient; the same number in the other split is not."""
    train = records_of("/d/train_1_a_1.nii.gz", "/d/train_5_a_1.nii.gz", None)
    check_patient_overlap(train, records_of("/d/valid_1_a_1.nii.gz", "/d/train_2_a_1.nii.gz", None))
    with pytest.raises(ValueError, match=r"^1 patients are in both .*: train_5\. "):
        check_patient_overlap(train, records_of("/e/train_5_b_2.nii.gz", None))
    with pytest.raises(ValueError, match=r"/d/own\.nii"):
        check_patient_overlap(records_of("/d/own.nii"), records_of("/d/own.nii"))


def test_phantoms_read_back_from_both_layouts_of_their_text(tmp_path):
    """A phantom set as CT-RATE and as the paper's CSVs: the same reports and questions about the same files."""
    settings = PhantomSettings(seed=1, voxel_mm=12.0, reconstructions=0.5)
    options = {"train_patients": 3, "valid_patients": 2, "text_questions": 5, "workers": 1, "progress": False}
    root = write_dataset(tmp_path, settings=settings, **options)
    train = load_records(tmp_path, "train", finding_names=DEMO_FINDINGS)
    valid = load_records(tmp_path, "valid", finding_names=DEMO_FINDINGS)
    check_patient_overlap(train, valid)
    assert set(train["task"]) == {"report", "multiple_choice", "short_answer", "long_answer"}
    assert all(len(labels) == 7 and set(labels) <= {0, 1} for labels in train["finding_labels"])

    keys = ("volume", "task", "question", "choices", "answer")
    for task, name in (("report", "mrg"), ("multiple_choice", "mcq")):
        source = str(root / "samf_csv" / f"{{split}}_{name}_data.csv")
        paper = load_records(source, "train", image_root=root, finding_names=DEMO_FINDINGS)
        ours = [tuple(str(r[k]) for k in keys) for r in train if r["task"] == task]
        assert [tuple(str(r[k]) for k in keys) for r in paper] == ours
    both = ", ".join(str(root / "samf_csv" / f"{{split}}_{name}_data.csv") for name in ("mcq", "mrg"))
    found = load_records(both, "train", image_root=root)
    ours = [tuple(str(r[k]) for k in keys) for r in train if r["task"] in ("report", "multiple_choice")]
    assert [tuple(str(r[k]) for k in keys) for r in found] == ours
    with pytest.raises(ValueError, match="both hold reports"):
        load_records(f"{root}/samf_csv/train_mrg_data.csv,{root}/samf_csv/valid_mrg_data.csv", "train")

    texts = load_records(tmp_path, "train", tasks=["multiple_choice"], vqa_files=["train_text_vqa.json"])
    assert len(texts) == 5 and set(texts["volume"]) == {None}


def test_loaders_are_found_where_they_were():
    """For one release; `samf.data.ct_rate` was a module once."""
    assert loader.load_records is ct_rate_package.load_records is load_records
    assert loader.load_samf_csv is ct_rate_package.load_samf_csv is load_samf_csv
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        loader.load_nothing  # noqa: B018 - the attribute's lookup is what fails


def test_an_unknown_source_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or CSV"):
        load_records(tmp_path / "nothing", "train")
