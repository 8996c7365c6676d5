"""train.py end to end on a few phantoms: what is trained, what isn't, and that the output folder is whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import history, prepare, run
from tiny import TEXTS
from transformers import AutoModelForImageTextToText, AutoProcessor

from samf import SamfForConditionalGeneration, SamfImageProcessor, SamfProcessor, preprocess
from samf.data.ct_rate import load_records
from samf.data.embedding_cache import EmbeddingCache
from samf.data.slice_cache import SliceCache
from samf.data.small_tokenizer import train_small_tokenizer
from samf.training.arguments import DataArguments
from samf.training.parts import PARTS
from samf.training.records import load_datasets

FINDINGS = ("Cardiomegaly", "Pleural effusion")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("train"))


def changed_parts(before: SamfForConditionalGeneration, after: SamfForConditionalGeneration) -> set[str]:
    new = after.state_dict()
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, new[name])}
    return {part for part, prefixes in PARTS.items() if any(name.startswith(prefixes) for name in changed)}


def losses(folder: Path) -> dict[str, float]:
    """The last value of each logged loss."""
    return {key: value for row in history(folder) for key, value in row.items() if key.endswith("loss")}


def test_stages_train_their_parts_alone_and_end_in_a_whole_repository(work):
    findings = {"finding_names": FINDINGS, "slice_cache": work / "cache", "cache_embeddings": True}
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
    assert logged["eval_own_loss"] != logged["eval_shuffled_loss"]

    files = {file.name for file in (work / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= files
    assert {"tokenizer.json", "chat_template.jinja", "requirements.txt"} <= files
    assert {"_records_train.json", "_records_valid.json"} <= files  # what was read; not pushed: it names volumes
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
    cache.fill([(path, None)], num_workers=0)
    with torch.no_grad():
        expected = model.model.encode_slices(processor(path)["pixel_values"]).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(cache.get(path)["slice_embeddings"]), expected)
    with torch.no_grad():
        model.model.slice_encoder.layernorm.bias += 1
    moved = EmbeddingCache(tmp_path, slices, model.model)
    assert moved.record_path(path) != cache.record_path(path)
    torch.testing.assert_close(torch.tensor(moved.get(path)["slice_embeddings"]), expected + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_parts": ["vision"]}, "train_parts names .'vision'."),
        ({"objective": "both"}, "objective is 'both'"),
        ({"cache_embeddings": True, "slice_cache": "cache"}, "leave slice_encoder out of train_parts"),
        ({"data": "/nowhere"}, "/nowhere: no such folder"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_what_cannot_work_is_an_error_that_says_what_to_do(work, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(work, "never", **options)


def test_volumes_that_are_missing_or_cannot_be_read_are_left_out_when_asked(work, tmp_path, caplog):
    """Of six training volumes one is cut short and one is gone; preprocess.py has met the first."""
    shutil.copytree(work / "phantoms", tmp_path / "phantoms")
    cut, gone = sorted((tmp_path / "phantoms").rglob("train_*.nii.gz"))[:2]
    cut.write_bytes(cut.read_bytes()[:1000])
    filled = [str(tmp_path / "phantoms"), "--cache", str(tmp_path / "cache"), "--on_error", "skip"]
    preprocess.main([*filled, "--slices_per_plane", "2", "--image_size", "32", "--num_workers", "1"])
    gone.unlink()

    processor = SamfProcessor(SamfImageProcessor(slices_per_plane=2, size=32), train_small_tokenizer(TEXTS, 400))
    options = {"data": str(tmp_path / "phantoms"), "slice_cache": str(tmp_path / "cache")}
    with pytest.raises(FileNotFoundError, match=gone.name):
        load_datasets(DataArguments(**options), processor, [], False, str(tmp_path))
    found = load_datasets(DataArguments(**options, on_error="skip"), processor, [], False, str(tmp_path))
    kept = set(found["train_dataset"].unique("volume"))
    everything = load_records(str(work / "phantoms"), "train", tasks=DataArguments().tasks).unique("volume")
    assert {Path(path).name for path in kept} == {Path(path).name for path in everything} - {cut.name, gone.name}
    assert "couldn't read their 1 volumes" in caplog.text
    left_out = json.loads((tmp_path / "_records_train.json").read_text(encoding="utf-8"))["left_out"]
    assert any(gone.name in entry["first"] for entry in left_out)
