"""Phantoms: is what is written true, repeatable, and asked so that nothing but the volume gives the answer away?"""

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.phantoms import text
from samf.phantoms.dataset import (
    DEMO_FINDINGS,
    FINDING_NAMES,
    LOBES,
    SIDES,
    Finding,
    PhantomSettings,
    make_phantom,
    parse_args,
    plan_patient,
    sample_findings,
    write_dataset,
    write_nifti,
)
from samf.phantoms.questions import QUESTIONS, ask_about_text, ask_all

SETTINGS = PhantomSettings(seed=4, voxel_mm=10.0, reconstructions=0.6)
EXAMPLES = {
    "Pleural effusion": Finding("Pleural effusion", side="bilateral"),
    "Lung nodule": Finding("Lung nodule", lobe="right upper lobe", size_mm=24),
    "Consolidation": Finding("Consolidation", lobe="left upper lobe"),
    "Atelectasis": Finding("Atelectasis", lobe="left lower lobe"),
}


def example(name: str) -> Finding:
    return EXAMPLES[name] if name in EXAMPLES else Finding(name)


def with_and_without(finding: Finding, seed: int, voxel_mm: float = 5.0):
    """The same patient, grid and noise, with the finding and without."""
    shown = make_phantom(np.random.default_rng(seed), voxel_mm=voxel_mm, findings=[finding])
    return shown, make_phantom(np.random.default_rng(seed), voxel_mm=voxel_mm, findings=[])


def world(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Scanner coordinates (N, 3) in mm of a mask's voxels."""
    return nib.affines.apply_affine(affine, np.argwhere(mask))


def file_hashes(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A small data set, written in this process."""
    out = tmp_path_factory.mktemp("phantoms")
    write_dataset(
        out, train_patients=5, valid_patients=3, settings=SETTINGS, text_questions=30, workers=1, progress=False
    )
    return out


# ---- repeatable ----------------------------------------------------------------------------------------------------


def test_workers_change_no_byte(phantoms, tmp_path):
    write_dataset(
        tmp_path, train_patients=5, valid_patients=3, settings=SETTINGS, text_questions=30, workers=2, progress=False
    )
    assert file_hashes(tmp_path) == file_hashes(phantoms)


def test_seed_and_split_and_patient_each_give_another_chest():
    plans = [
        plan_patient(PhantomSettings(seed=seed), split, patient)[0].seeds["patient"]
        for seed in (0, 1)
        for split in ("train", "valid")
        for patient in range(1, 50)
    ]
    assert len(set(plans)) == len(plans)


def test_train_and_valid_share_no_volume(phantoms):
    hashes = {name: h for name, h in file_hashes(phantoms).items() if name.endswith(".nii.gz")}
    train = {h for name, h in hashes.items() if "train_fixed" in name}
    valid = {h for name, h in hashes.items() if "valid_fixed" in name}
    assert len(train) >= 5 and len(valid) >= 3 and not train & valid
    assert len(train) + len(valid) == len(hashes)


def test_a_broken_run_goes_on_where_it_ended(tmp_path):
    options = {"train_patients": 2, "valid_patients": 0, "text_questions": 0, "workers": 1, "progress": False}
    root = write_dataset(tmp_path, settings=SETTINGS, **options)
    before = file_hashes(tmp_path)
    lost = root / "train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"
    kept = root / "train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    written_at = kept.stat().st_mtime_ns
    lost.unlink()
    write_dataset(tmp_path, settings=SETTINGS, **options)
    assert file_hashes(tmp_path) == before
    assert kept.stat().st_mtime_ns == written_at
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_settings_do_not_mix_into_a_folder(phantoms):
    with pytest.raises(ValueError, match=r"seed.: 4.*Choose another folder"):
        write_dataset(phantoms, train_patients=1, valid_patients=0, settings=PhantomSettings(seed=5), progress=False)


# ---- true to the volume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_codes", ["RAS", "LPS", "SRP", "ILA"])
@pytest.mark.parametrize("side", SIDES[:2])
def test_effusion_lies_on_its_side_by_the_written_affine(tmp_path, axis_codes, side):
    """World coordinates of NIfTI grow to the patient's right, front and head, however the array is stored."""
    images = []
    for phantom, name in zip(with_and_without(Finding("Pleural effusion", side=side), 11), "ab", strict=True):
        write_nifti(phantom, tmp_path / f"{name}.nii.gz", axis_codes)
        images.append(nib.load(tmp_path / f"{name}.nii.gz"))
    assert "".join(nib.aff2axcodes(images[0].affine)) == axis_codes
    difference = np.asarray(images[0].dataobj, dtype=int) - np.asarray(images[1].dataobj)
    fluid = world(difference > 300, images[0].affine)
    assert len(fluid) > 300
    assert np.all(fluid[:, 0] > -5) if side == "right" else np.all(fluid[:, 0] < 5)
    assert fluid[:, 1].mean() < -40, "fluid lies at the back of a supine patient"


@pytest.mark.parametrize("seed", range(3))
def test_organs_lie_on_their_sides(seed):
    """Heart to the left of the spine's plane, liver to the right, lungs above the abdomen."""
    with_heart = make_phantom(np.random.default_rng(seed), findings=[Finding("Cardiomegaly")])
    heart = world(with_heart.masks["Cardiomegaly"], with_heart.affine)
    assert -40 < heart[:, 0].mean() < -5
    below = with_heart.hu[:, :, :6]
    middle = below.shape[0] // 2
    liver_voxels = (below > 30) & (below < 90)
    assert liver_voxels[middle:].sum() > 1.2 * liver_voxels[:middle].sum()


@pytest.mark.parametrize("lobe", LOBES)
@pytest.mark.parametrize("name", ["Lung nodule", "Consolidation"])
def test_lobes_lie_where_they_should(name, lobe):
    size = {"size_mm": 20} if name == "Lung nodule" else {}
    phantom = make_phantom(np.random.default_rng(8), findings=[Finding(name, lobe=lobe, **size)])
    x, y, z = world(phantom.masks[name], phantom.affine).mean(0)
    assert (x > 20) if lobe.startswith("right") else (x < -20)
    if "upper" in lobe:
        assert z > 25
    elif "lower" in lobe:
        assert z < 0 and y < -10
    else:
        assert z < 15 and y > 10


def test_nodule_has_its_size():
    for size in (16, 22, 30):
        phantom = make_phantom(
            np.random.default_rng(2),
            voxel_mm=2.0,
            findings=[Finding("Lung nodule", lobe="left upper lobe", size_mm=size)],
        )
        volume = phantom.masks["Lung nodule"].sum() * np.prod(phantom.spacing)
        assert 2 * (3 * volume / (4 * np.pi)) ** (1 / 3) == pytest.approx(size, rel=0.12)


# Bounds of the mean HU inside the mask, and the least change of HU that the finding makes there.
SEEN = {
    "Arterial wall calcification": (180, 1000, 200),
    "Pericardial effusion": (-40, 35, 100),
    "Emphysema": (-1000, -930, 70),
    "Lung nodule": (-160, 80, 450),
    "Pleural effusion": (-80, 40, 500),
    "Consolidation": (-160, 80, 500),
    "Lymphadenopathy": (-160, 80, 20),
    "Atelectasis": (-700, 80, 150),
    "Peribronchial thickening": (-900, 80, 80),
}


@pytest.mark.parametrize("name", SEEN)
def test_masks_show_their_finding(name):
    low, high, least = SEEN[name]
    for seed in (20, 21):
        shown, normal = with_and_without(example(name), seed)
        mask = shown.masks[name]
        assert mask.dtype == bool and mask.shape == shown.hu.shape and mask.sum() > 20
        assert low < shown.hu[mask].mean() < high
        assert abs(shown.hu[mask].astype(float) - normal.hu[mask]).mean() > least


@pytest.mark.parametrize("name", ["Lung nodule", "Consolidation", "Lymphadenopathy", "Arterial wall calcification"])
def test_a_finding_changes_nothing_far_from_its_mask(name):
    shown, normal = with_and_without(example(name), 5)
    near = ndimage.binary_dilation(shown.masks[name], iterations=9)  # 45 mm
    np.testing.assert_array_equal(shown.hu[~near], normal.hu[~near])


def test_cardiomegaly_is_a_ratio_beyond_normal_variation():
    """Widest heart over widest thorax, as read on a film: the radiologist's limit is one half."""

    def ratio(phantom, heart):
        lungs = world(phantom.hu < -600, phantom.affine)
        inside = lungs[np.abs(lungs[:, 0]) < 135]
        return np.ptp(world(heart, phantom.affine)[:, 0]) / np.ptp(inside[:, 0])

    for seed in range(6):
        phantom = make_phantom(np.random.default_rng(seed), findings=[Finding("Cardiomegaly")])
        body = ndimage.binary_fill_holes(phantom.hu > -400)
        phantom.hu[~ndimage.binary_erosion(body, iterations=3)] = 0  # air outside is not lung
        assert ratio(phantom, phantom.masks["Cardiomegaly"]) > 0.52


def mean_slabs(hu: np.ndarray, axis: int, window: tuple[int, int], slabs: int = 14) -> list[np.ndarray]:
    """A windowed volume cut into slabs along one axis, each averaged: what a coarse slice stack shows, in [0, 1]."""
    shown = np.clip((hu.astype(np.float32) - window[0]) / (window[1] - window[0]), 0, 1)
    return [part.mean(axis) for part in np.array_split(shown, slabs, axis)]


@pytest.mark.parametrize("name", DEMO_FINDINGS)
def test_demo_findings_stay_visible_in_coarse_slabs(name):
    """Of 14 mean slabs a plane, at least three show a change of 5 % of a window's width in four pixels or more."""
    finding = Finding(name, lobe="left lower lobe", size_mm=16) if name == "Lung nodule" else example(name)
    shown, normal = with_and_without(finding, 31)
    visible = set()
    for axis in range(3):
        for window in ((-1350, 150), (-160, 240), (-1000, 1000)):
            pairs = zip(mean_slabs(shown.hu, axis, window), mean_slabs(normal.hu, axis, window), strict=True)
            visible |= {(axis, k) for k, (a, b) in enumerate(pairs) if (np.abs(a - b) > 0.05).sum() >= 4}
    assert len(visible) >= 3


def test_voxel_size_does_not_change_the_patient():
    volumes = []
    for voxel_mm in (4.0, 8.0):
        phantom = make_phantom(np.random.default_rng(9), voxel_mm=voxel_mm, findings=[Finding("Emphysema")])
        assert phantom.hu.dtype == np.int16
        for edge, limit in zip(phantom.spacing, (0.11, 0.11, 0.21), strict=True):
            assert abs(edge / voxel_mm - 1) < limit
        heart = make_phantom(np.random.default_rng(9), voxel_mm=voxel_mm, findings=[Finding("Cardiomegaly")])
        volumes.append(heart.masks["Cardiomegaly"].sum() * np.prod(heart.spacing))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.04)


def test_findings_are_checked():
    with pytest.raises(ValueError, match="not a phantom finding"):
        Finding("Pneumothorax")
    with pytest.raises(ValueError, match="needs a side"):
        Finding("Pleural effusion")
    with pytest.raises(ValueError, match="lobe must be|lobe one of"):
        Finding("Consolidation", lobe="left middle lobe")


# ---- what is written -----------------------------------------------------------------------------------------------


def test_tables_agree_with_the_volumes(phantoms):
    root = phantoms / "dataset"
    for split, stem in (("train", "train"), ("valid", "validation")):
        reports = read_csv(root / f"radiology_text_reports/{stem}_reports.csv")
        labels = read_csv(root / f"multi_abnormality_labels/{split}_predicted_labels.csv")
        metadata = read_csv(root / f"metadata/{stem}_metadata.csv")
        names = [row["VolumeName"] for row in reports]
        assert names == [row["VolumeName"] for row in labels] == [row["VolumeName"] for row in metadata]
        assert list(labels[0]) == ["VolumeName", *CT_RATE_LABELS]
        for row in metadata:
            patient, scan = re.match(r"((?:train|valid)_\d+)_([a-z])_\d", row["VolumeName"]).groups()
            image = nib.load(root / f"{split}_fixed/{patient}/{patient}_{scan}/{row['VolumeName']}")
            assert image.get_data_dtype() == np.int16 and image.dataobj.slope == 1 and image.dataobj.inter == 0
            ras = nib.as_closest_canonical(image)
            assert ras.shape == (int(row["Columns"]), int(row["Rows"]), int(row["NumberofSlices"]))
            spacing = [*json.loads(row["XYSpacing"]), float(row["ZSpacing"])]
            np.testing.assert_allclose(ras.header.get_zooms(), spacing, atol=1e-4)
        for report, label in zip(reports, labels, strict=True):
            stated = read_labels_back(report["Findings_EN"])
            assert stated == {name for name in FINDING_NAMES if label[name] == "1"}
            assert not any(label[name] == "1" for name in set(CT_RATE_LABELS) - set(FINDING_NAMES))


def test_reconstructions_and_second_scans(phantoms):
    """A reconstruction shares its scan's report and shows it on another grid; a second scan has its own report."""
    rows = {row["VolumeName"]: row for row in read_csv(phantoms / "dataset/radiology_text_reports/train_reports.csv")}
    second = [name for name in rows if name.endswith("_2.nii.gz")]
    assert second and any("_b_" in name for name in rows)
    for name in second:
        first = name.replace("_2.nii.gz", "_1.nii.gz")
        assert rows[name]["Findings_EN"] == rows[first]["Findings_EN"]
        shapes = [nib.load(next(phantoms.rglob(n))).shape for n in (name, first)]
        assert sorted(shapes[0]) != sorted(shapes[1])


def test_orientations_vary(phantoms):
    codes = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in phantoms.rglob("*.nii.gz")}
    assert len(codes) >= 3


def test_vqa_answers_agree_with_the_labels(phantoms):
    root = phantoms / "dataset"
    labels = {row["VolumeName"]: row for row in read_csv(root / "multi_abnormality_labels/train_predicted_labels.csv")}
    tasks = Counter()
    for record in json.loads((root / "vqa/train_vqa.json").read_text()):
        turns = record["conversations"]
        assert turns[0]["value"].startswith("<image>\n") and record["image"] in labels
        for human, reply in zip(turns[::2], turns[1::2], strict=True):
            task = re.search(r"<(\w+)>$", human["value"])[1]
            tasks[task] += 1
            if task == "multiple_choice":
                letter, option = re.fullmatch(r"\(([a-d])\) (.+)", reply["value"]).groups()
                assert f"({letter}) {option}" in human["value"]
            if task == "multiple_choice" and re.search(r"findings? (is|does).*(present|observed|show)", human["value"]):
                name = next((name for name, phrase in text.PHRASES.items() if phrase == option), None)
                negative = "not observed" in human["value"] or "not show" in human["value"]
                assert name is None or (labels[record["image"]][name] == "1") != negative
            if task == "short_answer":
                asked = re.search(r"Is there (.+) in this", human["value"])[1]
                name = next(name for name, phrase in text.PHRASES.items() if phrase == asked)
                assert reply["value"] == ("Yes." if labels[record["image"]][name] == "1" else "No.")
    assert set(tasks) == {"report_generation", "multiple_choice", "short_answer", "long_answer"}
    assert any(len(r["conversations"]) > 2 for r in json.loads((root / "vqa/train_vqa.json").read_text()))


def test_text_questions_have_no_image(phantoms):
    records = json.loads((phantoms / "dataset/vqa/train_text_vqa.json").read_text())
    assert len(records) == 30 and not any("image" in record for record in records)
    assert not any("<image>" in record["conversations"][0]["value"] for record in records)


def test_paper_csvs_repeat_the_same_content(phantoms):
    root = phantoms / "dataset"
    captions = {row["image"].rsplit("/", 1)[-1]: row for row in read_csv(root / "samf_csv/train_mrg_data.csv")}
    for row in read_csv(root / "radiology_text_reports/train_reports.csv"):
        assert captions[row["VolumeName"]]["caption"] == row["Findings_EN"]
        assert (root / captions[row["VolumeName"]]["image"]).is_file()
    for row in read_csv(root / "samf_csv/train_mcq_data.csv"):
        assert row[f"Choice {row['Answer Choice'].upper()}"] == row["Answer"]


def test_command_line_defaults():
    args = parse_args(["out"])
    assert (args.patients, args.valid_patients, args.seed, args.reconstructions) == (400, 100, 0, 0.0)
    with pytest.raises(SystemExit):
        parse_args(["out", "--patients", "3", "--valid_patients", "4"])


# ---- words ---------------------------------------------------------------------------------------------------------


def read_labels_back(report: str) -> set[str]:
    """Findings that a report affirms, by the plainest rule: its phrase in a sentence without 'no' or 'not'."""
    affirmed = set()
    for sentence in re.split(r"(?<=[.;])\s+", report.lower()):
        for name, phrase in text.PHRASES.items():
            if phrase in sentence and not re.search(r"\b(no|not)\b", sentence):
                affirmed.add(name)
    return affirmed


def test_every_sentence_is_unambiguous():
    """Each template is about its own finding only, and a rule distinguishes presence from absence."""
    for name in FINDING_NAMES:
        phrase = text.PHRASES[name]
        assert 3 <= len(text.PRESENT[name]) <= 5 and 3 <= len(text.ABSENT[name]) <= 5
        for sentence in text.PRESENT[name] + text.ABSENT[name]:
            filled = sentence.format(side="left", Side="Left", lobe="left lower lobe", size_mm=20).lower()
            assert [p for p in text.PHRASES.values() if p in filled] == [phrase]
            assert (re.search(r"\b(no|not)\b", filled) is None) == (sentence in text.PRESENT[name])
    for sentence in (sentence for sentences in text.NORMAL.values() for sentence in sentences):
        assert not any(phrase in sentence.lower() for phrase in text.PHRASES.values())


def test_reports_state_the_findings_in_few_words():
    rng = np.random.default_rng(0)
    vocabulary, lengths = set(), []
    for _ in range(400):
        findings = sample_findings(rng)
        report = text.join_report(text.write_statements(rng, findings))
        assert read_labels_back(report) == set(findings)
        assert read_labels_back(text.write_impression(findings)) == set(findings)
        effusion = findings.get("Pleural effusion")
        assert [side for side in SIDES if f"{side} pleural effusion" in report.lower()] == (
            [effusion.side] if effusion else []
        )
        for name in ("Lung nodule", "Consolidation"):
            if name in findings:
                assert findings[name].lobe in report
        if "Lung nodule" in findings:
            assert f"{findings['Lung nodule'].size_mm} mm" in report
        vocabulary |= set(re.findall(r"\w+", report.lower()))
        lengths.append(len(report.split()))
    assert len(vocabulary) <= 300
    assert min(lengths) >= 60 and max(lengths) <= 120


def test_findings_are_independent_and_equally_frequent():
    rng = np.random.default_rng(1)
    draws = [sample_findings(rng) for _ in range(4000)]
    present = np.array([[name in findings for name in FINDING_NAMES] for findings in draws])
    assert stats.chisquare(present.sum(0), np.full(10, present.sum() / 10)).pvalue > 1e-3
    assert np.abs(present.mean(0) - 1 / 3).max() < 0.03
    correlation = np.corrcoef(present.T) - np.eye(10)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(draws))
    for name, attribute, values in (("Pleural effusion", "side", SIDES), ("Lung nodule", "lobe", LOBES)):
        counts = Counter(getattr(findings[name], attribute) for findings in draws if name in findings)
        assert stats.chisquare([counts[value] for value in values]).pvalue > 1e-3


# ---- multiple choice -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    """[(findings, questions)] of many scans, no volumes needed."""
    rng = np.random.default_rng(7)
    scans = []
    for _ in range(5000):
        findings = sample_findings(rng)
        scans.append((findings, ask_all(rng, findings)))
    return scans


def test_about_five_questions_a_scan(asked):
    assert 4 < np.mean([len(questions) for _, questions in asked]) < 6
    assert {q.family for _, questions in asked for q in questions} == set(QUESTIONS)


def test_letters_are_uniform_in_each_family(asked):
    for family in QUESTIONS:
        letters = Counter(q.letter for _, questions in asked for q in questions if q.family == family)
        assert stats.chisquare([letters[letter] for letter in "abcd"]).pvalue > 1e-3


def test_each_option_is_right_a_quarter_of_the_time(asked):
    """The family, the finding asked for and the option's text don't help to guess, even together."""
    for family in QUESTIONS:
        offered, right = Counter(), Counter()
        for _, questions in asked:
            for q in (q for q in questions if q.family == family):
                about = q.about[0] if family == "lobe" else ""
                offered.update((about, choice) for choice in q.choices)
                right[about, q.choices[q.answer]] += 1
        shares = {key: right[key] / n for key, n in offered.items()}
        spread = np.array([(right[key] - n / 4) / np.sqrt(n * 3 / 16) for key, n in offered.items()])
        assert stats.chi2.sf((spread**2).sum(), len(spread) - 1) > 1e-3, (family, shares)


def test_each_option_set_is_exchangeable(asked):
    """Within one set of four options, each is right equally often, so that no combination gives itself away."""
    right = defaultdict(Counter)
    for _, questions in asked:
        for q in questions:
            right[q.family, q.about[0] if q.family == "lobe" else "", frozenset(q.choices)][q.choices[q.answer]] += 1
    pvalues = [
        stats.chisquare([counts[choice] for choice in key[2]]).pvalue
        for key, counts in right.items()
        if sum(counts.values()) >= 40
    ]
    assert len(pvalues) > 40
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def holds(question, choice: str, findings) -> bool:
    """Would `choice` answer `question` for a scan with these findings?"""
    effusion = findings.get("Pleural effusion")
    if question.family == "side":
        return choice == f"{effusion.side if effusion else 'no'} pleural effusion"
    if question.family == "lobe":
        return question.about[0] in findings and findings[question.about[0]].lobe == choice
    name = next(name for name, phrase in text.PHRASES.items() if phrase == choice)
    return (name in findings) == (question.family == "present")


def test_exactly_the_answer_holds(asked):
    for findings, questions in asked[:1000]:
        for q in questions:
            assert [holds(q, choice, findings) for choice in q.choices] == [k == q.answer for k in range(4)]


def test_another_patients_volume_answers_at_chance(asked):
    """Who sees the wrong patient perfectly is right in one of four, in every family."""
    rng = np.random.default_rng(3)
    hits, total = Counter(), Counter()
    for k, (_, questions) in enumerate(asked):
        seen = asked[(k + 1) % len(asked)][0]
        for q in questions:
            options = [i for i, choice in enumerate(q.choices) if holds(q, choice, seen)] or range(4)
            hits[q.family] += rng.choice(options) == q.answer
            total[q.family] += 1
    for family, n in total.items():
        assert abs(hits[family] / n - 0.25) < 4 * np.sqrt(3 / 16 / n), family


def test_text_questions_can_be_answered_from_their_text():
    """By a rule: what the impression lists is there, with its side or lobe, and nothing else is."""
    rng = np.random.default_rng(5)
    families = Counter()
    for _ in range(400):
        context, q = ask_about_text(rng)
        affirmed = read_labels_back(context)
        families[q.family] += 1
        if q.family == "side":
            listed = "Pleural effusion" in affirmed
            options = [c for c in q.choices if (c in context.lower() if listed else c.startswith("no "))]
        elif q.family == "lobe":
            said = next(s for s in context.lower().split(". ") if text.PHRASES[q.about[0]] in s)
            options = [c for c in q.choices if c in said]
        else:
            wanted = {text.PHRASES[name] for name in affirmed}
            options = [c for c in q.choices if (c in wanted) == (q.family == "present")]
        assert options == [q.choices[q.answer]], (context, q)
    assert set(families) == set(QUESTIONS)


def test_demo_questions_ask_for_demo_findings_only(asked):
    subtle = {text.PHRASES[name] for name in FINDING_NAMES if name not in DEMO_FINDINGS}
    assert not any(subtle & set(q.choices) for _, questions in asked for q in questions)
    rng = np.random.default_rng(2)
    scans = [sample_findings(rng) for _ in range(200)]
    assert subtle & {choice for f in scans for q in ask_all(rng, f, FINDING_NAMES) for choice in q.choices}
