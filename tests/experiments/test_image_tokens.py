"""The experiment on equal image tokens: what its runs start from, what they override, and that finished runs stay."""

import json

import torch

from samf import SamfForConditionalGeneration, SamfProcessor
from samf.experiments import image_tokens
from samf.utils.packaged import DEMO_MODEL


def test_runs_differ_by_the_number_of_tokens_only(tmp_path):
    for tokens in (1, 8):
        image_tokens.write_start(str(DEMO_MODEL), tmp_path / str(tokens), tokens, seed=3)
    one, eight = (SamfForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("1", "8"))
    assert (one.config.num_image_tokens, eight.config.num_image_tokens) == (1, 8)
    assert SamfProcessor.from_pretrained(tmp_path / "8").num_image_tokens == 8
    assert (one.config.fusion_type, one.config.fusion_scale, one.dtype) == ("ao2d", None, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), eight.parameters(), strict=True))
    demo = SamfForConditionalGeneration.from_pretrained(DEMO_MODEL).float()
    kept = dict(demo.named_parameters())
    changed = {
        name for name, weight in one.named_parameters() if name not in kept or not torch.equal(weight, kept[name])
    }
    assert changed and all("fusion" in name for name in changed)


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(image_tokens, "write_start", lambda model, folder, tokens, seed: folder.mkdir())
    monkeypatch.setattr(image_tokens, "measure", lambda args, folder: {"accuracy": 0.5})
    monkeypatch.setattr(image_tokens, "logged", lambda folder, name: [1.0, 2.0])

    def call(script, recipes, options):
        started.append(options)
        options["output_dir"].mkdir()

    monkeypatch.setattr(image_tokens, "call", call)
    finished = tmp_path / "tokens8_seed0" / "figures.json"
    finished.parent.mkdir()
    finished.write_text(json.dumps({"accuracy": 0.25}), encoding="utf-8")
    options = ["--data", "phantoms", "--output", str(tmp_path), "--image_tokens", "8", "--seeds", "0", "1"]
    image_tokens.main(options)
    image_tokens.main(options)
    assert [(run["output_dir"].name, run["seed"], run["max_steps"]) for run in started] == [("tokens8_seed1", 1, 400)]
    assert "| 8 | 2 | 0.375 ± 0.177 |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tokens8_seed0", "tokens8_seed1"]
