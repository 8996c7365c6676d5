"""F1 tables, CRG, sides and sizes, and the loaders of RadBERT and RadEval."""

import sys
import types
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, RobertaConfig

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.meta_evaluation import change_sizes
from samf.evaluation.metrics import clinical_metrics as clinical
from samf.evaluation.metrics import radbert
from samf.evaluation.metrics.bootstrap import bootstrap_intervals, bootstrap_values
from samf.evaluation.metrics.report_readings import rule_labels
from samf.evaluation.metrics.report_sizes import read_sizes
from samf.model.text_labeller import label_reports

# --- F1 ---------------------------------------------------------------------------------------------------------


def test_macro_f1_by_hand():
    """Label 1: 1 hit, 1 false, 0 missed → F1 2/3; label 2: 1 hit, 0 false, 1 missed → 2/3; label 3 in no reference."""
    truth = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    found = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    counts = clinical.confusion_counts(truth, found)
    macro = {name: metric.value() for name, metric in clinical.macro_metrics(counts).items()}
    assert macro == pytest.approx({"precision": (1 / 2 + 1) / 2, "recall": (1 + 1 / 2) / 2, "f1": 2 / 3})
    micro = {name: metric.value() for name, metric in clinical.micro_metrics(counts).items()}
    assert micro == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, found = rng.random((2, 40, 7)) < 0.3
    truth[:, 6] = False
    counts = clinical.confusion_counts(truth, found)
    occurring = [k for k in range(7) if truth[:, k].any()]
    for average, metrics in (("macro", clinical.macro_metrics(counts)), ("micro", clinical.micro_metrics(counts))):
        labels = occurring if average == "macro" else None
        expected = precision_recall_fscore_support(
            truth.astype(int), found.astype(int), labels=labels, average=average, zero_division=0
        )
        assert [metric.value() for metric in metrics.values()] == pytest.approx(expected[:3], abs=1e-9)
    expected = precision_recall_fscore_support(truth.astype(int), found.astype(int), average=None, zero_division=np.nan)
    for label in range(7):
        one = [metric.value() for metric in clinical.micro_metrics(counts[:, label]).values()]
        defined = [None if np.isnan(figures[label]) else pytest.approx(figures[label]) for figures in expected[:3]]
        assert one == defined
    assert one[1] is None  # the recall of what never occurs


def test_a_draw_without_a_finding_does_not_count_as_one_that_missed_it():
    """One of 20 patients has it and it is found: in every draw that holds the patient F1 is 1, in the others undefined."""
    truth = np.zeros((20, 1), dtype=int)
    truth[3] = 1
    metrics = clinical.micro_metrics(clinical.confusion_counts(truth, truth))
    values = bootstrap_values(metrics, range(20), resamples=200)["f1"]
    assert 0 < np.isnan(values).sum() < 200 and set(values[~np.isnan(values)]) == {1.0}
    assert bootstrap_intervals(metrics, range(20), resamples=200)["f1"] == [1.0, 1.0]


# --- CRG --------------------------------------------------------------------------------------------------------


def crg(truth, found):
    return clinical.crg_metric(np.array(truth), np.array(found)).value()


def test_crg_by_hand():
    """X = 10 cells, A = 4: r = 6/8, U = 3. 3 hits, 1 missed, 2 false: s = 9/4 - 3/4 - 2 = -1/2, CRG = 3 / (6 + 1/2)."""
    truth = [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    found = [[1, 1, 1, 0, 1], [0, 0, 0, 1, 0]]
    assert crg(truth, found) == pytest.approx(float(Fraction(3) / (6 + Fraction(1, 2))))


def test_crg_of_trivial_and_perfect_answers():
    truth = np.random.default_rng(0).random((50, 18)) < 0.2
    assert crg(truth, truth) == pytest.approx(1)
    assert crg(truth, np.zeros_like(truth)) == pytest.approx(1 / 3)
    assert crg(truth, np.ones_like(truth)) == pytest.approx(1 / 3)
    assert crg(truth, ~truth) == pytest.approx(1 / 5)  # s = -U - 2U: everything missed and everything invented


@pytest.mark.parametrize("cells", [0, 1])
def test_crg_is_undefined_without_positives_or_without_negatives(cells):
    truth = np.full((3, 4), cells)
    assert crg(truth, truth) is None
    assert crg(truth, 1 - truth) is None


def test_one_invented_finding_costs_less_where_findings_are_rare():
    """The weight of a finding is (X - A) / 2A of a false one."""
    rare, common = np.zeros((10, 10), int), np.zeros((10, 10), int)
    rare[0, :4], common[:5] = 1, 1
    losses = []
    for truth in (rare, common):
        found = truth.copy()
        found[9, 9] = 1
        losses.append(1 - crg(truth, found))
    assert 0 < losses[0] < losses[1]


# --- sides and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "report, sizes",
    [
        ("A 4.5 mm nodule.", {4.5: 1}),
        ("a mass of 4 x 5.5 cm", {40: 1, 55: 1}),
        ("3x4x5 mm and 2cm", {3: 1, 4: 1, 5: 1, 20: 1}),
        ("nodules of 5 mm, 5 mm", {5: 2}),
        ("between 4 and 6 mm; 7-8 mm", {4: 1, 6: 1, 7: 1, 8: 1}),
        ("3,5 mm", {3.5: 1}),
        ("12-mm nodule, 1 centimeter, 2 millimetric nodules", {12: 1, 10: 1, 2: 1}),
        (".5 cm, 0.5cm", {5: 2}),
        ("5 to 10 mm, 5- to 10-mm", {5: 2, 10: 2}),
        ("4 \u00d7 3 \u00d7 2.5 cm; 7\u20138 mm; 1,5x2 cm", {40: 1, 30: 1, 25: 1, 7: 1, 8: 1, 15: 1, 20: 1}),
        ("4, 6 and 9 mm nodules", {4: 1, 6: 1, 9: 1}),
        ("15mm x 10mm (previously 12 x 8 mm)", {15: 1, 10: 1, 12: 1, 8: 1}),
        ("since 2019 and 6 mm, in 2015 - 5 mm, dated 12.05.2020 4 mm, 2021 mm", {6: 1, 5: 1, 4: 1}),
        ("image 112 and 6 mm, segment 4 - 5 mm", {6: 1, 5: 1}),
        ("35 mmHg, 5 cm3, 4 cm\u00b2, 400 cc, 3 cmH2O", {}),
        ("dated 26.02.2015, T12, 40 HU, series 3", {}),
        ("", {}),
    ],
)
def test_sizes(report, sizes):
    assert read_sizes(report) == Counter(sizes)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["1" * 20_000, "1 " * 25_000, "5 to " * 10_000, "1x" * 25_000, "1" + " " * 50_000 + "mm"]
)
def test_sizes_of_any_text_are_read_in_the_end(text):
    """Linear in the text's length; 20,000 digits took more than a minute by an expression that backtracks."""
    assert read_sizes(text) == Counter()
    assert change_sizes(text) == text


def test_sides_and_sizes_by_hand():
    reference = "Consolidation in the left lower lobe. Pleural effusion on the right, 14 mm and 8 mm."
    prediction = "Consolidation in the right lower lobe. Pleural effusion on the right, 14 mm."
    assert clinical.side_counts([prediction], [reference]).tolist() == [[1, 1, 1]]
    assert clinical.size_counts([prediction], [reference]).tolist() == [[1, 0, 1]]
    scores = clinical.score_findings([prediction], [reference])
    assert scores["sides"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert scores["sizes"] == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert scores["effusion_side"] == {"count": 1, "accuracy": 1}


def test_finding_samples_hold_every_figure_of_the_table():
    references = ["Emphysema is observed. A 5 mm nodule in the right lung.", "Normal.", "Consolidation."]
    predictions = ["Emphysema is observed.", "Consolidation.", ""]
    samples = clinical.finding_samples(predictions, references)
    table = clinical.score_findings(predictions, references)
    assert samples["crg"].value() == table["crg"]
    for group in ("macro", "micro", "sides", "sizes"):
        for name in clinical.PRECISION_RECALL_F1:
            assert samples[f"{group}.{name}"].value() == table[group][name]
    for label in CT_RATE_LABELS:
        assert samples[f"per_finding.{label}.recall"].value() == table["per_finding"][label]["recall"]


def test_chance_is_the_mean_of_many_guesses():
    rng = np.random.default_rng(0)
    references = ["Emphysema. Consolidation.", "Emphysema.", "Normal.", "A nodule in the lung."] * 25
    names = ["Emphysema", "Consolidation", "Lung nodule"]
    columns = [CT_RATE_LABELS.index(name) for name in names]
    truth = label_reports(references)[:, columns]
    hits = [(truth & (rng.random(truth.shape) < truth.mean(axis=0))).sum() for _ in range(500)]
    expected = clinical.chance_findings(references, names, label_reports)
    assert expected["micro"]["recall"] == pytest.approx(np.mean(hits) / truth.sum(), abs=0.01)
    assert expected["macro"]["f1"] == pytest.approx(truth.mean(axis=0).mean())
    assert 1 / 3 < expected["crg"] < 0.5


# --- RadBERT ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny RoBERTa's configuration and a word tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("radbert")
    words = ["<s>", "<pad>", "</s>", "<unk>", "nodule", "effusion", "no", "heart"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    RobertaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        pad_token_id=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(backbone, tmp_path):
    """A checkpoint as CT-RATE's: the classifier's weights, and the stale key that old transformers versions saved."""
    torch.manual_seed(0)
    model = radbert.RadBertClassifier(AutoConfig.from_pretrained(backbone))
    with torch.no_grad():
        model.classifier.weight.normal_(std=2)
    weights = {**model.state_dict(), "model.embeddings.position_ids": torch.arange(514)[None]}
    path = tmp_path / "RadBertClassifier.pth"
    torch.save(weights, path)
    return path, model.eval()


def test_radbert_labels_are_the_classifiers(checkpoint, backbone):
    path, model = checkpoint
    labeller = radbert.RadBertLabeller(path, backbone=str(backbone), batch_size=2)
    reports = ["nodule no effusion", "heart", "", "no no no nodule " * 400]
    found = labeller(reports)
    assert found.shape == (4, 18) and found[2].sum() == 0 and set(np.unique(found)) <= {0, 1}
    ids = torch.tensor([[4, 6, 5]])
    expected = model(ids, torch.ones_like(ids)).sigmoid()[0] > 0.5
    assert found[0].tolist() == expected.int().tolist() and 0 < found[0].sum() < 18
    # Padding to a longer neighbour changes nothing.
    np.testing.assert_allclose(labeller.probabilities(reports[:1])[0], labeller.probabilities(reports)[0], atol=1e-5)
    assert labeller([]).shape == (0, 18)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("classifier.bias"), 'Missing key.*"classifier.bias"'),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), 'Unexpected key.*"model.extra"'),
        (lambda w: w.update({"classifier.weight": torch.zeros(5, 16)}), "size mismatch for classifier.weight"),
    ],
)
def test_only_the_stale_key_may_be_too_many(checkpoint, backbone, tmp_path, change, message):
    weights = torch.load(checkpoint[0])
    change(weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"(?s)other.pth: not the weights of CT-RATE's RadBertClassifier.*{message}"):
        radbert.RadBertLabeller(tmp_path / "other.pth", backbone=str(backbone))


def test_radbert_is_found_by_hub_id(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(radbert, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(checkpoint[0]))
    assert radbert.find_radbert("ibrahimhamamci/CT-RATE") == checkpoint[0]
    assert asked == [(("ibrahimhamamci/CT-RATE", "models/RadBertClassifier.pth"), {"repo_type": "dataset"})]
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file; expected RadBertClassifier.pth"):
        radbert.find_radbert("folder/nowhere.pth")


def test_labeller_by_name(monkeypatch):
    made = []
    monkeypatch.setattr(radbert, "RadBertLabeller", lambda name, **options: made.append((name, options)))
    assert clinical.make_labeller("rules") is rule_labels
    clinical.make_labeller("radbert", device="cpu")
    clinical.make_labeller("x.pth")
    assert made == [("ibrahimhamamci/CT-RATE", {"device": "cpu"}), ("x.pth", {"device": None})]


def test_another_labeller_changes_labels_alone():
    everything = lambda reports: np.ones((len(reports), 18), dtype=np.int64)  # noqa: E731
    scores = clinical.score_findings(["Left effusion."], ["Right pleural effusion."], labeller=everything)
    assert scores["macro"]["f1"] == 1 and scores["macro_findings"] == 18 and scores["crg"] is None
    assert scores["sides"]["f1"] == 0


# --- RadEval ----------------------------------------------------------------------------------------------------


@pytest.fixture
def radeval(monkeypatch):
    """A stand-in with the library's interface, which fails on empty texts as its models do."""
    calls = []

    class RadEval:
        def __init__(self, metrics, per_sample, show_progress):
            assert per_sample and not show_progress
            self.keys = [key for name in metrics for key in clinical.RADEVAL_METRICS[name]]

        def __call__(self, refs, hyps):
            assert all(text.strip() for text in refs + hyps)
            calls.append((refs, hyps))
            return {key: [len(hyp) / 10 for hyp in hyps] for key in self.keys}

    module = types.ModuleType("radeval")
    module.RadEval = RadEval
    monkeypatch.setitem(sys.modules, "radeval", module)
    return calls


def test_radeval_by_sample(radeval):
    samples = clinical.radeval_samples(["abc", "", "abcde"], ["x", "y", "z"], ["radgraph", "green"])
    assert set(samples) == {"radgraph_simple", "radgraph_partial", "radgraph_complete", "green"}
    assert samples["green"].samples[:, 0].tolist() == [0.3, 0, 0.5]
    assert samples["green"].value() == pytest.approx(0.8 / 3)
    assert radeval == [(["x", "z"], ["abc", "abcde"])]


def test_radeval_errors(monkeypatch):
    with pytest.raises(ValueError, match="radeval names \\['bleu'\\]; expected some of radgraph, ratescore, green"):
        clinical.radeval_samples(["a"], ["b"], ["bleu"])
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(ImportError, match="pip install radeval"):
        clinical.radeval_samples(["a"], ["b"], ["green"])
