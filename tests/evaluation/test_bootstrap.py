"""Intervals, paired tests, baselines, template collapse and subgroups."""

import itertools
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from scipy.stats import binomtest, ttest_1samp

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.meta_evaluation import coverage, simulated_f1, simulated_mean
from samf.evaluation.metrics import bootstrap
from samf.evaluation.metrics.baselines import constant_reports, exchanged_reports, nearest_prior_reports
from samf.evaluation.metrics.bootstrap import bootstrap_intervals, bootstrap_values, patient_counts, patient_intervals
from samf.evaluation.metrics.clinical_metrics import confusion_counts, micro_metrics
from samf.evaluation.metrics.interval_coverage import LABEL_FREQUENCIES, METRICS, coverage_by_metric, true_values
from samf.evaluation.metrics.sampled_metric import SampledMetric, patient_keys, unknown_patients
from samf.evaluation.metrics.significance import paired_randomisation
from samf.evaluation.metrics.subgroups import read_subgroups, subgroup_table
from samf.evaluation.metrics.template_collapse import template_collapse
from samf.evaluation.metrics.text_metrics import text_samples

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


@pytest.fixture(scope="module")
def truths():
    return true_values()


@pytest.mark.parametrize("patients, cohorts", [(20, 300), (200, 150)])
def test_intervals_cover_with_few_patients_and_rare_findings(truths, patients, cohorts):
    """No metric is held less often than 93 % promises, within three standard errors of so many cohorts."""
    assert len(LABEL_FREQUENCIES) == len(CT_RATE_LABELS) and set(truths) == set(METRICS)
    found = coverage_by_metric(truths, patients, cohorts)
    least = 0.93 - 3 * np.sqrt(0.93 * 0.07 / cohorts)
    assert all(share >= least for share, _ in found.values()), found
    assert all(0 < width < 0.5 for _, width in found.values()), found


def test_percentiles_of_a_bootstrap_do_not_cover_with_few_patients(truths):
    """Why results don't have them: macro-F1 of 20 patients is outside in every sixth cohort."""
    found = coverage_by_metric(truths, 20, 80, intervals=lambda *cohort: bootstrap_intervals(*cohort, resamples=300))
    assert found["macro-F1"][0] < 0.9


def test_intervals_of_an_unbounded_mean_are_students():
    """Of two equally frequent values, whose kurtosis is least: all n - 1 degrees of freedom."""
    values = np.tile([0.2, 1.4], 9)
    interval = patient_intervals({"m": SampledMetric.mean(values, bounds=None)}, range(18))["m"]
    assert interval == pytest.approx(list(ttest_1samp(values, 0).confidence_interval(0.95)))


@pytest.mark.parametrize("patients", [2, 7, 200])
@pytest.mark.parametrize("right", [True, False])
def test_at_a_bound_intervals_are_clopper_pearsons(patients, right):
    """Several samples of a patient are one trial."""
    owners = np.repeat(np.arange(patients), 3)
    metric = SampledMetric.mean(np.full(3 * patients, float(right)))
    exact = binomtest(patients if right else 0, patients).proportion_ci(0.95, method="exact")
    assert patient_intervals({"m": metric}, owners)["m"] == pytest.approx([exact.low, exact.high])
    ten = SampledMetric.mean(np.full(3 * patients, 10.0 * right), bounds=(0.0, 10.0))
    assert patient_intervals({"m": ten}, owners)["m"] == pytest.approx([10 * exact.low, 10 * exact.high])


def test_a_finding_of_one_patient_says_little():
    """Ninety-nine other patients tell nothing of its recall."""
    truth, found = np.zeros((2, 100, 1))
    truth[3] = found[3] = 1
    metrics = {f"x.{name}": metric for name, metric in micro_metrics(confusion_counts(truth, found)[:, 0]).items()}
    assert patient_counts(metrics, range(100)) == dict.fromkeys(metrics, 1)
    for name, interval in patient_intervals(metrics, range(100)).items():
        assert metrics[name].value() == 1 and interval == pytest.approx([0.025, 1])


def test_intervals_stay_within_the_bounds_and_hold_the_figure():
    rng = np.random.default_rng(0)
    for size in (3, 5, 40):
        for chance in (0.03, 0.5, 0.97):
            values = (rng.random(size) < chance).astype(float)
            low, high = patient_intervals({"m": SampledMetric.mean(values)}, range(size))["m"]
            assert 0 <= low <= values.mean() <= high <= 1 and low < high


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_of_all_to_nothing_has_an_exact_interval(sign):
    """Ten patients, all right by one system and wrong by the other; ten times as much is no bound of another figure."""
    both = [{"m": SampledMetric.mean(np.full(10, value))} for value in (0.0, 1.0)][::sign]
    interval = paired_randomisation(*both, range(10), resamples=20)["m"]["interval"]
    assert sorted(map(abs, interval)) == pytest.approx([0.025**0.1, 1]) and interval == sorted(interval)
    wider = [{"m": SampledMetric.mean(np.arange(10.0) % 7 + value, (0.0, 10.0))} for value in (0.0, 1.0)]
    assert paired_randomisation(*wider, range(10), resamples=20)["m"]["interval"] is None


def test_what_reads_1000_is_no_surer_than_1():
    """METEOR of perfect texts is a little below 1, by their length; BERTScore's may be above, by float32's rounding."""
    exact = patient_intervals({"m": SampledMetric.mean(np.ones(12))}, range(12))["m"]
    for values in (1 - np.linspace(1e-7, 1e-5, 12), 1 + np.linspace(0, 1e-7, 12)):
        low, high = patient_intervals({"m": SampledMetric.mean(values)}, range(12))["m"]
        assert low <= exact[0] and high >= values.mean() - 1e-6


def test_no_interval_where_nothing_tells_the_spread():
    halves = {"m": SampledMetric.mean(np.full(30, 0.5))}
    assert patient_intervals(halves, range(30)) == {"m": None}
    assert patient_intervals({"m": SampledMetric.mean([1.0, 1.0])}, ["a", "a"]) == {"m": None}, "a single patient"


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
    assert result["difference"] == 0 and result["p_value"] == 1 and result["interval"] is None


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


def test_a_patient_id_counts_before_all_names():
    rows = [{"scan_id": f"scan {k}", "id": f"valid_{k}_a_1", "patient_id": k // 2} for k in range(6)]
    assert patient_keys(rows) == ["0", "0", "1", "1", "2", "2"] and unknown_patients(rows) == 0
    assert unknown_patients([{"scan_id": "case 1"}, {"id": "7"}, {}, {"id": "valid_5_a_1"}]) == 3


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
    table = subgroup_table({"m": SampledMetric.mean(values)}, list(range(30)), groups)
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


def test_what_moved_out_of_bootstrap_is_found_there_with_a_warning():
    with pytest.warns(FutureWarning, match=r"significance; the old place will go"):
        assert bootstrap.paired_randomisation is paired_randomisation
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bootstrap.nothing  # noqa: B018
