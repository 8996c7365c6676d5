"""Runs of train.py on a few phantoms of coarse voxels with a tiny model, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import TEXTS, tiny_config
from transformers import Phi3Config, Phi3ForCausalLM, ViTConfig, ViTModel

from samf import SamfForConditionalGeneration, SamfImageProcessor, train
from samf.phantoms.dataset import PhantomSettings, write_dataset
from samf.phantoms.tokenizer import train_small_tokenizer


def prepare(folder: Path, train_patients: int = 6) -> Path:
    """Write phantoms with 10 mm voxels and the components of a tiny model, and return their folder."""
    write_dataset(
        folder / "phantoms",
        train_patients=train_patients,
        valid_patients=3,
        settings=PhantomSettings(voxel_mm=10.0),
        text_questions=12,
        workers=1,
        progress=False,
    )
    config = tiny_config()
    torch.manual_seed(0)
    ViTModel(ViTConfig(**config.vision_config.to_dict())).save_pretrained(folder / "encoder")
    SamfImageProcessor(slices_per_plane=2, size=32).save_pretrained(folder / "encoder")
    tokenizer = train_small_tokenizer(TEXTS, 400)
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, tied in (("text", False), ("tied_text", True)):
        config_of_text = Phi3Config(**{**config.text_config.to_dict(), **ids, "tie_word_embeddings": tied})
        Phi3ForCausalLM(config_of_text).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def options_of(work: Path, output: str, **options: Any) -> dict[str, Any]:
    """Return the arguments of train.py as a mapping from keys to values or lists."""
    settings = {
        "slice_encoder": work / "encoder",
        "text_model": work / "text",
        "data": work / "phantoms",
        "output_dir": work / output,
        "num_image_tokens": 4,
        "volume_dim": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    if "model" in settings:
        settings = {key: value for key, value in settings.items() if key not in ("slice_encoder", "text_model")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def train_here(work: Path, output: str, **options: Any) -> None:
    """Run train.py in this process."""
    arguments = []
    for key, value in options_of(work, output, **options).items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        arguments += [f"--{key}", *map(str, values)]
    train.main(arguments)


def run(work: Path, output: str, **options: Any) -> SamfForConditionalGeneration:
    """Run train.py in this process and return the model that it saved."""
    train_here(work, output, **options)
    return SamfForConditionalGeneration.from_pretrained(work / output)


def history(folder: Path) -> list[dict[str, float]]:
    """Return the log of a run."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
