"""A Trainer of one linear layer on a few numbers, for tests of what all stages share; also runs under torchrun.

toy_training.py OUTPUT_DIR KIND      # KIND: the failure on the last process, see `Numbers`
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from samf.training.trainer_base import StoppableTrainer, train_to_end


class Toy(nn.Module):
    """x·w; the loss is the mean of √(factor·(x·w)²), whose gradient isn't finite where `factor` is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x).square() * factor[:, None]).sqrt().mean()}


class Numbers(Dataset):
    """Rows 0, 1, …; row `bad` has no finite loss ("nan"), no finite gradient ("gradient"), or can't be read ("data")."""

    def __init__(self, kind: str = "", bad: int = -1, count: int = 24):
        self.kind, self.bad, self.count = kind, bad, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        is_bad = index == self.bad
        if is_bad and self.kind == "data":
            raise OSError(f"row {index} is on a disk that went away")
        factor = {"nan": torch.nan, "gradient": 0.0}.get(self.kind, 1.0) if is_bad else 1.0
        return {"x": torch.tensor([1.0, index / 10, 2.0]), "factor": torch.tensor(factor)}


class Orderly(StoppableTrainer):
    """Trains on the rows in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def toy(folder: Path, kind: str = "", bad: int = -1, **options: Any) -> Orderly:
    """Return a trainer of two rows per step: step n has rows 2n - 2 and 2n - 1, on two processes one each."""
    torch.manual_seed(0)
    settings = {"output_dir": str(folder), "max_steps": 6, "save_steps": 2, "logging_steps": 100, "report_to": "none"}
    settings |= {"per_device_train_batch_size": 2, "use_cpu": True, "learning_rate": 1e-2, "seed": 1, **options}
    evaluation = Numbers("data", 3, 8) if kind == "eval" else Numbers(count=8)
    if kind == "eval":
        settings |= {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 100}
    data = Numbers("" if kind == "eval" else kind, bad)
    return Orderly(model=Toy(), args=TrainingArguments(**settings), train_dataset=data, eval_dataset=evaluation)


if __name__ == "__main__":
    # Row 9 is the second row of step 5, which the last process has.
    options = {"per_device_train_batch_size": 2 // int(os.environ.get("WORLD_SIZE", "1"))}
    options["dataloader_num_workers"] = int(os.environ.get("WORKERS", "0"))
    train_to_end(toy(Path(sys.argv[1]), sys.argv[2], bad=9, **options))
