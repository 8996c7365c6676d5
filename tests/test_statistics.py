"""Intervals, paired tests, baselines, template collapse and subgroups."""

import itertools
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from samf.evaluation.meta_evaluation import coverage, simulated_f1, simulated_mean
from samf.evaluation.statistics import (
    SampledMetric,
    bootstrap_intervals,
    bootstrap_values,
    constant_reports,
    exchanged_reports,
    nearest_prior_reports,
    paired_randomisation,
    patient_keys,
    read_subgroups,
    subgroup_table,
    template_collapse,
)
from samf.evaluation.text_metrics import text_samples

WORDS = [
    "no",
    "nodule",
    "effusion",
    "was",
    "seen",
    "in",
    "the",
    "left",
    "right",
    "lung",
    "heart",
    "is",
    "normal",
    "large",
]


def texts(count: int, seed: int, length: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, length))) for _ in range(count)]


# --- intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulate", [simulated_mean, simulated_f1])
def test_intervals_cover_the_truth_as_often_as_they_say(simulate):
    """95 % intervals of 1,200 simulated cohorts hold the true figure in 93 to 97 % of them.

    Had samples been drawn instead of patients, they would miss it far more often: a patient's samples are alike.
    """
    assert 0.93 <= coverage(simulate) <= 0.97
    if simulate is simulated_mean:
        assert coverage(simulate, by_patient=False) < 0.85


def test_bootstrap_is_that_of_resampled_texts():
    """Corpus BLEU from patients' summed counts is sacrebleu's of the patients' texts, drawn one by one."""
    predictions, references = texts(30, 1), texts(30, 2)
    patients = [k // 3 for k in range(30)]
    samples = {name: metric for name, metric in text_samples(predictions, references).items() if name == "bleu_2"}
    values = bootstrap_values(samples, patients, resamples=20, seed=5)["bleu_2"]
    weights = np.random.default_rng(5).multinomial(10, np.full(10, 0.1), size=20)
    bleu = BLEU(max_ngram_order=2, smooth_method="none")
    for value, counts in zip(values, weights, strict=True):
        drawn = [k for k in range(30) for _ in range(counts[patients[k]])]
        expected = bleu.corpus_score([predictions[k] for k in drawn], [[references[k] for k in drawn]]).score / 100
        assert value == pytest.approx(expected, abs=1e-9)


def test_intervals_are_the_same_for_one_seed_and_hold_the_figure():
    metric = {"m": SampledMetric.mean(np.linspace(0, 1, 60))}
    first = bootstrap_intervals(metric, range(60), seed=3)
    assert first == bootstrap_intervals(metric, range(60), seed=3) != bootstrap_intervals(metric, range(60), seed=4)
    low, high = first["m"]
    assert low < 0.5 < high


def test_a_single_patient_has_no_interval_and_undefined_figures_none():
    metric = {"m": SampledMetric.mean([0.1, 0.9])}
    assert bootstrap_intervals(metric, ["a", "a"]) == {"m": None}
    nothing = {"m": SampledMetric(np.zeros((4, 2)), metric["m"].combine)}
    assert nothing["m"].value() is None and bootstrap_intervals(nothing, range(4)) == {"m": None}


def test_unequal_numbers_are_an_error():
    with pytest.raises(ValueError, match="2 samples and 3 patients"):
        bootstrap_values({"m": SampledMetric.mean([0, 1])}, [1, 2, 3])


# --- paired test ------------------------------------------------------------------------------------------------


def test_randomisation_equals_full_enumeration():
    """Six patients: the p-value over all 2⁶ ways of exchanging the systems."""
    rng = np.random.default_rng(0)
    a, b = rng.random(12), rng.random(12) + 0.15
    patients = np.repeat(np.arange(6), 2)
    observed = abs(b.mean() - a.mean())
    signs = np.array(list(itertools.product([1, -1], repeat=6)))[:, patients]
    exact = np.mean(np.abs((signs * (b - a)).mean(axis=1)) >= observed - 1e-12)
    result = paired_randomisation(
        {"m": SampledMetric.mean(a)}, {"m": SampledMetric.mean(b)}, patients, resamples=20_000, seed=1
    )["m"]
    assert result["difference"] == pytest.approx(b.mean() - a.mean())
    assert result["p_value"] == pytest.approx(exact, abs=0.015)
    assert result["interval"][0] < result["difference"] < result["interval"][1]


def test_p_values_are_uniform_without_a_difference():
    """Of 300 pairs of equal systems about 5 % have p ≤ 0.05: at most 8 %, and some do."""
    rng = np.random.default_rng(2)
    p = []
    for seed in range(300):
        both = [{"m": SampledMetric.mean(rng.random(30))} for _ in range(2)]
        p.append(paired_randomisation(*both, range(30), resamples=200, seed=seed)["m"]["p_value"])
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.08


def test_a_system_does_not_differ_from_itself():
    metric = {"m": SampledMetric.mean(np.arange(10.0))}
    result = paired_randomisation(metric, metric, range(10), resamples=100)["m"]
    assert result["difference"] == 0 and result["p_value"] == 1 and result["interval"] == [0, 0]


# --- patients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, patient",
    [
        ({"scan_id": "valid_53_a"}, "valid_53"),
        ({"scan_id": "train_7_b", "id": "q1"}, "train_7"),
        ({"id": "valid_5_a_1"}, "valid_5"),
        ({"scan_id": "case 12"}, "case 12"),
        ({"scan_id": "case 12", "id": "dataset/valid_5_a_1"}, "valid_5"),
        ({"id": "7"}, "row 0"),
        ({}, "row 0"),
    ],
)
def test_patient_keys(row, patient):
    assert patient_keys([row]) == [patient]


def test_rows_without_names_are_patients_of_their_own():
    assert len(set(patient_keys([{}, {}, {"id": "a"}]))) == 3


# --- baselines --------------------------------------------------------------------------------------------------


def test_constant_report_is_the_one_of_most_other_patients():
    references = ["normal", "normal", "normal", "nodule", "nodule", "mass"]
    patients = ["p", "p", "q", "r", "s", "t"]
    # "normal" and "nodule" have two owners each, of equal length; p's own "normal" leaves one owner, so p gets "nodule".
    assert constant_reports(references, patients) == ["nodule", "nodule", "nodule", "normal", "normal", "normal"]


def test_constant_report_never_is_the_patients_own_alone():
    references = texts(40, 3)
    patients = [k // 2 for k in range(40)]
    for text, patient in zip(constant_reports(references, patients), patients, strict=True):
        assert any(
            reference == text and owner != patient for reference, owner in zip(references, patients, strict=True)
        )


def test_constant_report_of_distinct_ones_has_an_ordinary_length():
    references = ["a", "a b c d", "a b c d e f g h i j k l"]
    assert constant_reports(references, [1, 2, 3])[0] == "a b c d"


def test_nearest_prior_report():
    """Frequencies (2/4, 1/4): [1, 0] and [0, 0] lie nearest, the latter's reports being of patients 2 and 3."""
    labels = np.array([[1, 1], [0, 0], [0, 0], [1, 0]])
    references = ["both", "none, one", "none at all", "first alone"]
    found = nearest_prior_reports(references, labels, [1, 2, 3, 4])
    assert found[0] in references and len(set(found)) == 2
    best = found[0]
    assert [text for text in found if text != best] == [found[references.index(best)]]


def test_exchanged_reports_go_to_other_patients():
    predictions, patients = [f"text {k}" for k in range(10)], [0, 0, 1, 2, 2, 2, 3, 3, 4, 4]
    owner = dict(zip(predictions, patients, strict=True))
    exchanged = exchanged_reports(predictions, patients, seed=1)
    assert all(owner[text] != patient for text, patient in zip(exchanged, patients, strict=True))
    donors = {(patient, owner[text]) for text, patient in zip(exchanged, patients, strict=True)}
    assert len(donors) == 5
    with pytest.raises(ValueError, match="at least two"):
        exchanged_reports(["a", "b"], [1, 1])


# --- collapse ---------------------------------------------------------------------------------------------------


def naive_template(texts_, at_least: int) -> int:
    words = [text.lower().split() for text in texts_]
    for n in range(max(map(len, words)), 0, -1):
        runs = [{tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in words]
        if any(sum(run in other for other in runs) >= at_least for run in set().union(*runs)):
            return n
    return 0


def naive_loop(texts_) -> int:
    best = 0
    for text in texts_:
        words = text.lower().split()
        for n in range(1, len(words)):
            runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            if len(set(runs)) < len(runs):
                best = max(best, n)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_collapse_equals_search_by_hand(seed):
    many = texts(9, seed, length=30)
    found = template_collapse(many)
    assert found["template"]["words"] == naive_template(many, 5)
    assert found["loop"]["words"] == naive_loop(many)
    assert found["template"]["text"] in " | ".join(many)
    run = found["loop"]
    text = many[run["index"]].split()
    places = [i for i in range(len(text)) if text[i : i + run["words"]] == run["text"].split()]
    assert len(places) >= 2


def test_collapse_of_one_template():
    found = template_collapse(["Heart size is normal."] * 3 + ["A nodule."])
    assert found["distinct_ratio"] == 0.5 and found["most_frequent"] == 0.75
    assert found["template"] == {"words": 4, "text": "heart size is normal."}
    assert found["loop"]["words"] == 0


def test_collapse_of_a_loop_and_of_nothing():
    assert template_collapse(["no nodule " * 5000])["loop"]["words"] == 9998
    assert template_collapse(["", ""])["distinct_ratio"] == 0.5
    assert template_collapse([])["distinct_ratio"] is None


# --- subgroups --------------------------------------------------------------------------------------------------

METADATA = """VolumeName,Manufacturer,ManufacturerModelName,PatientSex,PatientAge,ConvolutionKernel
valid_1_a_1.nii.gz,Philips,iCT 256,M,036Y,YA
valid_1_a_2.nii.gz,Philips,iCT 256,M,036Y,B
valid_2_a_1.nii.gz,Siemens,Force,F,75,"['Br40f', '3']"
valid_3_a_1.nii.gz,,,,011M,
valid_4_a_1.nii.gz,GE,CT,F,xx,LUNG
"""


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(METADATA, encoding="utf-8")
    return path


def test_subgroups_of_rows(metadata):
    rows = [
        {"volume": "valid_1_a_2.nii.gz", "scan_id": "valid_1_a"},
        {"id": "valid_1_a_2#2"},
        {"id": "7", "scan_id": "valid_1_a"},
        {"scan_id": "valid_2_a"},
        {"scan_id": "valid_3_a"},
        {"scan_id": "valid_4_a"},
        {"scan_id": "valid_99_a"},
        {},
    ]
    groups = read_subgroups(metadata, rows)
    assert groups["kernel"] == ["B", "B", "YA", "Br40f 3", "unknown", "LUNG", "unknown", "unknown"]
    assert groups["age"] == ["under 40"] * 3 + ["75 and over", "under 40", "unknown", "unknown", "unknown"]
    assert groups["sex"] == ["M", "M", "M", "F", "unknown", "F", "unknown", "unknown"]
    assert groups["scanner"][:3] == ["Philips iCT 256"] * 3 and groups["scanner"][4] == "unknown"


def test_subgroup_figures_are_those_of_their_samples():
    values = np.arange(30.0)
    groups = {"sex": ["M"] * 12 + ["F"] * 15 + ["x"] * 2 + ["y"], "kernel": [f"k{n // 5}" for n in range(30)]}
    table = subgroup_table({"m": SampledMetric.mean(values)}, list(range(30)), groups, resamples=50)
    assert [(row["group"], row["count"]) for row in table] == [("F", 15), ("M", 12), ("small groups together", 3)]
    assert [row["m"]["value"] for row in table] == [values[12:27].mean(), values[:12].mean(), values[27:].mean()]
    assert sum(row["count"] for row in table) == 30


def test_metadata_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected CT-RATE's metadata"):
        read_subgroups(tmp_path / "nowhere.csv", [{}])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column VolumeName"):
        read_subgroups(tmp_path / "other.csv", [{}])


def test_real_metadata(test_data):
    """Every one of the 3,039 volumes has a sex or is unknown, and bands add up."""
    path = test_data / "reports" / "CT-RATE_validation_metadata.csv"
    names = [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    groups = read_subgroups(path, [{"volume": name} for name in names])
    assert len(names) == 3039 and set(groups["sex"]) <= {"M", "F", "unknown"}
    assert groups["scanner"].count("unknown") < 30 and groups["age"].count("unknown") < 30
