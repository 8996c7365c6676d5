"""The report pipeline: what it returns is what the model's own methods give, for scans in every form."""

import json

import nibabel
import numpy as np
import pytest
import torch
from tiny import model_for, tiny_processor

from samf import read_ct
from samf.model.ct_volume import CTReadError
from samf.model.pipeline_samf import REPORT_QUESTION, Failure, SamfReportPipeline
from samf.model.report_samf import Report, Sentence, split_sentences

QUESTIONS = ["Which finding is present?", "Is the heart enlarged?"]
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


@pytest.fixture(scope="module")
def reporter():
    processor = tiny_processor()
    model = model_for(processor, finding_names=["Emphysema", "Lung nodule"])
    return SamfReportPipeline(model=model, processor=processor)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two files of other shapes and contents."""
    folder, paths = tmp_path_factory.mktemp("scans"), []
    for seed, shape in enumerate([(20, 22, 16), (24, 18, 12)]):
        hu = np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)
        paths.append(str(folder / f"scan_{seed}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(hu, AFFINE), paths[-1])
    return paths


def by_hand(reporter, scan, question, **options):
    """The text and the log-probabilities of its tokens, by the processor and a forward pass over the whole sequence."""
    message = [{"type": "volume", "volume": scan}, {"type": "text", "text": question}]
    inputs = reporter.processor.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = {name: value for name, value in inputs.items() if name not in ("slice_indices", "slice_mm")}
    length = inputs["input_ids"].shape[1]
    tokens = reporter.model.generate(**inputs, **{"do_sample": False, **options})
    whole = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :length] = inputs["prompt_mask"]
    with torch.no_grad():
        output = reporter.model(**{**whole, "prompt_mask": mask})
    log_probs = output.logits[0, length - 1 : -1].log_softmax(-1)
    chosen = log_probs.gather(1, tokens[0, length:, None])[:, 0]
    text = reporter.processor.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
    return text, chosen, output.finding_logits[0].sigmoid()


def test_a_report_is_what_the_model_says_of_the_file(reporter, scans):
    report = reporter(scans[0], max_new_tokens=12)
    text, log_probs, findings = by_hand(reporter, scans[0], REPORT_QUESTION, max_new_tokens=12)
    assert report.text == text.strip() and report.question == REPORT_QUESTION and report.truncated
    assert [*report.findings] == ["Emphysema", "Lung nodule"]
    np.testing.assert_allclose([*report.findings.values()], findings.detach().numpy(), atol=1e-5)
    assert sum(sentence.tokens for sentence in report.sentences) == 12
    total = sum(sentence.log_probability for sentence in report.sentences)
    assert total == pytest.approx(log_probs.sum().item(), abs=1e-3)
    made = report.provenance
    assert made.source == scans[0] and made.shape == (20, 22, 16) and made.spacing == (2.0, 2.0, 3.0)
    assert made.orientation == "LPS" and made.generation == {"max_new_tokens": 12}
    assert made.slice_settings == reporter.processor.image_processor.settings_hash()


def test_beams_have_the_log_probabilities_of_the_sequence_that_is_returned(reporter, scans):
    report = reporter(scans[0], max_new_tokens=8, num_beams=3)
    _, log_probs, _ = by_hand(reporter, scans[0], REPORT_QUESTION, max_new_tokens=8, num_beams=3)
    assert sum(sentence.log_probability for sentence in report.sentences) == pytest.approx(
        log_probs.sum().item(), abs=1e-3
    )
    with pytest.raises(ValueError, match="num_return_sequences"):
        reporter(scans[0], num_beams=2, num_return_sequences=2)


def test_sampled_tokens_have_the_probabilities_of_the_model_at_temperature_1(reporter, scans):
    """Not those of the distribution that they are drawn from, which other settings would make another scale."""
    options = {"do_sample": True, "temperature": 0.3, "top_k": 20, "repetition_penalty": 1.3, "max_new_tokens": 10}
    torch.manual_seed(5)
    report = reporter(scans[0], **options)
    torch.manual_seed(5)
    text, log_probs, _ = by_hand(reporter, scans[0], REPORT_QUESTION, **options)
    assert report.text == text.strip()
    total = sum(sentence.log_probability for sentence in report.sentences)
    assert total == pytest.approx(log_probs.sum().item(), abs=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_of_a_batch_have_the_log_probabilities_of_single_calls(reporter, scans, beams):
    """Prompts of different lengths are padded, and answers of different lengths end in padding."""
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False}
    together = reporter(scans, question=QUESTIONS, batch_size=4, **options)
    for scan, answers in zip(scans, together, strict=True):
        for question, answer in zip(QUESTIONS, answers, strict=True):
            alone = reporter(scan, question=question, **options)
            assert answer.text == alone.text
            for one, other in zip(answer.sentences, alone.sentences, strict=True):
                assert one.tokens == other.tokens
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


def test_the_calibration_of_the_model_is_that_of_its_reports(reporter, scans, monkeypatch):
    raw = np.array([*reporter(scans[0], max_new_tokens=2).findings.values()])
    monkeypatch.setattr(reporter.model.config, "finding_temperature", [2.0, 0.5])
    scaled = np.array([*reporter(scans[0], max_new_tokens=2).findings.values()])
    logits = np.log(raw / (1 - raw))
    np.testing.assert_allclose(scaled, 1 / (1 + np.exp(-logits / [2.0, 0.5])), rtol=1e-4)
    np.testing.assert_allclose(reporter.finding_logits(reporter.encode(scans[0])), logits, atol=1e-4)


def test_without_an_end_token_an_answer_ends_at_its_limit(reporter, scans, monkeypatch):
    monkeypatch.setattr(reporter.model.generation_config, "eos_token_id", None)
    report = reporter(scans[0], max_new_tokens=5)
    assert report.truncated and sum(sentence.tokens for sentence in report.sentences) <= 5


def test_questions_share_one_encoding_and_get_the_answers_of_single_calls(reporter, scans, monkeypatch):
    calls = []
    encode = reporter.model.model.encode_slices
    monkeypatch.setattr(reporter.model.model, "encode_slices", lambda *a, **k: calls.append(1) or encode(*a, **k))
    several = reporter(scans, question=QUESTIONS, batch_size=3, max_new_tokens=8)
    assert len(calls) == 2, "each scan is encoded once"
    for scan, answers in zip(scans, several, strict=True):
        for question, answer in zip(QUESTIONS, answers, strict=True):
            assert answer.question == question
            assert answer.text == by_hand(reporter, scan, question, max_new_tokens=8)[0].strip()


def test_scans_in_memory_are_read_as_their_files(reporter, scans):
    expected = reporter(scans[0], max_new_tokens=8).text
    for scan in (read_ct(scans[0]), nibabel.load(scans[0]), reporter.encode(scans[0])):
        assert reporter(scan, max_new_tokens=8).text == expected


def test_a_bad_file_of_a_list_costs_no_other_report(reporter, scans, tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no scan")
    first, failed, last = reporter([scans[0], str(broken), scans[1]], max_new_tokens=4)
    assert isinstance(first, Report) and isinstance(last, Report)
    assert isinstance(failed, Failure) and failed.source == str(broken) and "broken.nii.gz" in failed.error
    with pytest.raises(CTReadError, match="broken.nii.gz"):
        reporter(str(broken))
    with pytest.raises(ValueError, match="empty list"):
        reporter(scans[0], question=[])


def test_a_stream_ends_in_the_same_text_and_stops_when_it_is_closed(reporter, scans):
    pieces = list(reporter.stream(scans[0], max_new_tokens=12))
    assert "".join(pieces).strip() == reporter(scans[0], max_new_tokens=12).text and len(pieces) > 1
    stream = reporter.stream(scans[0], max_new_tokens=400)
    next(stream)
    stream.close()  # joins the thread
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(reporter.stream(scans[0], max_new_tokens=0))


def test_a_report_survives_its_json(reporter, scans, tmp_path):
    report = reporter(scans[0], max_new_tokens=8)
    assert Report.from_json(report.to_json()) == report
    text, as_json = report.save(tmp_path, "a")
    assert "not for diagnosis" in text.read_text(encoding="utf-8") and report.text in text.read_text(encoding="utf-8")
    assert Report.from_json(as_json.read_text(encoding="utf-8")) == report
    with pytest.raises(ValueError, match="schema version 99"):
        Report.from_dict({**json.loads(report.to_json()), "schema_version": 99})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart size is normal. No effusion.", ["Heart size is normal.", "No effusion."]),
        ("A nodule of 1.5 cm is seen. It is new.", ["A nodule of 1.5 cm is seen.", "It is new."]),
        ("Lung window; no nodule", ["Lung window;", "no nodule"]),
        (
            "Findings:\nNo effusion\n\nImpression: 1. Emphysema.",
            ["Findings:", "No effusion", "Impression: 1. Emphysema."],
        ),
        ("Bronchi, e.g. the right one, are open.", ["Bronchi, e.g. the right one, are open."]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert [text[start:end] for start, end in split_sentences(text)] == expected


def test_warnings_of_the_reader_are_kept(reporter, tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 400, (12, 12, 12)).astype(np.int16)
    image = nibabel.Nifti1Image(hu, np.diag([2000.0, 2000.0, 2000.0, 1.0]))
    nibabel.save(image, tmp_path / "unit.nii.gz")
    report = reporter(str(tmp_path / "unit.nii.gz"), max_new_tokens=2)
    assert any("mm" in warning for warning in report.warnings)
    assert isinstance(report.sentences[0], Sentence) if report.sentences else report.text == ""
