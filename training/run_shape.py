"""Records per step and number of processes of a run, saved in its checkpoints and compared when it resumes."""

import json
import logging
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from samf.data.schema import JsonObject

logger = logging.getLogger(__name__)


class RunShape(TrainerCallback, ExportableState):
    """A callback that adds the run's shape to every checkpoint's trainer_state.json.

    Args:
        records_per_step: Records of one optimizer step, over all processes and accumulated batches.
        processes: Number of processes.
    """

    def __init__(self, records_per_step: int = 0, processes: int = 0):
        self.records_per_step, self.processes = records_per_step, processes

    def state(self) -> JsonObject:
        """Return the shape as Trainer writes it into trainer_state.json."""
        return {
            "args": {"records_per_step": self.records_per_step, "processes": self.processes},
            "attributes": {},
        }


def shape_of(trainer: Trainer) -> RunShape:
    """Return the shape of the run that `trainer` makes with its current arguments."""
    args = trainer.args
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return RunShape(records_per_step=step, processes=args.world_size)


def check_run_shape(trainer: Trainer, checkpoint: str | Path | None) -> None:
    """Compare a run with the one that wrote the checkpoint it resumes.

    A checkpoint counts steps. With the same number of records per step, the rest of the records comes in the order that an
    unbroken run would have seen, on any number of processes. With another number, Trainer would skip the wrong records and
    continue the learning rate's schedule at the wrong place.

    Args:
        trainer: The resuming run, before it trains.
        checkpoint: The checkpoint's folder; None = nothing is resumed. A checkpoint without a shape is not compared.

    Raises:
        ValueError: The number of records per step differs and `ignore_data_skip` isn't set.
    """
    before = None if checkpoint is None else _read_shape(Path(checkpoint))
    if before is None:
        return
    now, args = shape_of(trainer), trainer.args
    if before.records_per_step != now.records_per_step:
        message = (
            f"{checkpoint} was written by a run of {before.records_per_step} records per step on {before.processes} "
            f"processes; this one has {now.records_per_step} on {now.processes}, so its count of steps would skip the "
            "wrong records."
        )
        if not args.ignore_data_skip:
            raise ValueError(
                f"{message} {_remedy(before.records_per_step, args.train_batch_size * now.processes)} To start the epoch "
                "again from its first record instead, set --ignore_data_skip true."
            )
        logger.warning("%s The epoch starts again from its first record (ignore_data_skip).", message)
    elif before.processes != now.processes:
        logger.warning(
            "%s was written by %d processes and is resumed by %d: the order of the records is exact, dropout draws other "
            "random numbers.",
            checkpoint,
            before.processes,
            now.processes,
        )


def _remedy(records_per_step: int, per_pass: int) -> str:
    if records_per_step % per_pass == 0:
        return f"Set --gradient_accumulation_steps {records_per_step // per_pass}."
    return (
        f"Choose per_device_train_batch_size, gradient_accumulation_steps and the number of processes so that their product "
        f"is {records_per_step}."
    )


def _read_shape(checkpoint: Path) -> RunShape | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        kept = state["stateful_callbacks"][RunShape.__name__]
        return RunShape(**(kept[0] if isinstance(kept, list) else kept)["args"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
