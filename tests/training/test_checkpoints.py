"""Damaged checkpoints are found before they are loaded, and a run resumes from the newest whole one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from toy_training import toy
from transformers import TrainingArguments

from samf.training import checkpoints
from samf.training.checkpoint_damage import find_damage
from samf.training.checkpoints import CheckpointError, checkpoint_to_resume, last_checkpoint
from samf.training.trainer_base import train_to_end

DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 10]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": Path.unlink,
}
RUN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run of six steps with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    train_to_end(toy(folder))
    return folder


def sharded(folder: Path) -> None:
    """Split the weights into two files, as models of more than 50 GB are saved."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{number + 1:05}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for name, file in names.items():
        save_file({name: weights[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")


def fsdp(folder: Path) -> None:
    """Save shards as accelerate does under FSDP on two processes."""
    weights = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"state": weights}, checkpoint_id=folder / name, no_dist=True)
    numbered(folder)


def deepspeed(folder: Path) -> None:
    """Save states as DeepSpeed's ZeRO-2 does on two processes."""
    states = folder / "global_step6"
    states.mkdir()
    torch.save({"module": torch.ones(3)}, states / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        torch.save({"state": torch.ones(3)}, states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(states.name, encoding="utf-8")
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    numbered(folder)


def numbered(folder: Path) -> None:
    """Give the random generators the names that two processes give them."""
    for rank in (0, 1):
        shutil.copyfile(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()


def plain(folder: Path) -> None:
    """Leave the checkpoint of one process as it is."""


SHARDS = ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp")
STATES = ("mp_rank_00_model_states.pt", *(f"bf16_zero_pp_rank_{k}_mp_rank_00_optim_states.pt" for k in (0, 1)))
FORMS = {
    plain: RUN,
    sharded: ("model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    fsdp: (*SHARDS, "scheduler.pt", "rng_state_1.pth"),
    deepspeed: ("latest", *(f"global_step6/{name}" for name in STATES), "rng_state_0.pth"),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_damaged_file_of_any_kind_is_found_and_named(run, tmp_path, form, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newest, whole = folder / "checkpoint-6", tmp_path / "whole"
    form(newest)
    assert find_damage(newest) is None and last_checkpoint(folder) == str(newest)
    shutil.copytree(newest, whole)
    for name in FORMS[form]:
        for kind, damage in DAMAGES.items():
            # Of the arguments' file nothing is read again; without an index, or DeepSpeed's tag, other weights count.
            if kind == "gone" and name in ("training_args.bin", "latest"):
                continue
            if kind in ("cut", "zeroed") and name == "latest":
                continue
            caplog.clear()
            damage(newest / name)
            assert last_checkpoint(folder) == str(folder / "checkpoint-4"), (name, kind)
            named = Path(name).name.replace("bf16_", "")
            assert "checkpoint-6 isn't whole" in caplog.text and named in caplog.text, (name, kind, caplog.text)
            shutil.rmtree(newest)
            shutil.copytree(whole, newest)


def test_a_run_resumes_from_an_older_checkpoint_as_if_unbroken(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoint-6/optimizer.pt").write_bytes(b"")
    (tmp_path / "run/checkpoint-4/model.safetensors").write_bytes(b"")
    resumed = toy(tmp_path / "run", resume_from_checkpoint="last")
    train_to_end(resumed)
    assert "checkpoint-6 isn't whole (optimizer.pt: 0 bytes)" in caplog.text
    assert "checkpoint-4 isn't whole (model.safetensors: 0 bytes)" in caplog.text
    assert resumed.state.global_step == 6
    expected, found = (load_file(path / "checkpoint-6/model.safetensors") for path in (run, tmp_path / "run"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert find_damage(tmp_path / "run/checkpoint-6") is None  # written again


def arguments(folder: Path, wanted: str, **options) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), resume_from_checkpoint=wanted, use_cpu=True, **options)


def test_without_a_whole_checkpoint_nothing_starts_at_step_0(run, tmp_path):
    assert checkpoint_to_resume(arguments(tmp_path / "new", "last")) is None  # the first start of a job
    shutil.copytree(run, tmp_path / "run")
    for number in (2, 4, 6):
        (tmp_path / f"run/checkpoint-{number}/scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(checkpoint-6: scheduler.pt is missing; check"):
        checkpoint_to_resume(arguments(tmp_path / "run", "last"))
    weights_alone = arguments(tmp_path / "run", "last", save_only_model=True)
    assert checkpoint_to_resume(weights_alone) == str(tmp_path / "run/checkpoint-6")


def test_a_path_to_a_damaged_checkpoint_is_an_error_that_says_what_to_do(run, tmp_path):
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    wanted = str(tmp_path / "checkpoint-4")
    assert checkpoint_to_resume(arguments(run, wanted)) == wanted
    (tmp_path / "checkpoint-4/optimizer.pt").write_bytes(b"")
    message = r"checkpoint-4: isn't a whole checkpoint \(optimizer.pt: 0 bytes\).*--resume_from_checkpoint last"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_to_resume(arguments(run, wanted))
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_to_resume(arguments(run, str(tmp_path / "elsewhere")))


def test_all_processes_resume_from_what_the_first_one_finds(run, monkeypatch):
    """Another process may see the folder differently; what the first one can't read is an error on all."""
    asked = []

    class Second:
        def from_first(self, make: object) -> str:
            asked.append(make)
            return "found by the first"

    monkeypatch.setattr(checkpoints, "Processes", Second)
    assert checkpoint_to_resume(arguments(run, "last")) == "found by the first"
    monkeypatch.setattr(checkpoints, "_choose", lambda wanted, training: (_ for _ in ()).throw(OSError("no disk")))
    with pytest.raises(CheckpointError, match="no disk"):
        asked[0]()


def test_a_file_that_cannot_be_read_just_now_is_not_taken_for_damaged(run, monkeypatch):
    """Otherwise a temporary disk error would let a run resume from an older checkpoint."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("zipfile.ZipFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        last_checkpoint(run)
