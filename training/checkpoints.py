"""The checkpoint that a run resumes from."""

import logging
import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from samf.training.checkpoint_damage import find_damage
from samf.training.checkpoint_kind import kind_mismatch
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

_MOST_LISTED = 5


class CheckpointError(ValueError):
    """No checkpoint can be resumed from; the message names the damaged file and the remedy."""


def last_checkpoint(folder: str | os.PathLike, *, with_optimizer: bool = True) -> str | None:
    """Return the newest whole checkpoint below `folder`; None where there is no checkpoint at all.

    Each newer one that is damaged is named in a warning.

    Args:
        folder: Output folder of a run; may not exist.
        with_optimizer: Whether the states of optimizer, scheduler and random generators must be there.

    Raises:
        CheckpointError: There are checkpoints, but none is whole.
    """
    if not Path(folder).is_dir():
        return None
    damaged = []
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        damage = find_damage(checkpoint, with_optimizer=with_optimizer)
        if damage is None:
            return checkpoint
        logger.warning("%s isn't whole (%s); looking for an older checkpoint", checkpoint, damage)
        damaged.append(f"{Path(checkpoint).name}: {damage}")
    if damaged:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole ({'; '.join(damaged[:_MOST_LISTED])}). Restore one from a copy, or leave "
            "resume_from_checkpoint out to start at step 0."
        )
    return None


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means.

    The option is a path, or "last" or "true" for the newest whole checkpoint in `output_dir`. Rank 0 decides for all
    processes, so that they resume from the same one.

    Raises:
        CheckpointError: The path is no whole checkpoint, "last" finds only damaged ones, or another kind of launcher wrote
            it.
    """
    option = training.resume_from_checkpoint
    if not option or str(option).lower() == "false":
        return None

    def choose() -> str | None:
        try:
            checkpoint = _choose(str(option), training)
            mismatch = None if checkpoint is None or training.save_only_model else kind_mismatch(checkpoint, training)
        except OSError as error:
            raise CheckpointError(str(error)) from error
        if mismatch is not None:
            raise CheckpointError(f"resume_from_checkpoint={checkpoint}: {mismatch}")
        return checkpoint

    return Processes().from_first(choose)


def _choose(option: str, training: TrainingArguments) -> str | None:
    with_optimizer = not training.save_only_model
    if option.lower() in ("last", "true"):
        found = last_checkpoint(training.output_dir, with_optimizer=with_optimizer)
        logger.info("resuming from %s", found or f"nothing: {training.output_dir} has no checkpoint")
        return found
    damage = find_damage(option, with_optimizer=with_optimizer)
    if damage is not None:
        raise CheckpointError(
            f"resume_from_checkpoint={option}: isn't a whole checkpoint ({damage}). Name another one, or give "
            "`--resume_from_checkpoint last` for the newest whole one of output_dir."
        )
    return option
