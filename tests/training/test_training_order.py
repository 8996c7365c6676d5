"""The order of records, learning rates by part, and resuming of finished and interrupted runs."""

import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from small_run import history, prepare, train_here
from tiny import tiny_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samf.data.mixture import TaskMixture
from samf.training import trainer as trainer_module
from samf.training.interruption import Interruption
from samf.training.param_groups import PARTS, learning_rates, part_of, split_by_part
from samf.training.sampling import RecordOrder, group_by_length


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("order"))


def test_the_random_order_is_the_librarys_own():
    """Otherwise published results would change."""
    library = SeedableRandomSampler(range(37), data_seed=5)
    order = RecordOrder(37, seed=5)
    for epoch in range(3):
        library.set_epoch(epoch)
        order.epoch = epoch
        assert list(order) == list(library)


def test_batches_hold_records_of_like_length_in_any_order():
    lengths = np.random.default_rng(0).integers(10, 500, 1003).tolist()
    order = RecordOrder(1003, seed=1, lengths=lengths, batch_size=8)
    found = list(order)
    assert sorted(found) == list(range(1003))
    assert found == list(order)  # by seed and epoch alone
    batches = [[lengths[index] for index in found[start : start + 8]] for start in range(0, 1003, 8)]
    padding = [max(batch) * len(batch) - sum(batch) for batch in batches[:-1]]
    assert sum(padding) < 0.05 * sum(lengths)
    assert max(batches[0]) == max(lengths)
    tops = np.array([max(batch) for batch in batches[:-1]])
    assert abs(np.corrcoef(np.arange(len(tops)), tops)[0, 1]) < 0.3  # neither rising nor falling
    order.epoch = 1
    assert list(order) != found


def test_sorted_steps_have_what_they_have_at_random_and_less_padding():
    lengths = np.random.default_rng(0).integers(10, 500, 203).tolist()
    random, order = RecordOrder(203, 1), RecordOrder(203, 1, lengths, batch_size=16, within_steps=True)
    for epoch in range(2):
        random.epoch = order.epoch = epoch
        for start in range(0, 203, 16):
            step = list(order)[start : start + 16]
            assert sorted(step) == sorted(list(random)[start : start + 16])
            tokens = [lengths[index] for index in step]
            assert tokens == sorted(tokens, reverse=True)


def test_sorted_steps_train_alike(work):
    """A step sums the gradients of its micro-batches: their order changes only the rounding."""
    options = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, sort in (("random", False), ("sorted", True)):
        train_here(work, name, **options, aggregator_dropout=0.0, sort_steps=sort)
    random, ordered = ([row for row in history(work / name) if "loss" in row] for name in ("random", "sorted"))
    assert [row["loss"] for row in random] == pytest.approx([row["loss"] for row in ordered], abs=1e-4)
    assert len(random) == 4
    assert sum(row["padding"] for row in ordered) < sum(row["padding"] for row in random)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sorted_steps_are_those_of_a_random_order(work, strategy):
    with pytest.raises(ValueError, match=f"train_sampling_strategy is {strategy}"):
        train_here(work, "both", sort_steps=True, train_sampling_strategy=strategy)


def test_fewer_records_than_a_batch_are_all_there():
    assert sorted(group_by_length([2, 0, 1], [5, 6, 7], 8, torch.Generator())) == [0, 1, 2]


def test_a_mixture_decides_what_an_epoch_has():
    records = datasets.Dataset.from_dict({"task": ["report"] * 4 + ["multiple_choice"] * 20})
    order = RecordOrder(24, seed=0, mixture=TaskMixture(records, {"report": 1, "multiple_choice": 1}, seed=0))
    seen = []
    for epoch in range(5):
        order.epoch = epoch
        rows = list(order)
        assert len(rows) == len(order) == 8 and {0, 1, 2, 3} < set(rows)
        seen += [row for row in rows if row > 3]
    assert sorted(seen) == list(range(4, 24))  # five epochs ask every question once


def test_each_part_has_its_own_rate_and_keeps_its_decay():
    model = tiny_model(finding_names=["a"])
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    split_by_part(optimizer, model, {"fusion": 1e-4, "language_model": 2e-4})
    rates = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    expected = {"fusion": 1e-4, "language_model": 2e-4}
    for name, weight in model.named_parameters():
        assert rates[id(weight)] == (expected.get(part_of(name), 1e-3), 0.1 if weight.ndim > 1 else 0.0), name
    assert learning_rates(optimizer) == {part: expected.get(part, 1e-3) for part in PARTS}


def test_rates_follow_the_schedule_and_are_logged(work):
    rates = {"fusion": 1e-3, "language_model": 4e-3}
    options = {"max_steps": 4, "logging_steps": 1, "lr_scheduler_type": "linear", "optim": "sgd", "weight_decay": 0.1}
    train_here(work, "rates", **options, learning_rates=rates)
    rows = [row for row in history(work / "rates") if "loss" in row]
    for step, row in enumerate(rows):  # a line has the rates that its step was made with, as Trainer's own has
        assert row["learning_rate_fusion"] == pytest.approx(1e-3 * (1 - step / 4))
        assert row["learning_rate_language_model"] == pytest.approx(4e-3 * (1 - step / 4))
        assert row["learning_rate_aggregator"] == pytest.approx(1e-2 * (1 - step / 4))
        assert any(
            row["learning_rate"] == pytest.approx(row[f"learning_rate_{part}"]) for part in ("aggregator", *rates)
        )


def test_a_finished_run_that_goes_on_has_nothing_to_do(work):
    """Within an epoch the library would take one more step after the last."""
    options = {"max_steps": 3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    train_here(work, "finished", **options)
    before = (work / "finished" / "model.safetensors").read_bytes()
    train_here(work, "finished", **options, resume_from_checkpoint="last")
    assert (work / "finished" / "model.safetensors").read_bytes() == before
    assert [row["step"] for row in history(work / "finished") if "loss" in row] == [1, 2, 3]


def test_no_evaluation_stands_between_a_signal_and_its_checkpoint(tmp_path):
    interruption, control = Interruption(), TrainerControl(should_evaluate=True)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    interruption.on_step_end(arguments, TrainerState(), control)
    assert control == TrainerControl(should_evaluate=True)
    interruption.signal = signal.SIGTERM
    interruption.on_step_end(arguments, TrainerState(), control)
    assert control == TrainerControl(should_save=True, should_training_stop=True)


class Stop(TrainerCallback):
    """The signal comes within the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_leaves_a_checkpoint_and_goes_on(work, monkeypatch):
    options = {"max_steps": 4, "logging_steps": 1, "lora_rank": 2}
    train_here(work, "unbroken", **options)
    make = trainer_module.SamfTrainer.__init__

    def stopping(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Stop())

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.SamfTrainer, "__init__", stopping)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            train_here(work, "interrupted", **options)
    assert (work / "interrupted" / "checkpoint-2" / "trainer_state.json").is_file()
    train_here(work, "interrupted", **options, resume_from_checkpoint="last")
    losses = [[row["loss"] for row in history(work / name) if "loss" in row] for name in ("unbroken", "interrupted")]
    assert losses[0] == losses[1]
