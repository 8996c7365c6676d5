"""Training makes a calibration invalid, so a model that is trained further has none."""

from tiny import model_for, tiny_processor

from samf.training.arguments import ModelArguments
from samf.training.factory import build_model


def test_a_model_that_is_trained_further_has_no_calibration(tmp_path, caplog):
    processor = tiny_processor()
    options = {"finding_names": ["Emphysema"], "finding_temperature": 2.0, "finding_bias": [0.5]}
    model_for(processor, **options).save_pretrained(tmp_path)
    model = build_model(ModelArguments(model=str(tmp_path), dtype="float32"), processor)
    assert model.config.finding_temperature is None and model.config.finding_bias is None
    assert model.config.finding_names == ["Emphysema"] and "samf calibrate" in caplog.text
