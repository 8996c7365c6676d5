"""A report and its slices on the boards that Trainer logs to: TensorBoard, W&B and trackio."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

STEP = "train/global_step"  # what Trainer's callbacks call it


def keep_trackers_private(output_dir: str) -> None:
    """Have TensorBoard's files go where Trainer doesn't push them, if no folder is named: they will show patients' slices."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output_dir, "_boards")))


def show_sample(
    callbacks: Sequence[TrainerCallback], step: int, name: str, text: str, picture: Path | None = None
) -> None:
    """Put a text (Markdown) and a picture of slices on every board among a Trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            _show_on_tensorboard(callback.tb_writer, step, name, text, picture)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            wandb = callback._wandb
            shown = {name: wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')}
            _log(wandb, step, shown | ({f"{name}_slices": wandb.Image(str(picture))} if picture else {}))
        elif isinstance(callback, TrackioCallback) and callback._trackio is not None:
            trackio = callback._trackio
            shown = {name: trackio.Markdown(text)}
            _log(trackio, step, shown | ({f"{name}_slices": trackio.Image(str(picture))} if picture else {}))


def _log(board: Any, step: int, shown: dict[str, Any]) -> None:
    """As Trainer's own callbacks log: the step is a value beside the others, for a board counts its own calls."""
    board.log({f"samples/{name}": value for name, value in shown.items()} | {STEP: step})


def _show_on_tensorboard(writer: Any, step: int, name: str, text: str, picture: Path | None) -> None:
    writer.add_text(f"samples/{name}", text, step)
    if picture is not None:
        pixels = np.asarray(Image.open(picture).convert("RGB"))  # (H, W, 3)
        writer.add_image(f"samples/{name}_slices", pixels, step, dataformats="HWC")
