"""The launcher that wrote a checkpoint, which the one that resumes it must equal.

DDP, FSDP and DeepSpeed keep the optimizer's state in files of their own. Trainer reads those of the launcher that it runs
under: where a checkpoint of another has none, it starts with an empty optimizer and schedule, or fails without saying why.
"""

from pathlib import Path

from transformers import TrainingArguments

from samf.training.launchers import sharding

_FSDP_FILES = ("pytorch_model_fsdp*", "optimizer.bin", "optimizer_0")


def checkpoint_kind(folder: Path) -> str | None:
    """Return how the processes that wrote a checkpoint shared the optimizer's state: FSDP, ZeRO-2, ZeRO-3; None = not.

    Args:
        folder: A whole checkpoint. ZeRO-1's files are those of ZeRO-2.
    """
    if any(folder.glob("global_step*")):
        return "ZeRO-3" if any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt")) else "ZeRO-2"
    return "FSDP" if any(any(folder.glob(name)) for name in _FSDP_FILES) else None


def kind_mismatch(checkpoint: str | Path, training: TrainingArguments) -> str | None:
    """Return why a run can't resume the state of a checkpoint's optimizer; None where it can.

    Args:
        checkpoint: A whole checkpoint.
        training: The resuming run's arguments.
    """
    folder = Path(checkpoint)
    written, now = checkpoint_kind(folder), sharding(training)
    now = "ZeRO-2" if now == "ZeRO-1" else now
    if written != now:
        names = [f"under {kind}" if kind else "without shards" for kind in (written, now)]
        return (
            f"its optimizer's state was written {names[0]}, and this run trains {names[1]}, which can't read it. Resume with "
            f"the launcher that wrote it, or start a new run from its weights."
        )
    if written is None or written == "FSDP":
        return None
    processes = _processes(folder)
    if processes in (None, training.world_size):
        return None
    return (
        f"DeepSpeed's optimizer states are those of {processes} processes, and this run has {training.world_size}. Resume "
        f"with --num_processes {processes}, or start a new run from its weights."
    )


def _processes(folder: Path) -> int | None:
    """Return the number of processes that wrote a DeepSpeed checkpoint, each of which has a file of its own."""
    count = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    return count or None
