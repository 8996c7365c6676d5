"""Sample reports with their slices in the experiment trackers of Trainer's callbacks: TensorBoard, W&B and trackio."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_STEP = "train/global_step"  # the key under which Trainer's callbacks log the step
_TENSORBOARD_FOLDER = "_boards"  # Trainer doesn't push names that begin with an underscore


def keep_trackers_private(output_dir: str) -> None:
    """Direct TensorBoard's files, which will show patients' slices, to a folder that Trainer doesn't push.

    A folder that the user has set by TENSORBOARD_LOGGING_DIR stays.
    """
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output_dir, _TENSORBOARD_FOLDER)))


def show_sample(
    callbacks: Sequence[TrainerCallback], step: int, name: str, text: str, image: Path | None = None
) -> None:
    """Log a text and an image of slices to every tracker among a Trainer's callbacks.

    Args:
        callbacks: Of the Trainer.
        step: Optimizer steps so far.
        name: Of the sample, e.g. "report_1".
        text: Markdown.
        image: Path of a PNG; None = no image.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            _show_in_tensorboard(callback.tb_writer, step, name, text, image)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            # As HTML: a text that looks like a tag, "<8 mm", must stay readable.
            shown = callback._wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')
            _log(callback._wandb, step, name, shown, image)
        elif isinstance(callback, TrackioCallback) and callback._trackio is not None:
            _log(callback._trackio, step, name, callback._trackio.Markdown(text), image)


def _log(tracker: Any, step: int, name: str, text: Any, image: Path | None) -> None:
    """Log to W&B or trackio as Trainer's callbacks do: the step is a logged value, because trackers count their own calls."""
    images = {f"samples/{name}_slices": tracker.Image(str(image))} if image else {}
    tracker.log({f"samples/{name}": text, **images, _STEP: step})


def _show_in_tensorboard(writer: "SummaryWriter", step: int, name: str, text: str, image: Path | None) -> None:
    writer.add_text(f"samples/{name}", text, step)
    if image is not None:
        pixels = np.asarray(Image.open(image).convert("RGB"))  # (H, W, 3)
        writer.add_image(f"samples/{name}_slices", pixels, step, dataformats="HWC")
