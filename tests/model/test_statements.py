"""Findings by the likelihood of statements: against a direct forward pass over prompt and statement."""

import nibabel
import numpy as np
import pytest
import torch
from tiny import model_for, tiny_processor

from samf.model import statements_samf
from samf.model.findings_samf import text_before_findings
from samf.model.pipeline_samf import REPORT_QUESTION, SamfReportPipeline
from samf.model.statements_samf import log_likelihoods

STATEMENTS = {
    "Lung nodule": ["A nodule is seen.", ["Nodule was not observed.", "No nodule", "n"]],
    "Cardiomegaly": ["The heart is enlarged.", "Heart size is normal."],
}


@pytest.fixture(scope="module", params=["samf", "ao2d", "slice_tokens"])
def reporter(request):
    processor = tiny_processor(None if request.param == "slice_tokens" else 4)
    return SamfReportPipeline(model=model_for(processor, fusion_type=request.param), processor=processor)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    hu = np.random.default_rng(0).integers(-1000, 400, (20, 22, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([-2.0, -2.0, 3.0, 1.0])), path)
    return str(path)


def direct(reporter, scan, answer: str) -> float:
    """log p(answer | scan, prompt) by one forward pass from the pixels, with the answer in the conversation."""
    message = [{"type": "volume", "volume": scan}, {"type": "text", "text": REPORT_QUESTION}]
    inputs = reporter.processor.apply_chat_template(
        [{"role": "user", "content": message}, {"role": "assistant", "content": answer}],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    marked = torch.as_tensor(inputs.pop("assistant_masks"))[0].nonzero()[:, 0]
    inputs = {name: value for name, value in inputs.items() if name not in ("slice_indices", "slice_mm")}
    with torch.no_grad():
        log_probs = reporter.model(**inputs).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, inputs["input_ids"][0, place]]) for place in marked[:-1])  # not the end token


def expected_ratio(reporter, scan, pair, before="") -> float:
    totals = []
    for side in pair:
        texts = [side] if isinstance(side, str) else side
        totals.append(np.logaddexp.reduce([direct(reporter, scan, f"{before}{text}") for text in texts]))
    return totals[0] - totals[1]


def test_the_ratio_is_that_of_direct_forward_passes(reporter, scan):
    found = reporter.finding_likelihoods(scan, STATEMENTS, after={})
    assert list(found) == list(STATEMENTS)
    for name, value in found.items():
        ratio = expected_ratio(reporter, scan, STATEMENTS[name])
        assert value == pytest.approx(1 / (1 + np.exp(-ratio)), rel=1e-3, abs=1e-6)


def test_what_the_answer_said_before_counts(reporter, scan):
    before = {"Cardiomegaly": "Pericardial effusion was not observed."}
    found = reporter.finding_likelihoods(scan, STATEMENTS, after=before)
    ratio = expected_ratio(reporter, scan, STATEMENTS["Cardiomegaly"], f"{before['Cardiomegaly']} ")
    assert found["Cardiomegaly"] == pytest.approx(1 / (1 + np.exp(-ratio)), rel=1e-3, abs=1e-6)
    assert found["Lung nodule"] == pytest.approx(
        reporter.finding_likelihoods(scan, STATEMENTS, after={})["Lung nodule"], rel=1e-4
    )


def test_the_encoder_and_the_prompt_run_once(reporter, scan, monkeypatch):
    encoded, lengths = [], []
    encode, forward = reporter.model.model.encode_slices, reporter.model.forward
    monkeypatch.setattr(reporter.model.model, "encode_slices", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    monkeypatch.setattr(
        reporter.model, "forward", lambda *a, **k: lengths.append(k.get("input_ids")) or forward(*a, **k)
    )
    reporter.finding_likelihoods(scan, STATEMENTS, after={})
    read = [ids.shape for ids in lengths if ids is not None]
    prompts = [shape for shape in read if shape[0] == 1]
    assert len(encoded) == 1 and len(prompts) == 1 and len(read) == 2
    assert read[1][0] == 6 and read[1][1] < prompts[0][1]


def test_batches_and_rereading_change_nothing(reporter, scan, monkeypatch):
    volume = reporter.encode(scan).features
    prompt, rows = statements_samf._encode(
        reporter.processor, volume, REPORT_QUESTION, ["A nodule is seen.", "no", "Heart"]
    )
    together = log_likelihoods(reporter.model, prompt, rows)
    assert together == pytest.approx(log_likelihoods(reporter.model, prompt, rows, batch_size=1), abs=1e-3)
    monkeypatch.setattr(statements_samf, "rope_sets", lambda config, length: [length])
    assert together == pytest.approx(log_likelihoods(reporter.model, prompt, rows), abs=1e-3)


def test_statements_stand_where_the_report_mentions_their_finding():
    text = (
        "No cardiomegaly was detected. A nodule is seen in the left lung.\nNo nodule on the right. Bones are natural."
    )
    names = ["Lung nodule", "Cardiomegaly", "Emphysema", "Rib fracture"]
    assert text_before_findings(text, names) == {
        "Lung nodule": "No cardiomegaly was detected.",
        "Cardiomegaly": "",
        "Emphysema": text,
        "Rib fracture": text,
    }


def test_a_model_without_a_head_reports_findings_by_its_statements(reporter, scan, monkeypatch):
    options = {"max_new_tokens": 4}
    assert reporter(scan, **options).findings == {}
    monkeypatch.setattr(reporter.model.config, "finding_statements", STATEMENTS)
    monkeypatch.setattr(reporter.model.generation_config, "max_new_tokens", 4)
    report = reporter(scan, **options)
    ratios = {
        name: expected_ratio(reporter, scan, pair, f"{before} " if (before := after[name]) else "")
        for after in [text_before_findings(report.text, STATEMENTS)]
        for name, pair in STATEMENTS.items()
    }
    expected = {name: 1 / (1 + np.exp(-ratio)) for name, ratio in ratios.items()}
    assert report.findings == pytest.approx(expected, rel=1e-3)
    assert reporter.finding_likelihoods(scan, STATEMENTS) == pytest.approx(expected, rel=1e-3)
    assert reporter.finding_logits(reporter.encode(scan)) == pytest.approx(list(ratios.values()), abs=1e-3)
    monkeypatch.setattr(reporter.model.config, "finding_temperature", [2.0, 2.0])
    scaled = reporter(scan, **options).findings
    assert scaled == pytest.approx({name: 1 / (1 + np.exp(-ratio / 2)) for name, ratio in ratios.items()}, rel=1e-3)
    assert reporter(scan, question="Is the heart enlarged?", **options).findings == {}, "only reports have places"
