"""What makes a Trainer's run repeatable: order and chance by epoch and index, checkpoints on signals, whole folders."""

import json
import logging
import os
import random
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import sort_checkpoints

from samf.pretraining.launchers import refuse_shards
from samf.pretraining.run_shape import check_run_shape, shape_of

logger = logging.getLogger(__name__)


class EpochSampler(Sampler):
    """Every index of a data set once an epoch, as pairs (epoch, index), in an order that seed and epoch decide alone.

    With the epoch in the key, a data set can draw each item's augmentation from (seed, epoch, index): then neither the
    number of processes and workers nor an interruption changes what is seen.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


class SetEpoch(TrainerCallback):
    """Tells a sampler the epoch. The Trainer's own way doesn't reach it when several processes resume mid-epoch."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = int(state.epoch or 0)


class StoppableTrainer(Trainer):
    """A Trainer that stops with a checkpoint on Ctrl-C and SIGTERM, and that has nothing to do when a finished run goes on."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self.add_callback(shape_of(self))

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The library's, whose workers leave signals to this process.

        Launchers and terminals signal the whole process group; without its workers this process couldn't finish the step.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        if loader.num_workers:
            own = getattr(loader, "base_dataloader", loader)  # accelerate's loader starts the workers of the one within
            own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The library's, which asks whether training is at its end after a step alone: a finished run would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def _start_worker(before: Callable[[int], None] | None, worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader's worker, which ends when its parent does; then what `before` does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if before is not None:
        before(worker)


class ResumableTrainer(StoppableTrainer):
    """A StoppableTrainer whose training set is asked for (epoch, index).

    Raises:
        ValueError: fewer rows than one step takes, `push_to_hub`, or a launcher that shards weights.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        training: TrainingArguments = kwargs["args"]
        if training.push_to_hub:
            out = training.output_dir
            raise ValueError(
                "push_to_hub would push the weights of checkpoints, which hold more than what this stage makes. Leave it "
                f"out, and afterwards `hf upload OWNER/NAME {out} --exclude '_*' --exclude 'checkpoint-*'`."
            )
        refuse_shards(training, type(self).__name__)
        super().__init__(*args, **kwargs)
        self.args.dataloader_drop_last = True  # every step has a whole batch, whatever the number of processes
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        if len(self.train_dataset) < step:
            raise ValueError(
                f"{len(self.train_dataset)} training rows make no step of {step}: lower per_device_train_batch_size or "
                f"gradient_accumulation_steps, or give more data."
            )
        self.sampler = EpochSampler(len(self.train_dataset), self.args.data_seed or self.args.seed)
        self.add_callback(SetEpoch(self.sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.sampler

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """What `evaluate` ends with: the metrics in the log, and the callbacks told."""
        self.log(metrics)
        handler: CallbackHandler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Interruption(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, end training. `signal` is then the signal's number.

    A second signal acts as without this callback.
    """

    def __init__(self):
        self.signal = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:  # a signal may reach one process first: all of them must stop at one step
            noted = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(noted, op=torch.distributed.ReduceOp.MAX)
            self.signal = int(noted)
        if self.signal:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # launchers wait half a minute or so before they kill

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint below `folder`; one whose writing was cut off lacks its trainer_state.json."""
    if not Path(folder).is_dir():
        return None
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        try:
            json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s: a checkpoint that wasn't finished; looking for an older one", checkpoint)
            continue
        return checkpoint
    return None


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """What `resume_from_checkpoint` means: a path, or "last" (or "true") for the newest in `output_dir`, if there is one."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() not in ("last", "true"):
        return wanted
    found = last_checkpoint(training.output_dir)
    logger.info("resuming from %s", found or f"nothing: {training.output_dir} has no checkpoint")
    return found


def train_to_end(trainer: StoppableTrainer) -> None:
    """Train, from a checkpoint if the arguments say so.

    Raises:
        SystemExit: stopped by a signal, with the status that shells expect (128 + its number); a checkpoint is saved.
    """
    checkpoint = checkpoint_to_resume(trainer.args)
    check_run_shape(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interruption.signal:
        logger.warning("stopped at step %d; go on with --resume_from_checkpoint last", trainer.state.global_step)
        raise SystemExit(128 + trainer.interruption.signal)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Python's, NumPy's and torch's generators are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    with torch.random.fork_rng(devices):  # this process's own: to ask for all would start work on each
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write in, whose files replace those of `folder` when all of them are written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def share_rows(compute: Callable[[list[int]], np.ndarray], rows: int) -> np.ndarray:
    """`compute` on each process's share of rows 0..rows-1; the results (rows, …) in order, on every process."""
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = list(range(rank, rows, world))
    part = compute(share) if share else None
    if world == 1:
        return part
    parts: list[np.ndarray | None] = [None] * world
    torch.distributed.all_gather_object(parts, part)
    joined = np.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype)
    for start, other in enumerate(parts):
        joined[start::world] = 0 if other is None else other
    return joined
