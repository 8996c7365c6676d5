"""What training measures: operations, throughput, grounding, entropies, answers; labels by rules; cut answers."""

import importlib
import json
import logging
import random
import sqlite3
import sys
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import history, prepare, train_here
from tiny import tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations import TensorBoardCallback, WandbCallback

from samf import SamfConfig, SamfForConditionalGeneration
from samf.data.loading import load_records
from samf.model.outputs_samf import SamfSliceAttentions
from samf.phantoms.findings import DEMO_FINDINGS
from samf.training import sample_generation as samples
from samf.training.adapter import add_lora
from samf.training.arguments import DataArguments, TuningArguments
from samf.training.datasets import label_findings
from samf.training.factory import apply_liger
from samf.training.flops import StepFlops, Work, known_peak
from samf.training.image_grounding import SliceWeights, relative_entropy, warn_if_not_grounded
from samf.training.param_groups import PARTS, train_parts
from samf.training.random_state import preserved_random_state
from samf.training.sample_generation import score_samples
from samf.training.throughput import TRUNCATED, Throughput, batch_work
from samf.training.trackers import keep_trackers_private, show_sample

VISION = {"model_type": "vit", "image_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"model_type": "phi3", "vocab_size": 99, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 200, "pad_token_id": 1, "eos_token_id": 3, "bos_token_id": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("monitor"))


# Operations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        (list(PARTS), 0),
        (["fusion", "language_model"], 0),
        (list(PARTS), 4),
        (["language_model"], 4),
        (["aggregator"], 0),
    ],
)
@pytest.mark.parametrize("fusion_type", ["samf", "ao2d", "slice_tokens"])
def test_operations_are_those_that_torch_counts(fusion_type, parts, rank):
    vision = {**VISION, "intermediate_size": 128}
    config = SamfConfig(vision, TEXT, fusion_type=fusion_type, image_token_id=5, num_image_tokens=4, volume_dim=32)
    config._attn_implementation = "eager"
    model = SamfForConditionalGeneration._from_config(config, attn_implementation="eager").train()
    train_parts(model, parts)
    if rank:
        model = add_lora(model, TuningArguments(lora_rank=rank, lora_dropout=0.0), parts, "base").train()
    batch = tiny_batch(fusion_type, rows=3, prompt=40, answer=20)
    batch["pixel_values"] = torch.randn(3, 6, 3, 64, 64)
    batch["prompt_mask"] = (batch["labels"] == -100) & (batch["input_ids"] != 5)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    work = Work(*batch_work(batch).tolist())
    assert (work.rows, work.volumes, work.slices, work.pixels) == (3, 3, 18, 18)
    assert StepFlops(model)(work) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_work_of_a_batch_is_counted_by_its_masks():
    batch = tiny_batch("ao2d")
    width = batch["input_ids"].shape[1]
    assert batch_work(batch).dtype == torch.int64  # float64 isn't on every device
    batch["attention_mask"][0, -3:] = 0
    batch["slice_mask"] = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    work = Work(*batch_work(batch).tolist())
    assert (work.rows, work.volumes, work.slices) == (2, 1, 4)
    assert (work.tokens, work.padded) == (2 * width - 3, 2 * width)
    assert work.tokens_squared == width**2 + (width - 3) ** 2
    cached = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert Work(*batch_work({**cached, "slice_embeddings": torch.zeros(2, 6, 32)}).tolist()).pixels == 0


def test_a_gpus_peak_is_known_by_its_name():
    names = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 80GB HBM3": 989.5,
        "Tesla T4": 65.0,
    }
    names |= {"NVIDIA L40S": 362.1, "NVIDIA L4": 121.0, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0, "a new one": None}
    assert {name: known_peak(name) for name in names} == names


# Throughput -----------------------------------------------------------------------------------------------------------


def test_throughput_counts_batches_and_leaves_pauses_out():
    now = [0.0]
    throughput = Throughput(lambda work: 5e12 * work.rows, peak_tflops=10.0, clock=lambda: now[0])
    batch = tiny_batch("ao2d")
    tokens = batch["input_ids"].numel() - 3
    batch["attention_mask"][0, :3] = 0
    throughput.count({**batch, TRUNCATED: torch.tensor([1])})
    now[0] = 1.0
    with throughput.paused(), throughput.paused():
        now[0] = 50.0
    now[0] = 51.0
    report = throughput.report(torch.device("cpu"), lambda tensor: 2 * tensor, processes=2)
    assert report["tokens_per_second"] == pytest.approx(tokens)  # two processes, two seconds
    assert report["volumes_per_second"] == pytest.approx(2)
    assert report["slices_per_second"] == pytest.approx(12)
    assert report["mfu"] == pytest.approx(5e12 * 4 / (2 * 10e12 * 2))
    assert report["truncated_answers"] == 2
    assert report["padding"] == pytest.approx(3 / (tokens + 3))
    assert report["memory_gb"] > 0
    assert throughput.report(torch.device("cpu"), lambda tensor: tensor, 1) == {}


def test_cut_answers_are_counted_across_workers_and_logged(work):
    options = {"max_steps": 2, "logging_steps": 1, "dataloader_num_workers": 2, "tasks": ["report"]}
    train_here(work, "whole_answers", **options)
    train_here(work, "cut_answers", **options, max_length=60)
    rows = [[row for row in history(work / name) if "loss" in row] for name in ("whole_answers", "cut_answers")]
    assert [row["truncated_answers"] for row in rows[0]] == [0, 0]
    counts = [row["truncated_answers"] for row in rows[1]]
    assert 0 < counts[0] <= counts[1] <= 8


# Grounding ------------------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_numpy():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.7, 0.2, 0.1, 0.0]])
    kept = torch.tensor([4, 4, 4, 3])
    plain = [-sum(p * np.log(p) for p in row if p > 0) for row in weights.tolist()]
    expected = [plain[0] / np.log(4), 1.0, 0.0, plain[3] / np.log(3)]
    torch.testing.assert_close(relative_entropy(weights, kept), torch.tensor(expected, dtype=torch.float32))


def test_weights_are_averaged_over_what_counts():
    """A padded slice, a row without a volume and tokens outside the prompt don't count."""
    alpha = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]]])
    gamma = torch.zeros(2, 3, 3)
    gamma[0] = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.9, 0.05, 0.05]])
    masks = {"prompt_mask": torch.tensor([[True, True, False]] * 2)}
    masks["slice_mask"] = torch.tensor([[True, True, False], [False, False, False]])
    weights = SliceWeights("ao2d")
    weights.add(SamfSliceAttentions(alpha=alpha, gamma=gamma), masks)
    report = weights.report(torch.device("cpu"), lambda tensor: tensor)
    assert report == pytest.approx(
        {"alpha_entropy": 1.0, "alpha_largest": 0.5, "gamma_entropy": 0.5, "gamma_largest": 0.75}, abs=1e-6
    )
    assert weights.report(torch.device("cpu"), lambda tensor: tensor) == {}


def test_a_model_that_stays_blind_is_warned_of(caplog):
    def log(*gaps: float) -> list[dict[str, float]]:
        return [row for gap in gaps for row in ({"eval_own_loss": 1.0}, {"eval_gap": gap})]

    with caplog.at_level(logging.WARNING):
        assert not warn_if_not_grounded(log(0.0, 0.001), 0.01, 3)
        assert not warn_if_not_grounded(log(0.0, 0.001, 0.02), 0.01, 3)
        assert not warn_if_not_grounded(log(0.0, 0.0, 0.0, 0.5), 0.01, 3)
        assert not caplog.records
        assert warn_if_not_grounded(log(0.5, 0.009, -0.2, 0.0), 0.01, 3)
    assert "doesn't look at the volumes" in caplog.text


def test_evaluation_logs_gap_entropies_and_a_warning(work, caplog):
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "blind_evaluations": 2, "blind_gap": 10.0}
    with caplog.at_level(logging.WARNING):
        train_here(work, "seeing", **options, valid_limit=6)
    assert "doesn't look at the volumes" in caplog.text
    rows = history(work / "seeing")
    own, shuffled, gaps = (
        [row[f"eval_{name}"] for row in rows if f"eval_{name}" in row] for name in ("own_loss", "shuffled_loss", "gap")
    )
    assert len(gaps) == 2 and gaps == [b - a for a, b in zip(own, shuffled, strict=True)]
    for name in ("alpha", "gamma"):
        values = [row[f"eval_own_{name}_entropy"] for row in rows if f"eval_own_{name}_entropy" in row]
        assert len(values) == 2 and all(0 < value <= 1 for value in values)


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_scored_shown_and_change_nothing(work, monkeypatch):
    """Neither evaluations nor sampled answers change the random numbers of training."""
    answer = samples.generate_predictions

    def drawing(*args, **options):
        torch.manual_seed(99)
        return answer(*args, **options)

    monkeypatch.setattr(samples, "generate_predictions", drawing)
    options = {"max_steps": 4, "logging_steps": 1, "lora_rank": 2}
    evaluating = options | {"eval_strategy": "steps", "eval_steps": 2, "valid_limit": 8}
    train_here(work, "alone", **options)
    train_here(work, "measured", **evaluating)
    train_here(work, "answering", **evaluating, generate_samples=2, generate_tokens=5, shown_samples=1)
    names = ("alone", "measured", "answering")
    losses = [[row["loss"] for row in history(work / name) if "loss" in row] for name in names]
    assert losses[0] == losses[1] == losses[2]  # dropout draws the same numbers
    logged = [row for row in history(work / "answering") if "eval_multiple_choice_accuracy" in row]
    assert len(logged) == 2 and {"eval_report_bleu_1", "eval_report_rouge_l"} <= set(logged[0])
    folder = work / "answering" / "_samples" / "step_0000004"
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["task"] for row in answers) == ["multiple_choice"] * 2 + ["report"] * 2
    assert (folder / "report_1.png").stat().st_size > 1000 and not (folder / "report_2.png").exists()


@pytest.fixture(scope="module")
def trackers(work) -> Path:
    """Return the folder of a run that shows two reports in three trackers: runs/, wandb/ and trackio/."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name)
    folder = work / "trackers"
    options = {"eval_strategy": "steps", "eval_steps": 2, "valid_limit": 8, "generate_samples": 2, "generate_tokens": 5}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}.items():
            patch.setenv(name, str(value))
        for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
            patch.delitem(sys.modules, module)  # it asks for its folder when it is imported
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        train_here(work, "trackers", **options, report_to=("tensorboard", "wandb", "trackio"), run_name="shown")
    return folder


def test_reports_and_slices_go_to_tensorboard(trackers):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(next(trackers.rglob("events.out.tfevents.*")))).Reload().Tags()
    assert {"samples/report_1_slices", "samples/report_2_slices"} <= set(events["images"])
    assert any(tag.startswith("samples/report_1") for tag in events["tensors"])
    assert "eval/gap" in events["scalars"]


def test_reports_and_slices_go_to_wandb(trackers):
    images = sorted(trackers.glob("wandb/offline-run-*/files/media/images/samples/*.png"))
    assert [image.name.split("_slices")[0] for image in images] == ["report_1", "report_2"]
    drawn = trackers / "_samples" / "step_0000002" / "report_1.png"
    assert images[0].read_bytes() == drawn.read_bytes()
    (text,) = trackers.glob("wandb/offline-run-*/files/media/html/samples/report_1_*.html")
    assert "**Reference**" in text.read_text(encoding="utf-8")


def test_reports_and_slices_go_to_trackio(trackers):
    with closing(sqlite3.connect(next((trackers / "trackio").glob("*.db")))) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    shown = [row for row in rows if "samples/report_1" in row]
    assert [row["train/global_step"] for row in shown] == [2]
    assert "**Reference**" in json.dumps(shown[0]["samples/report_1"])
    assert len(list((trackers / "trackio" / "media").rglob("*.png"))) == 2
    assert any("eval/gap" in row for row in rows)


def test_tensorboards_files_are_not_pushed_with_the_reports_in_them(tmp_path, monkeypatch):
    """Trainer pushes its whole output folder except names that begin with an underscore; a folder set by the user stays."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    keep_trackers_private(str(tmp_path))
    assert TensorBoardCallback().logging_dir == "mine"
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    keep_trackers_private(str(tmp_path))
    assert Path(TensorBoardCallback().logging_dir).relative_to(tmp_path).parts[0].startswith("_")


def test_a_tracker_shows_text_as_it_is():
    """An answer may have text that HTML would take for a tag."""
    tracker = types.SimpleNamespace(Html=str, Image=str, log=lambda row: shown.append(row))
    callback, shown = WandbCallback.__new__(WandbCallback), []
    callback._wandb = tracker
    show_sample([callback], 3, "report_1", "nodule <8 mm & >4 mm")
    assert shown[0].keys() == {"samples/report_1", "train/global_step"}
    assert "nodule &lt;8 mm &amp; &gt;4 mm" in shown[0]["samples/report_1"]


def test_scores_of_answers_are_by_task():
    rows = [
        {"task": "report", "prediction": "the heart is normal", "reference": "the heart is normal", "choices": None},
        {"task": "multiple_choice", "prediction": "(b) y", "reference": "(b) y", "choices": ["x", "y"]},
        {"task": "multiple_choice", "prediction": "(a) x", "reference": "(b) y", "choices": ["x", "y"]},
    ]
    scores = score_samples(rows)
    assert scores["report_bleu_4"] == scores["report_rouge_l"] == 1.0
    assert scores["multiple_choice_accuracy"] == 0.5


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def seed(number: int) -> None:
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)

    def draw() -> list[float]:
        return [torch.rand(1).item(), np.random.rand(), random.random()]

    seed(0)
    expected = draw()
    seed(0)
    with preserved_random_state():
        seed(9)
    assert draw() == expected


# Labels ---------------------------------------------------------------------------------------------------------------


def test_labels_come_from_reports_where_there_is_no_file(work, tmp_path, caplog):
    """Phantom reports name their findings explicitly, so the rules must find what the label file says."""
    (tmp_path / "dataset").mkdir()
    for folder in (work / "phantoms" / "dataset").iterdir():
        if folder.name != "multi_abnormality_labels":
            (tmp_path / "dataset" / folder.name).symlink_to(folder)
    options = {"tasks": ("report", "multiple_choice"), "finding_names": DEMO_FINDINGS}
    records = load_records(work / "phantoms", "train", **options)
    same = label_findings(records, DataArguments(data=str(work / "phantoms")), "train", DEMO_FINDINGS)
    assert same is records
    with caplog.at_level(logging.WARNING):
        read = label_findings(
            records, DataArguments(data=str(work / "phantoms"), finding_labels="rules"), "train", DEMO_FINDINGS
        )
    assert "labelled by rules" in caplog.text
    assert read["finding_labels"] == records["finding_labels"]
    assert any(map(any, read["finding_labels"]))
    unlabelled = load_records(tmp_path, "train", **options)
    again = label_findings(unlabelled, DataArguments(data=str(tmp_path)), "train", DEMO_FINDINGS)
    assert again["finding_labels"] == records["finding_labels"] != unlabelled["finding_labels"]
    with pytest.raises(ValueError, match="the rules can't read"):
        label_findings(records, DataArguments(finding_labels="rules"), "train", ["Fracture"])


def test_liger_is_an_error_where_it_cannot_work(work):
    with pytest.raises((ImportError, ValueError), match="pip install liger-kernel|Liger has no kernels"):
        train_here(work, "never", use_liger_kernel=True)


def test_ligers_kernels_go_to_the_language_model_alone(monkeypatch):
    """Only the arguments of the call matter, so a stand-in for the library will do."""
    calls = []
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **options: calls.append(options)
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"phi3": None}
    for name, module in (("liger_kernel", types.ModuleType("liger_kernel")), ("liger_kernel.transformers", package)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    model = tiny_model()
    apply_liger(model)
    assert calls == [{"model": model.model.language_model, "fused_linear_cross_entropy": False, "cross_entropy": False}]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    with pytest.raises(ValueError, match="no kernels for a language model of type 'phi3'; it has some for llama"):
        apply_liger(model)
