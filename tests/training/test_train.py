"""train.py end to end on a few phantoms: trained and frozen parts, and a complete output folder."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import history, prepare, run
from tiny import TEXTS
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers.integrations import deepspeed

from samf import SamfForConditionalGeneration, SamfImageProcessor, SamfProcessor, preprocess, train
from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.slice_cache import SliceCache
from samf.data.loading import load_records
from samf.model.ct_volume import VolumeRef
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.training.arguments import DataArguments
from samf.training.datasets import load_datasets
from samf.training.param_groups import PARTS
from samf.training.trainer import SamfTrainer

FINDINGS = ("Cardiomegaly", "Pleural effusion")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("train"))


def changed_parts(before: SamfForConditionalGeneration, after: SamfForConditionalGeneration) -> set[str]:
    new = after.state_dict()
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, new[name])}
    return {part for part, prefixes in PARTS.items() if any(name.startswith(prefixes) for name in changed)}


def losses(folder: Path) -> dict[str, float]:
    """Return the last value of each logged loss."""
    return {key: value for row in history(folder) for key, value in row.items() if key.endswith("loss")}


def test_stages_train_their_parts_alone_and_end_in_a_whole_repository(work):
    findings = {"finding_names": FINDINGS, "slice_cache": work / "cache", "cache_embeddings": True}
    findings["initializer_range"] = 0.2  # by 0.02 the fusion weighs all slices alike, to the last bit
    frozen = ["slice_position", "aggregator", "finding_head"]
    first = run(work, "first", objective="findings", train_parts=frozen, **findings, max_steps=1, learning_rate=0)
    second = run(
        work, "second", model=work / "first", objective="findings", train_parts=frozen, slice_cache=work / "cache"
    )
    assert changed_parts(first, second) == set(frozen)

    text = {"tasks": ["multiple_choice"], "vqa_files": [work / "phantoms/dataset/vqa/train_text_vqa.json"]}
    third = run(work, "third", model=work / "second", train_parts=["language_model"], **text)
    assert changed_parts(second, third) == {"language_model"}

    whole = run(work, "whole", model=work / "third", slice_cache=work / "cache", eval_strategy="steps", eval_steps=2)
    assert changed_parts(third, whole) == set(PARTS)
    logged = losses(work / "whole")
    assert logged["train_loss"] > 0
    assert {"eval_own_loss", "eval_shuffled_loss"} <= logged.keys()
    # Weights tell the volumes apart; losses of so small a model may be equal to the last bit of float32.
    weights = {key: value for row in history(work / "whole") for key, value in row.items() if "alpha_entropy" in key}
    assert weights["eval_own_alpha_entropy"] != weights["eval_shuffled_alpha_entropy"]

    files = {file.name for file in (work / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= files
    assert {"tokenizer.json", "chat_template.jinja", "requirements.txt"} <= files
    assert {"_records_train.json", "_records_valid.json"} <= files  # what was read; not pushed: it names volumes
    record = json.loads((work / "whole" / "_run.json").read_text(encoding="utf-8"))  # what samf push says of the run
    assert (record["data"], record["learning_rate"], record["valid_records"] > 0) == ("phantoms", 1e-2, True)
    assert {"torch", "transformers"} <= record["versions"].keys() and str(work) not in json.dumps(record)
    texts = [
        file.read_text(encoding="utf-8")
        for file in (work / "whole").iterdir()
        if file.suffix in (".json", ".md", ".jinja") and not file.name.startswith("_")
    ]
    assert not any(str(work) in text for text in texts)  # nothing of this machine's folders
    assert {f"{name}_samf.py" for name in ("configuration", "modeling", "processing", "image_processing")} <= files
    assert "ct_volume.py" in files
    assert "not for diagnosis" in (work / "whole" / "README.md").read_text(encoding="utf-8")
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(work / "whole"),
        AutoProcessor.from_pretrained(work / "whole"),
    )
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.finding_names == list(FINDINGS)


def test_cached_embeddings_train_as_pixels_do(work):
    parts = ["aggregator", "fusion", "language_model"]
    options = {
        "train_parts": parts,
        "slice_cache": work / "cache",
        "slice_position_scope": "none",
        "aggregator_dropout": 0.0,
    }
    pixels = run(work, "pixels", **options)
    embeddings = run(work, "embeddings", **options, cache_embeddings=True)
    other = embeddings.state_dict()
    for name, value in pixels.state_dict().items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_embeddings_in_the_cache_are_the_encoders_and_follow_its_weights(work, tmp_path):
    model = SamfForConditionalGeneration.from_component_pretrained(
        str(work / "encoder"), str(work / "text"), image_token_id=7
    )
    processor = SamfImageProcessor.from_pretrained(work / "encoder")
    path = str(next((work / "phantoms").rglob("*.nii.gz")))
    slices = SliceCache(tmp_path, processor)
    cache = EmbeddingCache(tmp_path, slices, model.model)
    cache.fill([path], num_workers=0)
    with torch.no_grad():
        expected = model.model.encode_slices(processor(path)["pixel_values"]).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(cache.get(path)["slice_embeddings"]), expected)
    shifted = VolumeRef(path, (1.0, 500.0))
    assert not cache.has(shifted)
    by_keyword = cache.get(path, rescale=[1, 500])["slice_embeddings"]
    assert cache.has(shifted) and not np.array_equal(by_keyword, expected.numpy())
    np.testing.assert_array_equal(cache.get(shifted)["slice_embeddings"], by_keyword)
    with torch.no_grad():
        model.model.slice_encoder.layernorm.bias += 1
    moved = EmbeddingCache(tmp_path, slices, model.model)
    assert moved.entry_path(path) != cache.entry_path(path)
    torch.testing.assert_close(torch.tensor(moved.get(path)["slice_embeddings"]), expected + 1)


def test_training_without_evaluation_needs_no_validation_volumes(work, tmp_path):
    shutil.copytree(work / "phantoms", tmp_path / "phantoms")
    shutil.rmtree(tmp_path / "phantoms/dataset/valid_fixed")
    run(work, "unmeasured", data=tmp_path / "phantoms", max_steps=1)
    assert "train_loss" in losses(work / "unmeasured")
    with pytest.raises(SystemExit, match="^train.py: .*--on_error skip of train.py"):
        run(work, "measured", data=tmp_path / "phantoms", max_steps=1, do_eval=True)


def test_scans_without_a_report_have_unknown_labels_and_not_none(work, tmp_path):
    """Under FSDP a process whose batch has no labels at all would have no gradient where other processes have one."""
    shutil.copytree(work / "phantoms", tmp_path / "phantoms")
    dataset = tmp_path / "phantoms/dataset"
    shutil.rmtree(dataset / "multi_abnormality_labels")
    reports = dataset / "radiology_text_reports" / "train_reports.csv"
    header, _, *rows = reports.read_text(encoding="utf-8").splitlines()
    reports.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    processor = SamfProcessor(SamfImageProcessor(slices_per_plane=2, size=32), train_small_tokenizer(TEXTS, 400))
    arguments = DataArguments(data=str(tmp_path / "phantoms"))
    options = {"with_lengths": False, "with_valid": False, "output_dir": str(tmp_path)}
    labels = load_datasets(arguments, processor, list(FINDINGS), **options)["train_dataset"]["finding_labels"][:]
    assert [-100, -100] in labels and {len(row) for row in labels} == {2}


def test_components_are_whole_while_a_model_is_put_together(work, monkeypatch):
    """accelerate registers ZeRO-3 with the library before that, and each component would be sharded as it loads."""
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    assert deepspeed.is_deepspeed_zero3_enabled()
    seen = []
    monkeypatch.setattr(
        train, "build_model", lambda *_: seen.append(deepspeed.is_deepspeed_zero3_enabled()) or sys.exit(7)
    )
    with pytest.raises(SystemExit):
        run(work, "never")
    assert seen == [False]


def test_sharded_models_get_the_places_of_slices_as_bits(monkeypatch):
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    positions, trainer = torch.tensor([[0.25, 0.9012]]), SamfTrainer.__new__(SamfTrainer)
    for fsdp, deepspeed_on in ((True, False), (False, True), (False, False)):
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = fsdp, deepspeed_on
        found = trainer._prepare_inputs({"slice_positions": positions})["slice_positions"]
        assert found.is_floating_point() != (fsdp or deepspeed_on)
        assert torch.equal(found.view(torch.float32), positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_parts": ["vision"]}, "train_parts names .'vision'."),
        ({"objective": "both"}, "--objective: invalid choice: 'both' .choose from '?text'?, '?findings"),
        ({"cache_embeddings": True, "slice_cache": "cache"}, "leave slice_encoder out of train_parts"),
        ({"data": "/nowhere"}, "^train.py: /nowhere: no such folder"),
        ({"dataset": "ctrate"}, "^train.py: .*ctrate"),
        ({"volume_column": "scan"}, "^train.py: No column holds texts"),
        ({"volume_column": "scan", "report_column": "text"}, "^train.py: "),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_what_cannot_work_is_an_error_that_says_what_to_do(work, options, message):
    with pytest.raises((ValueError, SystemExit), match=message) as error:
        run(work, "never", **options)
    assert "\n" not in str(error.value)


def test_volumes_that_are_missing_or_cannot_be_read_are_left_out_when_asked(work, tmp_path, caplog):
    """Of six training volumes one is cut short and one is missing; preprocess.py has tried the first."""
    shutil.copytree(work / "phantoms", tmp_path / "phantoms")
    cut, gone = sorted((tmp_path / "phantoms").rglob("train_*.nii.gz"))[:2]
    cut.write_bytes(cut.read_bytes()[:1000])
    filled = [str(tmp_path / "phantoms"), "--cache", str(tmp_path / "cache"), "--on_error", "skip"]
    preprocess.main([*filled, "--slices_per_plane", "2", "--image_size", "32", "--num_workers", "1"])
    gone.unlink()

    processor = SamfProcessor(SamfImageProcessor(slices_per_plane=2, size=32), train_small_tokenizer(TEXTS, 400))
    options = {"data": str(tmp_path / "phantoms"), "slice_cache": str(tmp_path / "cache")}
    with pytest.raises(FileNotFoundError, match=gone.name):
        load_datasets(
            DataArguments(**options), processor, [], with_lengths=False, with_valid=True, output_dir=str(tmp_path)
        )
    found = load_datasets(
        DataArguments(**options, on_error="skip"),
        processor,
        [],
        with_lengths=False,
        with_valid=True,
        output_dir=str(tmp_path),
    )
    kept = set(found["train_dataset"].unique("volume"))
    everything = load_records(str(work / "phantoms"), "train", tasks=DataArguments().tasks).unique("volume")
    assert {Path(path).name for path in kept} == {Path(path).name for path in everything} - {cut.name, gone.name}
    assert "couldn't read their 1 volumes" in caplog.text
    left_out = json.loads((tmp_path / "_records_train.json").read_text(encoding="utf-8"))["left_out"]
    assert any(gone.name in entry["first"] for entry in left_out)
