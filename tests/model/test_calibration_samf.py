"""The configuration's calibration: where it applies, what it refuses, and that it survives saving."""

import json

import pytest
import torch
from tiny import tiny_config, tiny_model

from samf import SamfConfig, SamfForConditionalGeneration
from samf.model.calibration_samf import finding_probabilities
from samf.model.losses_samf import finding_loss

NAMES = ["Emphysema", "Lung nodule"]


def test_probabilities_are_scaled_and_logits_and_loss_are_not():
    model = tiny_model(finding_names=NAMES)
    pixels = torch.randn(2, 6, 3, 32, 32)
    targets = torch.tensor([[0, 1], [1, 1]])
    with torch.no_grad():
        before = model(pixel_values=pixels, finding_targets=targets)
        model.config.finding_temperature, model.config.finding_bias = [2.0, 0.5], [1.0, -1.0]
        after = model(pixel_values=pixels, finding_targets=targets)
    assert torch.equal(before.finding_logits, after.finding_logits) and torch.equal(before.loss, after.loss)
    assert after.loss == finding_loss(after.finding_logits, targets)
    logits = after.finding_logits
    expected = torch.stack([logits[:, 0] / 2 + 1, logits[:, 1] / 0.5 - 1], dim=1).sigmoid()
    torch.testing.assert_close(finding_probabilities(logits, model.config), expected)
    torch.testing.assert_close(finding_probabilities(logits[0], model.config), expected[0])
    plain = finding_probabilities(logits, tiny_config(finding_names=NAMES))
    assert torch.equal(plain, logits.sigmoid())


def test_the_calibration_is_saved_with_the_model(tmp_path):
    model = tiny_model(finding_names=NAMES, finding_temperature=1.5, finding_bias=[0.0, 0.25])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["finding_temperature"] == [1.5, 1.5] and saved["finding_bias"] == [0.0, 0.25]
    config = SamfForConditionalGeneration.from_pretrained(tmp_path).config
    assert config.finding_temperature == [1.5, 1.5] and config.finding_bias == [0.0, 0.25]
    assert SamfConfig().finding_temperature is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finding_temperature": [1.0]}, "one positive number for each of the 2 findings"),
        ({"finding_temperature": [1.0, 0.0]}, "positive number"),
        ({"finding_temperature": float("nan")}, "positive number"),
        ({"finding_bias": [0.0, float("inf")]}, "finite number"),
        ({"finding_bias": [0.0]}, "finding_bias"),
        ({"finding_statements": {"Emphysema": "There is emphysema."}}, "expected two entries"),
        ({"finding_statements": {"Emphysema": ["There is emphysema.", ""]}}, "expected two entries"),
    ],
)
def test_what_is_no_calibration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(finding_names=NAMES, **options)


def test_without_a_head_the_findings_are_those_with_statements():
    statements = {"Emphysema": ["There is emphysema.", ["No emphysema.", "Emphysema was not observed."]]}
    config = tiny_config(finding_statements=statements, finding_temperature=2.0)
    assert config.scored_findings == ["Emphysema"] and config.finding_temperature == [2.0]
    assert tiny_config(finding_names=NAMES, finding_statements=statements).scored_findings == NAMES
