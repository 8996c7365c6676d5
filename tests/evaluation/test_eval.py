"""Generation, resuming, shuffled volumes, recipes and eval.py itself."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pytest
import torch
from tiny import IMAGE_TOKENS, model_for, tiny_processor
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from samf import eval as eval_script
from samf.data.collator import SamfCollator
from samf.data.loading import load_records
from samf.data.patients import patient_of
from samf.data.prompts import record_prompt
from samf.data.records import FEATURES
from samf.evaluation.answering import digests, generation
from samf.evaluation.answering.answer_folder import AnswerFolder, ResumeError
from samf.evaluation.answering.batches import make_batches, share_batches
from samf.evaluation.answering.generation import (
    GenerationSettings,
    evaluate,
    generate_predictions,
    shuffle_volumes,
)
from samf.evaluation.answering.option_likelihood import OptionCollator, answer_log_likelihoods, option_rows
from samf.evaluation.answering.settings import fitting_batch_size
from samf.evaluation.answering.volume_readers import EncodedVolumes, ReadAhead, VolumeMemo
from samf.evaluation.scoring import read_predictions
from samf.evaluation.scoring_options import ScoringOptions, scoring_parser
from samf.model.ct_volume import VolumeRef
from samf.utils.distributed import default_device
from samf.utils.recipe import RecipeError, parse_recipe

EOS, PAD = 3, 0
CHOICES = ["emphysema", "consolidation", "cardiomegaly", "lung nodule"]


# ---- stand-ins with the interface of the model, the processor and the collator ---------------------------------------


class EchoModel(nn.Module):
    """Answers with the prompt's last 12 tokens, then the end token, then padding: a function of its row alone."""

    def __init__(self, eos=EOS):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = types.SimpleNamespace(eos_token_id=eos)
        self.calls = []

    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)

    def generate(self, input_ids, attention_mask, pixel_values, **options):
        self.calls.append({"batch": len(input_ids), "training": self.training, "dtype": pixel_values.dtype, **options})
        assert attention_mask[:, -1].all(), "prompts are padded on the left"
        limit = options["max_new_tokens"]
        answers = [[*ids[-12:], EOS][:limit] for ids in input_ids.tolist()]
        width = max(map(len, answers))
        new = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in answers])
        return torch.cat([input_ids, new], dim=1)


class ByteProcessor:
    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [bytes(i - 10 for i in ids if i not in (EOS, PAD)).decode("latin-1") for ids in rows]


class ByteCollator:
    """Prompts as bytes, left-padded; a volume whose name says so can't be read."""

    def __call__(self, records):
        broken = [r["volume"] for r in records if r["volume"] and "broken" in r["volume"]]
        if broken:
            raise ValueError(f"{broken[0]}: truncated")
        prompts = [[b + 10 for b in f"{r['volume']} {record_prompt(r)}".encode("latin-1")] for r in records]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.zeros(len(records), 1)}


def make_record(number: int, volume: str | None, task: str = "multiple_choice", **extra) -> dict:
    scan = patient_of(volume) + "_a" if volume else f"text_{number}"
    is_choice = task == "multiple_choice"
    return {
        "volume": volume,
        "task": task,
        "question": "Which?" if is_choice else "Write the report" + " again" * (number % 3),
        "choices": CHOICES[: 2 + number % 3] if is_choice else None,
        "answer": "(b) consolidation" if is_choice else "Emphysema is observed.",
        "id": f"{scan}-{number}",
        "scan_id": scan,
        "finding_labels": [],
        **extra,
    }


@pytest.fixture
def records():
    volumes = [f"/ct/valid_{patient}_a_1.nii.gz" for patient in (3, 1, 2)]
    questions = [make_record(n, volumes[n % 3]) for n in range(10)]
    return [*questions, *(make_record(20 + n, v, "report") for n, v in enumerate(volumes)), make_record(30, None)]


def run(folder, records, settings=None, model=None, **options):
    settings = settings or GenerationSettings(batch_size=3, max_new_tokens=20)
    model = model or EchoModel()
    return generate_predictions(model, ByteProcessor(), records, folder, settings, collator=ByteCollator(), **options)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_every_record_is_answered_once_by_its_own_prompt(records, tmp_path):
    summary = run(tmp_path, records)
    rows = {r["id"]: r for r in read_predictions(tmp_path / "predictions.jsonl")}
    assert summary.written == len(records) == len(rows) and summary.failures == []
    for record in records:
        row = rows[record["id"]]
        assert row["prediction"] == f"{record['volume']} {record_prompt(record)}"[-12:].strip()
        assert (row["reference"], row["scan_id"], row["task"]) == (record["answer"], record["scan_id"], record["task"])
        assert row["tokens"] == 12 and not row["truncated"]
    assert (tmp_path / "failures.jsonl").read_text() == ""


def test_greedy_by_default_and_the_model_keeps_its_mode(records, tmp_path):
    model = EchoModel().to(torch.bfloat16).train()
    run(tmp_path, records, model=model)
    assert model.training
    for call in model.calls:
        assert not call["training"] and call["dtype"] == torch.bfloat16
        assert call["do_sample"] is False and call["num_beams"] == 1
        assert "temperature" not in call and "top_p" not in call


def test_truncated_answers_are_counted(records, tmp_path):
    run(tmp_path, records, GenerationSettings(batch_size=3, max_new_tokens=12))
    rows = read_predictions(tmp_path / "predictions.jsonl")
    assert all(row["truncated"] and row["tokens"] == 12 for row in rows)


def test_several_end_tokens(records, tmp_path):
    run(tmp_path, records, model=EchoModel(eos=[EOS, 7]))
    assert not any(row["truncated"] for row in read_predictions(tmp_path / "predictions.jsonl"))


def test_batches_hold_one_task_and_every_record_once(records):
    batches = make_batches(records, 4)
    assert sorted(r["id"] for batch in batches for r in batch) == sorted(r["id"] for r in records)
    assert all(len({r["task"] for r in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert make_batches(records[::-1], 4) == batches


def test_equal_questions_share_batches_within_a_window_of_volumes():
    """Six volumes in windows of two: what is asked of a window is answered before the next one, by length of the prompt."""
    asked = [
        (volume, question) for volume in "fbdaec" for question in ("where is the nodule?", "which?", "which side?")
    ]
    records = [
        {"id": f"{volume} {question}", "task": "short_answer", "volume": volume, "question": question, "choices": None}
        for volume, question in asked
    ]
    batches = make_batches(records, 2, window=2)
    expected = [
        [f"{volume} {question}" for volume in window]
        for window in ("ab", "cd", "ef")
        for question in ("which?", "which side?", "where is the nodule?")
    ]
    assert [[record["id"] for record in batch] for batch in batches] == expected


def test_the_default_batch_holds_keys_and_values_of_4_gib():
    """Counted from the cache of the library itself: the rows that fit, with as many tokens as are planned for."""
    processor = tiny_processor()
    model = model_for(processor)
    settings = GenerationSettings(max_new_tokens=100, num_beams=2)
    assert fitting_batch_size(model, settings) == 64 and fitting_batch_size(EchoModel(), settings) == 8
    with torch.no_grad():
        cache = model.model.language_model(torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    model.config.num_image_tokens = 1_000_000
    assert fitting_batch_size(model, settings) == 2**32 // (token * (1_000_000 + 256 + 100) * 2) > 1
    model.config.num_image_tokens = 10**10
    assert fitting_batch_size(model, settings) == 1


def test_a_volume_is_encoded_once_for_the_questions_of_all_tasks(ct_folder, tmp_path, monkeypatch):
    """Though each task asks about all volumes, and a batch holds one record."""
    processor = tiny_processor()
    model = model_for(processor)
    records = list(load_records(str(ct_folder / "mcq.csv"), "valid", tasks=["multiple_choice"], on_missing="raise"))
    records += [{**record, "id": f"{record['id']} again", "task": "short_answer"} for record in records]
    encoded = []
    encode = type(model.model).encode_slices
    monkeypatch.setattr(type(model.model), "encode_slices", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    generate_predictions(model, processor, records, tmp_path, GenerationSettings(batch_size=1, max_new_tokens=2))
    assert len(encoded) == len({record["volume"] for record in records}) < len(records)


@pytest.mark.parametrize("kept", range(15))
@pytest.mark.parametrize("cut", [0, 9])
def test_a_killed_run_resumed_gives_the_unbroken_file(records, tmp_path, kept, cut):
    """Cut after `kept` lines and `cut` bytes of the next one."""
    run(tmp_path / "whole", records)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    run(tmp_path / "cut", records)
    remainder = lines[kept][:cut] if kept < len(lines) else b""
    (tmp_path / "cut" / "predictions.jsonl").write_bytes(b"".join(lines[:kept]) + remainder)
    model = EchoModel()
    summary = run(tmp_path / "cut", records, model=model)
    assert (tmp_path / "cut" / "predictions.jsonl").read_bytes() == whole
    assert summary.resumed == min(kept, len(records)) and summary.written == len(records) - summary.resumed
    assert bool(model.calls) == (kept < len(records))


def test_a_run_that_dies_in_generate_is_resumed(records, tmp_path):
    class Dying(EchoModel):
        def generate(self, **inputs):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(**inputs)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", records, model=Dying())
    assert len(read_predictions(tmp_path / "cut" / "predictions.jsonl")) == 6
    run(tmp_path / "cut", records)
    run(tmp_path / "whole", records)
    names = ("cut", "whole")
    assert len({(tmp_path / name / "predictions.jsonl").read_bytes() for name in names}) == 1


def test_other_settings_are_an_error_that_names_both(records, tmp_path):
    run(tmp_path, records, described_by={"model": "m1"})
    with pytest.raises(ResumeError, match=r"predictions\.jsonl was made .* model was 'm1' and is now 'm2'"):
        run(tmp_path, records, described_by={"model": "m2"})
    with pytest.raises(ResumeError, match="max_new_tokens was 20 and is now 5"):
        run(tmp_path, records, GenerationSettings(max_new_tokens=5), described_by={"model": "m1"})
    with pytest.raises(ResumeError, match="records was '14, sha256"):
        run(tmp_path, records[1:], described_by={"model": "m1"})
    run(tmp_path, records, GenerationSettings(batch_size=1, max_new_tokens=20), described_by={"model": "m1"})


def test_a_model_trained_on_does_not_continue_the_old_ones_file(records, tmp_path):
    run(tmp_path, records)
    model = EchoModel()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ResumeError, match="weights was 'sha256"):
        run(tmp_path, records, model=model)


def test_a_weight_deep_inside_a_tensor_is_one_of_the_models(records, tmp_path):
    model = EchoModel()
    model.weight = nn.Parameter(torch.zeros(10_000))
    run(tmp_path, records, model=model)
    with torch.no_grad():
        model.weight[5_001] = 1e-3
    with pytest.raises(ResumeError, match="weights was 'sha256"):
        run(tmp_path, records, model=model)


def test_what_shapes_an_answer_can_not_change_within_a_run(records, tmp_path):
    """The model's own generation settings, the processor's, the chat template, references: each is named."""

    class Processor(ByteProcessor):
        def __init__(self):
            self.image_processor = types.SimpleNamespace(hu_windows=[[-1000, 200]], size=32)
            self.chat_template = "{{ messages }}"

    def answer(records=records, penalty=1.0, windows=((-1000, 200),), template="{{ messages }}", **settings):
        model, processor = EchoModel(), Processor()
        model.generation_config.repetition_penalty = penalty
        processor.image_processor.hu_windows, processor.chat_template = windows, template
        settings = GenerationSettings(**{"batch_size": 3, "max_new_tokens": 20, **settings})
        return generate_predictions(model, processor, records, tmp_path, settings, collator=ByteCollator())

    answer()
    assert answer().written == 0
    other = [{**records[0], "answer": "(a) emphysema"}, *records[1:]]
    for changed, message in (
        ({"penalty": 1.2}, r"generation_config\.repetition_penalty was 1\.0 and is now 1\.2"),
        ({"windows": ((-160, 240),)}, r"processor\.image_processor\.hu_windows was \[\[-1000, 200\]\] and is now"),
        ({"template": "{{ other }}"}, r"processor\.chat_template was '\{\{ messages \}\}' and is now"),
        ({"records": other}, "references was 'sha256"),
    ):
        with pytest.raises(ResumeError, match=message):
            answer(**changed)


def test_a_volume_that_changed_is_not_the_one_that_was_answered_from(records, tmp_path):
    """By content, wherever the data lie; a volume that failed may be repaired before the run is resumed."""
    places = [tmp_path / name for name in ("here", "there")]
    for place in places:
        place.mkdir()
        for volume in {record["volume"] for record in records if record["volume"]}:
            (place / Path(volume).name).write_bytes(volume.encode() * 5000)

    def at(place):
        return [{**r, "volume": r["volume"] and str(place / Path(r["volume"]).name)} for r in records]

    broken = at(places[0])
    broken[4]["volume"] = str(places[0] / "valid_9_broken.nii.gz")
    assert run(tmp_path / "out", broken, on_error="skip").written == len(records) - 1
    assert run(tmp_path / "out", at(places[1]), on_error="skip").written == 1, "moved, and one repaired"
    changed = places[1] / "valid_1_a_1.nii.gz"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    with pytest.raises(ResumeError, match=r"answered from another volume than .*valid_1_a_1\.nii\.gz is now"):
        run(tmp_path / "out", at(places[1]), on_error="skip")
    assert run(tmp_path / "out", at(places[0])).written == 0


def test_draws_depend_on_the_batch_size_and_are_tied_to_it(records, tmp_path):
    run(tmp_path, records, GenerationSettings(batch_size=3, do_sample=True))
    with pytest.raises(ResumeError, match="batch_size was 3 and is now 2"):
        run(tmp_path, records, GenerationSettings(batch_size=2, do_sample=True))


def test_the_real_processor_and_model_are_the_same_after_loading_again(saved_model, tmp_path):
    """Else no run could be resumed; and a tokenizer that was used, or a folder that was moved, is no other."""
    described = []
    moved = tmp_path / "moved"
    shutil.copytree(saved_model, moved)
    for folder in (saved_model, moved):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        if folder == moved:
            processor.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
        described.append(json.dumps(digests.describe_answering(model, processor), sort_keys=True))
    assert described[0] == described[1]
    found = json.loads(described[0])
    assert found["processor"]["image_processor"]["slices_per_plane"] and found["processor"]["tokenizer"]
    assert (
        found["processor"]["chat_template"] and found["generation_config"] and found["config"]["model_type"] == "samf"
    )
    model.generation_config.num_beams = 5
    assert digests.describe_answering(model, processor)["generation_config"]["num_beams"] == 5


def test_a_foreign_predictions_file_is_not_continued(records, tmp_path):
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(ResumeError, match="exists without"):
        run(tmp_path, records)


def test_a_broken_volume_stops_and_names_the_record(records, tmp_path):
    records[4]["volume"] = "/ct/valid_9_broken.nii.gz"
    with pytest.raises(ValueError, match="truncated") as error:
        run(tmp_path, records)
    assert any(records[4]["id"] in note for note in error.value.__notes__)


def test_broken_volumes_are_skipped_listed_and_tried_again(records, tmp_path, caplog):
    mended = [dict(record) for record in records]
    for n in (4, 5, 11):
        records[n]["volume"] = "/ct/valid_9_broken.nii.gz"
    broken = {records[n]["id"] for n in (4, 5, 11)}
    summary = run(tmp_path, records, on_error="skip")
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {f["id"] for f in failures} == broken and len(failures) == 3 == len(summary.failures)
    assert all("truncated" in f["error"] and "broken" in f["volume"] for f in failures)
    assert caplog.text.count("is skipped") == 3
    assert {r["id"] for r in read_predictions(tmp_path / "predictions.jsonl")} == {r["id"] for r in records} - broken
    summary = run(tmp_path, mended, on_error="skip")
    assert summary.written == 3 and summary.failures == []


def test_a_fault_of_the_program_is_never_skipped(records, tmp_path):
    class Faulty(EchoModel):
        def generate(self, **inputs):
            raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        run(tmp_path, records, model=Faulty(), on_error="skip")


def test_bad_arguments(records, tmp_path):
    with pytest.raises(ValueError, match="occurs twice"):
        run(tmp_path, [records[0], records[0]])
    with pytest.raises(ValueError, match="no records"):
        run(tmp_path, [])
    for missing in (None, ""):
        with pytest.raises(ValueError, match="Record 1 has no id"):
            run(tmp_path, [records[0], {**records[1], "id": missing}])
    with pytest.raises(ValueError, match="expected one of raise, skip"):
        run(tmp_path, records, on_error="ignore")
    with pytest.raises(ValueError, match="batch_size is 0"):
        GenerationSettings(batch_size=0)


def test_the_old_name_of_raise_is_accepted_with_a_warning(records, tmp_path):
    records[4]["volume"] = "/ct/valid_9_broken.nii.gz"
    with (
        pytest.warns(FutureWarning, match="on_error='stop' is now 'raise'"),
        pytest.raises(ValueError, match="trunc"),
    ):
        run(tmp_path, records, on_error="stop")
    required = {"model": "m", "data": "d", "output_dir": "o"}
    with pytest.warns(FutureWarning, match="on_error='stop'"):
        assert eval_script.EvalArguments(**required, on_error="stop").on_error == "raise"
    with pytest.raises(ValueError, match="expected one of raise, skip"):
        eval_script.EvalArguments(**required, on_error="ignore")


def test_every_command_line_has_the_options_of_scoring():
    """One list: what eval.py, scoring and the scoreboard take; the answers' seed is not the shuffled baseline's."""
    argv = ["--labeller", "radbert", "--radeval", "green", "--resamples", "0", "--finding_names", "Emphysema"]
    (args,) = parse_recipe(eval_script.EvalArguments, ["--model=m", "--data=d", "--output_dir=o", "--seed=7", *argv])
    expected = ScoringOptions(labeller="radbert", radeval=["green"], resamples=0, finding_names=["Emphysema"])
    assert args.scoring_options() == expected
    assert ScoringOptions.from_namespace(scoring_parser().parse_args(argv)) == expected
    assert not ScoringOptions.from_namespace(scoring_parser().parse_args(["--no_baselines"])).baselines


def test_evaluate_scores_what_it_wrote(records, tmp_path):
    settings = GenerationSettings(batch_size=3, max_new_tokens=20)
    results = evaluate(EchoModel(), ByteProcessor(), records, tmp_path, settings, collator=ByteCollator())
    assert results["counts"]["predictions"] == len(records)
    assert results["tasks"]["multiple_choice"]["multiple_choice"]["count"] == 11
    assert results["generation"]["written"] == 14 and results["generation"]["failures"] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "- 14 answers generated in" in (tmp_path / "results.md").read_text()


def test_evaluate_when_nothing_can_be_read(records, tmp_path):
    broken = [{**record, "volume": "/ct/valid_9_broken.nii.gz"} for record in records]
    with pytest.raises(ValueError, match="None of 14 records could be read"):
        evaluate(EchoModel(), ByteProcessor(), broken, tmp_path, collator=ByteCollator(), on_error="skip")


# ---- shuffled volumes ------------------------------------------------------------------------------------------------


def cohort(patients: int, seed: int) -> list[dict]:
    """Each patient with one to three volumes in one or two scans, and several questions on each; some without image."""
    rng = np.random.default_rng(seed)
    records = [make_record(10_000, None)]
    for patient in range(1, patients + 1):
        for k in range(int(rng.integers(1, 4))):
            volume = f"/ct/valid_{patient}/valid_{patient}_{'ab'[k % 2]}_{k + 1}.nii.gz"
            records += [make_record(len(records), volume) for _ in range(int(rng.integers(1, 4)))]
    return [records[i] for i in rng.permutation(len(records))]


@pytest.mark.parametrize("patients", range(2, 31))
def test_no_record_keeps_a_volume_of_its_own_patient(patients):
    for seed in range(3):
        records = cohort(patients, seed)
        before = [dict(record) for record in records]
        shuffled = shuffle_volumes(records, seed)
        assert records == before, "the records that came in stay as they are"
        donors = {}
        for old, new in zip(records, shuffled, strict=True):
            assert {**new, "volume": None} == {**old, "volume": None}, "only the volume changes"
            if old["volume"] is None:
                assert new["volume"] is None
                continue
            assert patient_of(new["volume"]) != patient_of(old["volume"])
            donors.setdefault(patient_of(old["volume"]), set()).add(patient_of(new["volume"]))
        assert all(len(d) == 1 for d in donors.values())
        assert set.union(*donors.values()) == set(donors), "every patient gives volumes to one other"
        assert shuffle_volumes(records, seed) == shuffled


def test_seeds_give_different_shuffles():
    records = cohort(30, 0)
    assert shuffle_volumes(records, 0) != shuffle_volumes(records, 1)


def test_the_order_of_records_does_not_matter_for_who_gives():
    records = cohort(12, 0)
    pairs = [
        {(o["id"], patient_of(n["volume"])) for o, n in zip(rs, shuffle_volumes(rs, 5), strict=True) if n["volume"]}
        for rs in (records, records[::-1])
    ]
    assert pairs[0] == pairs[1]


def test_a_volume_takes_its_rescale_with_it():
    records = [make_record(n, f"/ct/valid_{n}_a_1.nii.gz", rescale=[1.0, -1024.0 * n]) for n in (1, 2, 3)]
    for record in shuffle_volumes(records):
        assert record["rescale"] == [1.0, -1024.0 * int(patient_of(record["volume"]).split("_")[1])]


def test_a_dataset_stays_a_dataset():
    records = [{**record, "patient_id": None} for record in cohort(5, 0)]
    dataset = datasets.Dataset.from_list(records, features=FEATURES)
    shuffled = shuffle_volumes(dataset, 0)
    assert isinstance(shuffled, datasets.Dataset) and dict(shuffled.features) == dict(FEATURES)
    assert shuffled["volume"][:] == [record["volume"] for record in shuffle_volumes(records, 0)]


def test_other_names_are_shuffled_between_scans():
    records = [make_record(n, f"/ct/case{n}.nii.gz", scan_id=f"case{n // 2}") for n in range(6)]
    for old, new in zip(records, shuffle_volumes(records), strict=True):
        assert new["volume"] not in {r["volume"] for r in records if r["scan_id"] == old["scan_id"]}


@pytest.mark.parametrize(
    "records", [[], [make_record(1, None)], [make_record(n, "/ct/valid_1_a_1.nii.gz") for n in (1, 2)]]
)
def test_fewer_than_two_patients_are_an_error(records):
    with pytest.raises(ValueError, match="at least two patients"):
        shuffle_volumes(records)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    data: str
    steps: int = 3
    rate: float = 0.1
    tasks: list[str] = field(default_factory=lambda: ["report"])
    flag: bool = True
    name: str | None = "x"


@pytest.fixture
def toy(tmp_path):
    def parse(text: str, *argv: str) -> Toy:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return parse_recipe(Toy, ["--config", str(path), *argv])[0]

    return parse


def test_recipe_then_command_line(toy):
    text = "data: d\nsteps: 5\nrate: 1e-4\ntasks: [a, b]\nflag: false\nname: null\n"
    assert toy(text) == Toy("d", 5, 1e-4, ["a", "b"], False, None)
    argv = ("--steps=-2", "--tasks", "c", "--flag", "true", "--name", "y", "--rate", "7")
    assert toy(text, *argv) == Toy("d", -2, 7.0, ["c"], True, "y")
    assert toy("data: d\ntasks: []\n").tasks == []
    assert toy("", "--data", "d") == Toy("d")
    assert parse_recipe(Toy, ["--data", "d"]) == (Toy("d"),)


@pytest.mark.parametrize(
    "text, argv, message",
    [
        ("data: d\nstep: 5\n", (), r"recipe\.yaml: unknown key 'step'; did you mean 'steps'"),
        ("data: d\n", ("--tsaks", "a"), "command line: unknown key 'tsaks'; did you mean 'tasks'"),
        ("data: d\n", ("--step", "4"), "unknown key 'step'"),
        ("data: d\nqqqq: 1\n", (), "unknown key 'qqqq'; valid keys are data, flag"),
        ("data: d\nsteps: many\n", (), "invalid int value: 'many'"),
        ("steps: 1\n", (), "required: --data"),
        ("data: [a, b]\n", (), "data takes one value"),
        ("- data\n", (), "YAML mapping of flat keys"),
        ("data: a: b\n", (), "can't be read as a YAML recipe"),
        ("data: d\n", ("--steps", "3", "stray"), "unexpected value 'stray'"),
    ],
)
def test_recipe_errors(toy, text, argv, message):
    with pytest.raises(RecipeError, match=message):
        toy(text, *argv)


def test_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file, and no recipe of this name"):
        parse_recipe(Toy, ["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(RecipeError, match="expected (at least )?one argument"):
        parse_recipe(Toy, ["--config"])


def test_recipe_fills_training_arguments_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: d\nlearning_rate: 5e-5\nwarmup_steps: 0.03\noutput_dir: {tmp_path}\nuse_cpu: true\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-6}\n"
    )
    toy, training = parse_recipe((Toy, TrainingArguments), ["--config", str(path), "--seed", "9"])
    assert toy.data == "d"
    assert (training.learning_rate, training.warmup_steps, training.seed) == (5e-5, 0.03, 9)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6}


# ---- the real model, processor and loader ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    model_for(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ct_folder(tmp_path_factory):
    """Three patients of noise in the paper's CSV format, two questions each, and one volume that is cut off."""
    folder = tmp_path_factory.mktemp("ct")
    rng = np.random.default_rng(0)
    lines = ["Question ID,Image,Question,Choice A,Choice B,Choice C,Choice D,Answer Choice,Answer"]
    for patient in (1, 2, 3):
        hu = rng.integers(-1000, 400, (12, 11, 10)).astype(np.int16)
        path = folder / f"valid_{patient}" / f"valid_{patient}_a" / f"valid_{patient}_a_1.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([3.0, 3.0, 4.0, 1.0])), path)
        for question in ("Which finding is present?", "Which finding does this chest CT show?"):
            name = path.relative_to(folder)
            lines.append(
                f"q{len(lines)},{name},{question},emphysema,consolidation,cardiomegaly,lung nodule,b,consolidation"
            )
    (folder / "mcq.csv").write_text("\n".join(lines) + "\n")
    return folder


def eval_argv(saved_model, ct_folder, output, *more):
    argv = [
        "--model",
        str(saved_model),
        "--data",
        str(ct_folder / "mcq.csv"),
        "--output_dir",
        str(output),
        "--device",
        "cpu",
    ]
    return [*argv, "--tasks", "multiple_choice", "--max_new_tokens", "4", "--batch_size", "4", *more]


def test_eval_script(saved_model, ct_folder, tmp_path, capsys):
    """From files to a table; then with shuffled volumes, cached slices, and a batch size of one: the same answers."""
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "own"))
    printed = capsys.readouterr().out
    assert "6 questions" in printed and "| generation | tokens |" in printed and str(tmp_path / "own") in printed
    rows = read_predictions(tmp_path / "own" / "predictions.jsonl")
    assert len(rows) == 6 and all(row["reference"] == "(b) consolidation" for row in rows)
    more = ("--batch_size", "1", "--slice_cache", str(tmp_path / "cache"))
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "one", *more))
    assert read_predictions(tmp_path / "one" / "predictions.jsonl") == rows
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "shuffled", "--shuffle_volumes"))
    shuffled = read_predictions(tmp_path / "shuffled" / "predictions.jsonl")
    assert [row["id"] for row in shuffled] != [] and {r["id"] for r in shuffled} == {r["id"] for r in rows}
    with pytest.raises(ResumeError, match="shuffle_volumes was True and is now False"):
        eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "shuffled"))


def test_eval_script_with_a_volume_that_is_not_there(saved_model, ct_folder, tmp_path):
    csv = ct_folder / "mcq_broken.csv"
    csv.write_text((ct_folder / "mcq.csv").read_text().replace("valid_2_a_1", "valid_4_a_1"))
    argv = eval_argv(saved_model, ct_folder, tmp_path / "skip", "--data", str(csv))
    with pytest.raises(SystemExit, match="valid_4_a_1"):
        eval_script.main(argv)
    eval_script.main([*argv, "--on_error", "skip"])
    failures = (tmp_path / "skip" / "failures.jsonl").read_text().splitlines()
    assert len(failures) == 2 and all("valid_4_a_1" in line for line in failures)
    assert len(read_predictions(tmp_path / "skip" / "predictions.jsonl")) == 4


def test_eval_script_limit_and_bad_arguments(saved_model, ct_folder, tmp_path):
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "two", "--limit", "2"))
    assert len(read_predictions(tmp_path / "two" / "predictions.jsonl")) == 2
    for more, message in (
        (["--limt", "2"], "did you mean 'limit'"),
        (["--tasks", "poem"], "poem"),
        (["--limit", "0"], "limit"),
    ):
        with pytest.raises(SystemExit, match=message):
            eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "bad", *more))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--finding_names", "Gout"], "Unknown findings"),
        (["--labeller", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--bertscore_model", "some/model"], "no layer on record"),
        (["--bertscore_model", "no/such/folder", "--bertscore_layers", "3"], "no/such/folder"),
        (["--radeval", "bleu"], "radeval names"),
        (["--resamples", "-1"], "resamples is -1"),
        (["--metadata", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--judge_ranges", "4"], "judge_ranges is 4"),
        (["--judge_workers", "0"], "judge_workers is 0"),
        (["--judge_endpoint", "localhost", "--judge_model", "m"], "expected an address"),
        (["--temperature", "0.5"], "no meaning without do_sample"),
    ],
)
def test_options_are_checked_before_the_first_answer(more, message, saved_model, ct_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "build_model", lambda args: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match=message):
        eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_volume_memo_reads_a_volume_once(ct_folder):
    processor = tiny_processor().image_processor
    paths = sorted(ct_folder.rglob("*.nii.gz"))
    memo = VolumeMemo(processor, capacity=2)
    first = memo.get(str(paths[0]))
    assert memo.get(str(paths[0])) is first
    second = memo.get(str(paths[1]))
    memo.get(str(paths[0]))
    memo.get(str(paths[2]))
    assert memo.get(str(paths[0])) is first, "the one used last stays"
    assert memo.get(str(paths[1])) is not second, "the one used longest ago went"
    raw = memo.get(VolumeRef(str(paths[0]), (1.0, -8192.0)))
    assert not all(np.array_equal(raw[name], first[name]) for name in raw)


def test_each_process_takes_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_read_ahead_gives_what_the_store_gives_and_raises_for_whom_it_fails(ct_folder):
    class Counting:
        def __init__(self):
            self.asked = []

        def get(self, volume):
            self.asked.append(volume.path)
            if "broken" in volume.path:
                raise ValueError(f"{volume.path}: truncated")
            return {"volume": volume}

    store = Counting()
    ahead = ReadAhead(store)
    records = [{"volume": name, "rescale": [1.0, -2.0]} for name in ("a", "b", "a", "broken")] + [{"volume": None}]
    ahead.start(records)
    a, b, broken = (VolumeRef(name, (1.0, -2.0)) for name in ("a", "b", "broken"))
    assert ahead.get(b) == {"volume": b}
    with pytest.raises(ValueError, match="broken: truncated"):
        ahead.get(broken)
    assert ahead.get(a) == {"volume": a} and ahead.get("c") == {"volume": VolumeRef("c")}
    ahead.close()
    assert sorted(store.asked) == ["a", "b", "broken", "c"], "each once"


def test_a_volume_is_encoded_once_and_by_itself(ct_folder):
    """What the model makes of pixels in a batch of three it makes of the embeddings too."""
    processor = tiny_processor()
    model = model_for(processor)
    store = VolumeMemo(processor.image_processor, capacity=3)
    encoded = EncodedVolumes(model, processor.image_processor, store, capacity=3)
    paths = [str(path) for path in sorted(ct_folder.rglob("*.nii.gz"))]
    batch = processor.image_processor([store.get(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**batch, return_dict=True).last_hidden_state.numpy()
    for path, embeddings in zip(paths, expected, strict=True):
        found = encoded.get(path)
        np.testing.assert_allclose(found["slice_embeddings"], embeddings, rtol=1e-4, atol=1e-5)
        assert encoded.get(path) is found


# ---- the likelihood of options ---------------------------------------------------------------------------------------


def choice_records(ct_folder) -> list[dict]:
    options = {"tasks": ["multiple_choice"], "on_missing": "raise"}
    return list(load_records(str(ct_folder / "mcq.csv"), "valid", **options))


@pytest.mark.parametrize("num_image_tokens", [IMAGE_TOKENS, None])
def test_likelihoods_are_those_of_the_training_loss(ct_folder, num_image_tokens):
    """Of every option alone: loss times tokens, with pixels instead of embeddings and without padding."""
    processor = tiny_processor(num_image_tokens)
    model = model_for(processor)
    records = choice_records(ct_folder)[:2]
    store = VolumeMemo(processor.image_processor, capacity=3)
    encoded = EncodedVolumes(model, processor.image_processor, store, capacity=3)
    chunks = OptionCollator(SamfCollator(processor, volume_store=encoded), rows=3)(records)
    found = [pair for chunk in chunks for pair in answer_log_likelihoods(model, chunk)]
    assert [len(chunk["input_ids"]) for chunk in chunks] == [3, 3, 2]
    alone = SamfCollator(processor, volume_store=store)
    for row, (log_likelihood, tokens) in zip(option_rows(records), found, strict=True):
        batch = alone([row])
        with torch.no_grad():
            loss = model(**batch).loss.item()
        assert tokens == int((batch["labels"] != -100).sum())
        assert log_likelihood == pytest.approx(-loss * tokens, rel=1e-4)


def test_the_fused_vector_is_the_prompts_whatever_the_option(ct_folder):
    """With the answer's tokens changed, no logit up to the first changed one moves."""
    processor = tiny_processor()
    model = model_for(processor)
    rows = option_rows(choice_records(ct_folder)[:1])
    store = VolumeMemo(processor.image_processor, capacity=3)
    batch = SamfCollator(processor, volume_store=store)([rows[0], {**rows[0], "answer": "(a) xyz xyz"}])
    start = int((batch["labels"][0] != -100).nonzero()[0])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits[:, :start]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no prompt_mask"):
        answer_log_likelihoods(model, {"input_ids": batch["input_ids"], "labels": labels})


def test_options_that_are_no_choice():
    with pytest.raises(ValueError, match="has 1 choices"):
        option_rows([{"id": "x", "choices": ["a"]}])
    with pytest.raises(ValueError, match="has 0 choices"):
        option_rows([{"id": "x", "choices": None}])


def test_eval_script_by_likelihood_and_with_rotated_options(saved_model, ct_folder, tmp_path, capsys):
    more = ("--mcq", "likelihood", "--permute_options", "true")
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "likelihood", *more))
    out = capsys.readouterr().out
    assert "6 questions in every rotation" in out and "Letters named" in out
    rows = read_predictions(tmp_path / "likelihood" / "predictions.jsonl")
    for row in rows:
        best = max(range(4), key=row["option_log_likelihoods"].__getitem__)
        assert row["prediction"] == f"({'abcd'[best]}) {row['choices'][best]}" and len(row["option_tokens"]) == 4
    results = json.loads((tmp_path / "likelihood" / "results.json").read_text())
    assert results["tasks"]["multiple_choice"]["multiple_choice"]["unparsed"] == 0
    assert results["position_bias"]["questions"] == 6 and results["generation"]["written"] == 6
    assert len(read_predictions(tmp_path / "likelihood" / "rotated" / "predictions.jsonl")) == 24
    with pytest.raises(ResumeError, match="mcq was 'likelihood' and is now 'generate'"):
        eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "likelihood"))


def test_eval_script_in_bfloat16(saved_model, ct_folder, tmp_path):
    more = ("--dtype", "bfloat16", "--mcq", "likelihood", "--limit", "3")
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "half", *more))
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "full", *more[2:]))
    half, full = (
        np.array([row["option_log_likelihoods"] for row in read_predictions(tmp_path / name / "predictions.jsonl")])
        for name in ("half", "full")
    )
    assert not np.array_equal(half, full)
    np.testing.assert_allclose(half, full, rtol=0.05)


def test_eval_script_with_a_judge(saved_model, ct_folder, tmp_path, capsys, monkeypatch):
    asked = []

    class StandIn:
        identity, workers = {"model": "judge-1"}, 2

        def __call__(self, messages):
            asked.append(messages)
            return "Score: 0.5"

    monkeypatch.setattr(eval_script, "build_judge", lambda **options: StandIn())
    more = ("--judge_endpoint", "http://localhost:1", "--judge_model", "judge-1", "--limit", "2")
    # An answer of an untrained model may be empty: then the judge isn't asked.
    eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "judged", *more))
    scores = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert {score["status"] for score in scores["scores"]} <= {"scored", "empty"} and len(scores["scores"]) == 2
    assert "Judge, multiple_choice" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="go together"):
        eval_script.main(eval_argv(saved_model, ct_folder, tmp_path / "other", "--judge_model", "judge-1"))


# ---- several processes, and kills ------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_every_batch_is_one_processs(records, count, batch_size):
    batches = make_batches(records, batch_size)
    shares = [share_batches(batches, rank, count) for rank in range(count)]
    assert sorted(number for share in shares for number in share) == list(range(len(batches)))
    for task in {record["task"] for record in records}:
        sizes = [sum(batches[number][0]["task"] == task for number in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_several_processes_make_the_file_of_one(records, tmp_path, monkeypatch, count):
    """One rank after the other, the first one last, as it merges; with a failure in one of them, and uneven shares."""
    records[4]["volume"] = "/ct/valid_9_broken.nii.gz"
    run(tmp_path / "one", records, on_error="skip")

    class Rank:
        def __init__(self):
            self.rank, self.count, self.is_first = rank, count, rank == 0

        def wait(self):
            pass

        main_process_first = contextlib.nullcontext

    monkeypatch.setattr(generation, "Processes", Rank)
    folder = AnswerFolder(tmp_path / "several", records)
    for rank in [*range(1, count), 0]:
        if rank == 1:
            folder.prepare(settings_of(tmp_path / "one"))
        elif rank == 0:
            monkeypatch.setattr(AnswerFolder, "prepare", lambda self, settings: None)
        summary = run(tmp_path / "several", records, on_error="skip")
    for name in ("predictions.jsonl", "failures.jsonl", "predictions.settings.json"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert summary.written == 13 and summary.processes == count and len(summary.failures) == 1
    assert sum(t["answers"] for t in summary.tasks.values()) == 13
    assert not list((tmp_path / "several").glob("*.part*"))


def settings_of(folder) -> dict:
    settings = json.loads((folder / "predictions.settings.json").read_text())
    del settings["records"]
    return settings


@pytest.mark.parametrize("torn", [b"", b'{"id": "val', b'{"id": "\xe4', b"\x00\x00\x00"])
def test_parts_of_a_killed_run_are_merged_without_what_is_torn(records, tmp_path, torn):
    run(tmp_path / "whole", records)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    run(tmp_path / "cut", records)
    (tmp_path / "cut" / "predictions.jsonl").unlink()
    (tmp_path / "cut" / "predictions.part0.jsonl").write_bytes(b"".join(lines[:3]) + torn)
    (tmp_path / "cut" / "predictions.part3.jsonl").write_bytes(b"".join(lines[9:12]) + lines[2])
    summary = run(tmp_path / "cut", records)
    assert (tmp_path / "cut" / "predictions.jsonl").read_bytes() == whole
    assert summary.resumed == 6 and summary.written == 8


def test_drawn_answers_are_those_of_the_seed(ct_folder):
    """Three times the same, whatever was drawn before; another seed draws others."""
    processor = tiny_processor()
    model = model_for(processor)
    records = choice_records(ct_folder)

    def answers(folder, seed):
        settings = GenerationSettings(batch_size=4, max_new_tokens=6, do_sample=True, temperature=1.5, seed=seed)
        generate_predictions(model, processor, records, folder, settings)
        return (folder / "predictions.jsonl").read_bytes()

    with tempfile.TemporaryDirectory() as folder:
        first = answers(Path(folder) / "a", 1)
        torch.rand(5)
        assert answers(Path(folder) / "b", 1) == first != answers(Path(folder) / "c", 2)
        kept = first.splitlines(keepends=True)[:2]
        (Path(folder) / "a" / "predictions.jsonl").write_bytes(b"".join(kept))
        assert answers(Path(folder) / "a", 1) == first, "resumed after two answers"


def test_what_a_run_took_is_reported(records, tmp_path):
    summary = run(tmp_path, records)
    tasks = summary.tasks
    assert tasks["report"]["answers"] == 3 and tasks["multiple_choice"]["tokens"] == 11 * 12
    assert tasks["report"]["seconds_per_volume"] > 0 and tasks["report"]["tokens_mean"] == 12
    lines = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert sum(line["answers"] for line in lines) == 14 and sum(line["volumes"] for line in lines) == 6
    again = run(tmp_path, records)
    assert again.written == 0 and again.tasks == tasks, "what was measured is kept when a run is resumed"


def torchrun(count: int, *command: str, **options) -> subprocess.CompletedProcess | subprocess.Popen:
    """`command` under torchrun with gloo, one thread a process; `start=True` doesn't wait for it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *command]
    # This checkout before an installed one, and this folder for what the other processes import from this file.
    places = os.pathsep.join(map(str, [Path(__file__).parent, Path(__file__).parents[1], REPOSITORY.parent]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    if options.pop("start", False):
        return subprocess.Popen(launcher, env=environment, start_new_session=True, **options)
    return subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=200, **options)


@pytest.mark.slow
def test_two_processes_under_torchrun_give_the_file_of_one(saved_model, ct_folder, tmp_path):
    argv = eval_argv(saved_model, ct_folder, tmp_path / "two", "--batch_size", "1", "--mcq", "likelihood")
    done = torchrun(2, str(REPOSITORY / "eval.py"), *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("6 questions") == 1, "the first process alone reports"
    with one_thread():
        argv[argv.index("--output_dir") + 1] = str(tmp_path / "one")
        eval_script.main(argv)
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    assert json.loads((two / "results.json").read_text())["generation"]["processes"] == 2
    assert not list(two.glob("*.part*"))


@contextlib.contextmanager
def one_thread():
    """As torchrun's processes have it: the same sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SLOW_RUN = """
import sys, time
import torch
from test_eval import ByteCollator, ByteProcessor, EchoModel, GenerationSettings, generate_predictions, many_records
from samf.utils.distributed import join_processes, leave_processes

class Slow(EchoModel):
    def generate(self, **inputs):
        time.sleep(float(sys.argv[2]))
        return super().generate(**inputs)

join_processes()
settings = GenerationSettings(batch_size=2, max_new_tokens=20)
summary = generate_predictions(Slow(), ByteProcessor(), many_records(), sys.argv[1], settings, collator=ByteCollator())
leave_processes()
"""


def many_records() -> list[dict]:
    volumes = [f"/ct/valid_{patient}_a_1.nii.gz" for patient in range(1, 14)]
    return [make_record(n, volumes[n * 5 % 13]) for n in range(45)]


def test_two_processes_killed_on_the_way_and_resumed_by_one(tmp_path):
    """SIGKILL to both while they write; what one process then makes of the rest is the file of an unbroken run."""
    script, folder = tmp_path / "slow_run.py", tmp_path / "killed"
    script.write_text(SLOW_RUN, encoding="utf-8")
    with (tmp_path / "log").open("w") as log:
        running = torchrun(2, str(script), str(folder), "0.1", start=True, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while sum(path.stat().st_size > 0 for path in folder.glob("predictions.part*.jsonl")) < 2:
                assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            kill_ranks(script)
        running.wait()
    parts = sum(path.read_bytes().count(b"\n") for path in folder.glob("predictions.part*.jsonl"))
    assert 2 <= parts < 45 and not (folder / "predictions.jsonl").exists()
    settings = GenerationSettings(batch_size=2, max_new_tokens=20)
    summary = run(folder, many_records(), settings)
    run(tmp_path / "whole", many_records(), settings)
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert summary.resumed == parts and summary.written == 45 - parts


def kill_ranks(script: Path) -> None:
    """torchrun starts its ranks in sessions of their own: find those that run `script` and wait for their end."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(script).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
