"""Evidence: likelihoods, gradients and heat against the same quantities computed another way."""

import dataclasses
import itertools
import json

import nibabel
import numpy as np
import pytest
import torch
from tiny import FUSION_TYPES, model_for, tiny_processor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from samf import SamfForConditionalGeneration, SamfProcessor, read_ct
from samf.model.explain_samf import EvidenceOptions, Explainer
from samf.model.pipeline_samf import SamfReportPipeline
from samf.model.quantization_samf import SamfQuantizationConfig
from samf.model.report_samf import REPORT_QUESTION, Report
from samf.model.sentence_likelihood_samf import SentenceLikelihood, tokenize_answer
from samf.model.slice_occlusion_samf import occlude_slices
from samf.model.window_occlusion_samf import FILLS, filled, heat_of, selected, window_losses, windows_of
from samf.phantoms.single import write_phantom
from samf.utils.packaged import DEMO_MODEL

ANSWER = "Heart size is normal. A consolidation is seen in the right lower lobe."
SLICES = 9


def features_of(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "slice_embeddings": rng.standard_normal((SLICES, 32)).astype(dtype),
        "slice_planes": np.repeat([0, 1, 2], 3),
        "slice_positions": np.tile([0.2, 0.5, 0.8], 3).astype(np.float32),
    }


def parts(fusion_type):
    processor = tiny_processor(num_image_tokens=None if fusion_type == "slice_tokens" else 4)
    return processor, model_for(processor, **({} if fusion_type == "slice_tokens" else {"fusion_type": fusion_type}))


def directly(model, processor, features, keep):
    """Log-likelihood of each sentence by a forward pass over a volume that has only the kept slices."""
    subset = {name: value[keep] for name, value in features.items()}
    user = [{"type": "volume", "volume": subset}, {"type": "text", "text": REPORT_QUESTION}]
    conversation = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(conversation, return_assistant_tokens_mask=True, **options)
    ids, mask = inputs["input_ids"][0], torch.as_tensor(inputs.pop("assistant_masks"))[0].bool()
    unread = [*processor.unused_input_names]
    if not keep.any():  # the prompt without the placeholders, and no volume at all
        stay = ids != processor.image_token_id
        ids, mask = ids[stay], mask[stay]
        inputs = {"input_ids": ids[None]}
    with torch.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if name not in unread}).logits[0]
    log_probs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    sums, sentence = [0.0, 0.0], 0
    for place in mask.nonzero()[:, 0].tolist():
        word = processor.tokenizer.decode([int(ids[place])], skip_special_tokens=True)
        sums[sentence] += float(log_probs[place - 1]) if word else 0.0  # the end token belongs to no sentence
        sentence += word.strip() == "." and sentence == 0
    return sums


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_the_likelihood_without_slices_is_that_of_a_volume_that_never_had_them(fusion_type):
    (processor, model), features = parts(fusion_type), features_of()
    answer = tokenize_answer(processor, features, ANSWER)
    assert [answer.text[slice(*span)] for span in answer.spans] == ANSWER.replace(". ", ".|").split("|")
    keep = torch.ones(4, SLICES, dtype=torch.bool)
    keep[1, 2:5] = False
    keep[2, [0, 8]] = False
    keep[3] = False
    likelihood = SentenceLikelihood(model, answer, features, batch_size=3)
    found = likelihood(torch.from_numpy(features["slice_embeddings"]), keep)
    expected = [directly(model, processor, features, row.numpy()) for row in keep]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    assert (found[0] - found[1]).abs().max() > 0.01, "the slices matter"


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_gradients_are_directional_derivatives(fusion_type, monkeypatch):
    """Finite differences in float64; the weights' own gradients stay untouched."""

    def norm(self, x):  # Phi-3's own is in float32, too coarse for differences
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Phi3RMSNorm, "forward", norm)
    (processor, model), features = parts(fusion_type), features_of(dtype=np.float64)
    model = model.double()
    likelihood = SentenceLikelihood(model, tokenize_answer(processor, features, ANSWER), features)
    slices = torch.from_numpy(features["slice_embeddings"])
    gradients = likelihood.gradients(slices, slices, steps=1)
    assert gradients.shape == (2, SLICES, 32) and all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    keep = torch.ones(1, SLICES, dtype=torch.bool)
    direction = torch.randn(slices.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-4 * direction
    change = (likelihood(slices + step, keep) - likelihood(slices - step, keep))[0] / 2e-4
    np.testing.assert_allclose((gradients * direction).sum(dim=(1, 2)), change, rtol=0.01, atol=1e-4)
    whole, weights = likelihood.with_weights(slices)
    np.testing.assert_allclose(whole, likelihood(slices, keep)[0], atol=1e-8)
    mean = slices.mean(dim=0, keepdim=True).expand_as(slices)
    shares = (likelihood.gradients(slices, mean, steps=40) * (slices - mean)).sum(dim=(1, 2))
    np.testing.assert_allclose(shares, whole - likelihood(mean, keep)[0], rtol=0.02, atol=0.02)
    name = "slice_text" if fusion_type == "slice_tokens" else "alpha"
    np.testing.assert_allclose(weights[name].sum(-1), np.ones(weights[name].shape[:-1]), atol=1e-6)


def test_a_language_model_without_backward_pass_is_named(monkeypatch):
    (processor, model), features = parts("ao2d"), features_of()
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: forward(hidden.detach()))
    likelihood = SentenceLikelihood(model, tokenize_answer(processor, features, ANSWER), features)
    slices = torch.from_numpy(features["slice_embeddings"])
    with pytest.raises(ValueError, match="without quantisation"):
        likelihood.gradients(slices, slices, steps=1)


@pytest.mark.parametrize("decisive", [0, 4, 11, 17, 26])
def test_occlusion_finds_the_slice_on_which_a_sentence_depends(decisive):
    """Sentence 0 needs one slice; sentence 1 needs none; sentence 2 needs any one of two, in two planes."""
    planes = torch.arange(27) // 9
    other = (decisive + 9) % 27

    def likelihood(slices, keep):
        value = slices[:, 0]
        first = torch.where(keep[:, decisive], value[decisive], -5.0)
        third = torch.where(keep[:, decisive] | keep[:, other], 0.0, -3.0)
        return torch.stack([first, torch.full_like(first, -1.0), third], dim=1)

    found = occlude_slices(likelihood, torch.full((27, 2), 2.0), planes)
    assert int(found.scores[0].argmax()) == decisive and found.scores[0, decisive] == 7
    assert found.scores[0].sum() == 7 and not found.scores[1].any()
    assert not found.scores[2].any(), "what two planes show, neither alone is needed for"
    assert found.whole.tolist() == [2, -1, 0] and found.without.tolist() == [-5, -1, -3]
    assert found.rows < 27, "fewer passes than slices"


def test_occlusion_shares_the_loss_of_a_block_and_counts_each_slice_once():
    """A log-likelihood that adds over slices: every block's loss is its slices' sum, whatever was divided."""
    generator = torch.Generator().manual_seed(0)
    values, planes = torch.rand(20, generator=generator), torch.tensor([0] * 13 + [2] * 7)
    for blocks, refined in ((1, 1), (3, 1), (3, 2), (4, 20)):
        added = occlude_slices(
            lambda slices, keep: (keep * values).sum(1, keepdim=True), torch.zeros(20, 1), planes, blocks, refined
        )
        assert added.scores.sum() == pytest.approx(float(values.sum()), abs=1e-5)
    np.testing.assert_allclose(added.scores[0], values, atol=1e-5)  # all blocks were divided


def test_windows_cover_a_slice_and_empty_only_themselves():
    spans = windows_of(224, 7)
    assert spans[0] == (0, 56) and spans[-1] == (168, 224) and all(stop - start == 56 for start, stop in spans)
    assert all(later[0] == (earlier[0] + earlier[1]) / 2 for earlier, later in itertools.pairwise(spans))
    image = torch.randint(5, 256, (2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[0, 3, 3], image[1, 9, 1] = 1, 2
    dark, even = filled(image, (4, 12), (8, 16))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 8:16] = True
    for copy in (dark, even):
        assert torch.equal(copy[:, ~inside], image[:, ~inside]) and copy.dtype == torch.uint8
    assert dark[0, inside].unique().tolist() == [1] and dark[1, inside].unique().tolist() == [2]
    assert even[0, inside].unique().tolist() == [round(float(image[0, inside].float().mean()))]


def test_losses_of_a_linear_encoder_are_exact():
    """An encoder that sums a block's pixels, and a likelihood linear in it: first order is exact."""
    weight = torch.zeros(16, 16)
    weight[4:8, 8:12] = 1.0

    def encode(images):
        return ((images.float() * weight).sum(dim=(1, 2, 3)))[:, None]

    image = torch.full((1, 16, 16), 10, dtype=torch.uint8)
    image[:, 0, 0] = 0
    image[:, 4:8, 8:12] = 50
    gradients = torch.tensor([[1.0], [-2.0]])
    losses = window_losses(encode, image, encode(image[None])[0], gradients, 3)
    assert losses.shape == (FILLS, 2, 3, 3)
    covered = np.zeros((3, 3))
    covered[:2, 1:] = 1  # the windows of 8 x 8 that hold the block
    np.testing.assert_allclose(losses[0, 0], 16 * 50 * covered)
    np.testing.assert_allclose(losses[1, 0], 16 * 30 * covered)  # the mean of a window: (16 · 50 + 48 · 10) / 64
    np.testing.assert_allclose(losses[:, 1], -2 * losses[:, 0])
    heat = heat_of(np.stack([losses[:, 0], 0 * losses[:, 0]], axis=1))
    assert heat.shape == (2, 4, 4) and not heat[1].any()
    assert heat[0, 1, 2] == heat[0].max() > 0 and heat[0, 3, 0] == 0
    assert heat[0, 2, 2] == pytest.approx(heat[0, 1, 2] / 2), "half of the windows over that cell hold the block"
    assert not heat_of(losses[:, 1:2]).any(), "what speaks against a sentence has no heat"


def test_of_each_plane_the_slices_that_matter_most_to_any_sentence_are_searched():
    scores = np.array([[0.1, -9.0, 1.0, 0.2], [0.5, 0.1, 0.1, 0.0]])
    assert list(selected(scores, np.array([0, 0, 2, 2]), 1)) == [0, 2], "shares: 1.0 and 1.0, then 0.2"
    assert list(selected(scores, np.array([0, 0, 2, 2]), 2)) == [0, 1, 2, 3]


class BrightnessEncoder:
    """Slice embeddings that tell only how much a slice shows that is brighter than soft tissue."""

    def __init__(self, model):
        self.direction = torch.zeros(model.config.slice_dim)
        self.direction[3] = 1.0

    def __call__(self, pixel_values, **kwargs):
        bright = 20 * (pixel_values[:, :, 1] - 0.8).clamp(min=0).mean(dim=(-2, -1))  # (B, S), mediastinal window
        return BaseModelOutputWithPooling(last_hidden_state=bright[..., None] * self.direction)


@pytest.fixture(scope="module")
def spot(tmp_path_factory):
    """A scan of air with one bright block, and the block's centre in mm."""
    path = tmp_path_factory.mktemp("scan") / "spot.nii.gz"
    hu = np.full((40, 36, 30), -1000, dtype=np.int16)
    hu[26:30, 8:12, 20:23] = 300
    hu[:, :, :1] = 40  # a table, so that the values pass for HU
    affine = np.array([[-3.0, 0, 0, 60], [0, -3, 0, 40], [0, 0, 4, -50], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(hu, affine), path)
    return str(path), affine[:3, :3] @ (27.5, 9.5, 21) + affine[:3, 3]


def reporter_of(fusion_type="ao2d", slices_per_plane=10):
    processor = tiny_processor(
        num_image_tokens=None if fusion_type == "slice_tokens" else 4, slices_per_plane=slices_per_plane, slab="mip"
    )
    options = {} if fusion_type == "slice_tokens" else {"fusion_type": fusion_type}
    model = model_for(processor, slice_position_scope="none", **options)
    return SamfReportPipeline(model=model, processor=processor)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_the_place_of_a_sentence_that_needs_a_block_is_the_block(fusion_type, spot, monkeypatch):
    """Sentence 0 is the likelier the more a slice shows, sentence 1 the less: it has no place."""
    path, true_mm = spot
    reporter = reporter_of(fusion_type)
    encoder = BrightnessEncoder(reporter.model)
    monkeypatch.setattr(reporter.model.model, "encode_slices", encoder)
    own = SentenceLikelihood.gradients

    def gradients(self, slices, start, steps):
        found = own(self, slices, start, steps)
        return torch.stack([encoder.direction, -encoder.direction])[:, None].expand_as(found)

    monkeypatch.setattr(SentenceLikelihood, "gradients", gradients)
    scan = reporter.encode(path, keep_images=True)
    found = Explainer(reporter.model, reporter.processor, EvidenceOptions(mode="fast")).explain(
        scan.images, scan.features, ANSWER, REPORT_QUESTION
    )
    first, second = found.sentences
    assert np.abs(np.array(first.peak.ras_mm) - true_mm).max() < 9
    assert first.peak.lps_mm == (-first.peak.ras_mm[0], -first.peak.ras_mm[1], first.peak.ras_mm[2])
    assert read_ct(path).hu[first.peak.voxel] == np.asarray(nibabel.load(path).dataobj)[first.peak.stored_voxel]
    assert second.peak is None and not second.heat.any() and second.top_slices[0].place is None
    for shown in first.top_slices[:3]:
        axis = {"sagittal": 0, "coronal": 1, "axial": 2}[shown.plane]
        assert abs(shown.mm - true_mm[axis]) < 12 and np.abs(np.array(shown.place.ras_mm) - true_mm).max() < 16
    planes = scan.features["slice_planes"]
    assert sorted(planes[first.slice_heat.numbers]) == [0, 1, 2]
    np.testing.assert_allclose(np.sum(first.slice_scores), -np.sum(second.slice_scores))


@pytest.fixture(scope="module")
def explained(spot):
    reporter = reporter_of("slice_tokens", slices_per_plane=3)
    report = reporter(spot[0], evidence=True, max_new_tokens=10)
    assert report.evidence is not None
    return reporter, report


def test_each_sentence_has_its_evidence(explained):
    reporter, report = explained
    assert len(report.evidence.sentences) == len(report.sentences) >= 1
    for sentence in report.evidence.sentences:
        assert len(sentence.slice_scores) == 9 and len(sentence.top_slices) == 6
        best = [found.score for found in sentence.top_slices]
        assert best == sorted(best, reverse=True) and best[0] == max(sentence.slice_scores)
        assert (
            sentence.heat.shape == report.evidence.grid_shape and 0 <= sentence.heat.min() <= sentence.heat.max() <= 1
        )
    assert len(report.evidence.fusion_weights["slice_text"]) > 3
    assert [said.text for said in report.sentences] == [found.text for found in report.evidence.sentences]
    with pytest.raises(ValueError, match="keep_images"):
        reporter.explain(report, reporter.encode(np.zeros((8, 8, 8), np.int16)))
    with pytest.raises(ValueError, match="one of full, fast"):
        Explainer(reporter.model, reporter.processor, EvidenceOptions(mode="quick"))


class _GoneError(Exception):
    pass


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_a_search_ends_at_the_pass_at_which_its_caller_has_gone(mode, spot, explained):
    reporter, report = explained
    scan, passes, weight = reporter.encode(spot[0], keep_images=True), [], next(reporter.model.parameters())
    reporter.explain(report, scan, mode, lambda: passes.append(None))
    for last in (
        1,
        len(passes) // 2,
        len(passes),
    ):  # in the language model's passes, forward and backward; in the encoder's
        seen = []

        def leave(seen=seen, last=last):
            seen.append(None)
            if len(seen) == last:
                raise _GoneError

        with pytest.raises(_GoneError):
            reporter.explain(report, scan, mode, leave)
        assert len(seen) == last and weight.requires_grad
    assert len(passes) > 4 * (1 + len(report.sentences))  # each of the path's steps, and more


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-3), (4, 0.1)])
def test_generation_and_evidence_agree_on_a_sentences_tokens(bits, tolerance, tmp_path):
    """The likelihood of the tokens as they were written is that of a forward pass; also with quantised weights."""
    write_phantom(tmp_path / "phantom.nii.gz", 1, ["Lung nodule"])
    options = {} if bits is None else {"quantization_config": SamfQuantizationConfig(bits=bits)}
    model = SamfForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32, **options)
    reporter = SamfReportPipeline(model=model, processor=SamfProcessor.from_pretrained(DEMO_MODEL))
    report = reporter(str(tmp_path / "phantom.nii.gz"), evidence="fast", max_new_tokens=40)
    pairs = list(zip(report.sentences, report.evidence.sentences, strict=True))[:-1]  # the last is cut off
    assert len(pairs) > 2 and all(said.text == found.text for said, found in pairs)
    for said, found in pairs:
        assert said.log_probability == pytest.approx(found.log_probability, rel=tolerance, abs=tolerance)
    assert any(any(found.slice_scores) for _, found in pairs)
    assert Report.from_json(report.to_json()) == report


def test_evidence_survives_its_json_and_names_its_files(explained, tmp_path):
    _, report = explained
    assert Report.from_json(report.to_json()) == report
    text, as_json, maps = report.save(tmp_path, "a")
    read = Report.from_json(as_json.read_text(encoding="utf-8"))
    assert read.evidence.files == ("a.evidence.nii.gz",) == (maps.name,)
    assert dataclasses.replace(read, evidence=dataclasses.replace(read.evidence, files=())) == report
    assert "heat" not in json.loads(as_json.read_text())["evidence"]["sentences"][0]
    image = nibabel.load(maps)
    assert image.shape == (*report.evidence.grid_shape, len(report.sentences))
    np.testing.assert_allclose(image.affine, report.evidence.grid_affine, atol=1e-4)
    np.testing.assert_allclose(image.get_fdata(), report.evidence.maps(), atol=0.5 / 255 + 1e-6)
    assert read.evidence.maps() is None and read.evidence.save_maps(tmp_path, "b") == []
    old = {name: value for name, value in report.to_dict().items() if name != "evidence"}
    assert Report.from_dict(old).evidence is None


def test_maps_on_the_scans_grid_fit_the_file(explained, spot, tmp_path):
    _, report = explained
    files = report.evidence.save_maps(tmp_path, "a", on_scan_grid=True)
    assert [file.name for file in files] == [f"a.evidence.{n + 1}.nii.gz" for n in range(len(report.sentences))]
    image, scan = nibabel.load(files[0]), nibabel.load(spot[0])
    assert image.shape == scan.shape and image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)


def test_scans_of_a_list_get_evidence_and_failures_stay(spot, tmp_path):
    reporter = reporter_of("ao2d", slices_per_plane=2)
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    first, failed = reporter([spot[0], str(tmp_path / "bad.nii.gz")], evidence="fast", max_new_tokens=6)
    assert first.evidence.slice_method.startswith("integrated gradient") and "bad.nii.gz" in failed.error
    assert {"alpha", "beta", "gamma"} == set(first.evidence.fusion_weights)
    assert len(first.evidence.fusion_weights["gamma"]) == len(first.evidence.fusion_weights["alpha"]) == 6
