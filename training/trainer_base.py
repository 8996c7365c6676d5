"""What makes a Trainer's run repeatable: order and chance by epoch and index, checkpoints on signals, whole folders."""

import atexit
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from samf.model.hub_samf import publish_weights
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.divergence import LOOK_EVERY, DivergenceError, LossWatch, diverged, has_finite_weights
from samf.training.launchers import refuse_shards
from samf.training.run_shape import check_run_shape, shape_of
from samf.utils.distributed import Processes

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
    """A Trainer that neither stops without a checkpoint nor saves one that is no good.

    - Ctrl-C and SIGTERM: it finishes the step, saves and ends.
    - Data that can't be read: it saves the last step's state, then raises.
    - A loss or weights that aren't finite: it raises before anything is saved. Each loss is looked at without waiting for
      the device; what was found is read every few steps (`LOOK_EVERY`; on CPUs and on several processes, which wait for
      each other anyway, at every step), and always before a line of the log, an evaluation and a checkpoint.

    All processes stop together. A finished run has nothing to do when it goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The library's filter takes a loss that isn't finite out of the mean, and waits for the device at every step.
        self.args.logging_nan_inf_filter = False
        self.watch = LossWatch()
        self.interruption = Interruption(self.watch)
        self.add_callback(self.interruption)
        self.add_callback(shape_of(self))
        self._processes: Processes | None = None
        self._saved_step, self._is_saving = 0, False

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The library's, whose workers leave signals to this process.

        Launchers and terminals signal the whole process group; without its workers this process couldn't finish the step.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        if loader.num_workers:
            # At its end Python would ask them by SIGTERM to go, and wait for ever.
            atexit.unregister(_kill_daemons)
            atexit.register(_kill_daemons)
            own = getattr(loader, "base_dataloader", loader)  # accelerate's loader starts the workers of the one within
            own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The library's, which asks whether training is at its end after a step alone: a finished run would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Losses that aren't finite ---------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watch.note(loss, self.state.global_step + 1)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control, step = self.control, self.state.global_step
        will_use = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        is_free = self.args.device.type == "cpu" or self.args.world_size > 1
        if will_use or is_free or step % LOOK_EVERY == 0:
            self.check_losses()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except DivergenceError:
            raise
        except Exception as error:  # an evaluation's data, or its code
            if not self._is_saving and (self.args.world_size == 1 or isinstance(error, DataFailureError)):
                self._save_before_the_end(error)
            raise

    def check_losses(self) -> None:
        """Raise DivergenceError if a loss since the start of training wasn't finite."""
        if (found := self.watch.first()) is not None:
            step, loss = found
            raise diverged(f"the loss is {loss}", step, self.args.output_dir)

    def check_weights(self) -> None:
        """Raise DivergenceError if a trained weight isn't finite; every process must call."""
        is_finite = has_finite_weights(self.model).to(self.args.device, torch.int32)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(is_finite, op=torch.distributed.ReduceOp.MIN)
        if not is_finite:
            raise diverged("some weights aren't finite", self.state.global_step, self.args.output_dir)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_losses()
        self.check_weights()
        self._is_saving = True
        super()._save_checkpoint(*args, **kwargs)
        self._saved_step, self._is_saving = self.state.global_step, False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The library's; safetensors' files become readable for those whom the umask lets read others."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            publish_weights(output_dir or self.args.output_dir)

    # Data that can't be read -----------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any) -> tuple:
        """The library's; data that fails on any process ends training on all of them, with a checkpoint."""
        try:
            batches = self._fetch_together(lambda: list(islice(epoch_iterator, num_batches)))
        except Exception as error:
            self._save_before_the_end(error)
            raise
        return super().get_batch_samples(iter(batches), num_batches, *args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1:
            dataloader = _AgreedBatches(dataloader, self._fetch_together)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _fetch_together(self, fetch: Callable[[], Any]) -> Any:
        """What `fetch` gives; every process must call, and where it raises on one, all of them raise."""
        if self.args.world_size == 1:
            return fetch()
        self._processes = self._processes or Processes()
        try:
            fetched = fetch()
        except Exception as error:
            self._processes.any(True)
            raise DataFailureError(f"Process {self.args.process_index}: {type(error).__name__}: {error}") from error
        if self._processes.any(False):
            raise DataFailureError("Another process's data can't be read; its message says which and why.")
        return fetched

    def _save_before_the_end(self, error: Exception) -> None:
        """Save the last whole step's state; the error that ends training counts, whatever becomes of this."""
        step = self.state.global_step
        logger.error("step %d: training ends (%s: %s)", step + 1, type(error).__name__, error)
        if step == 0 or step == self._saved_step or not self.is_in_train:
            return
        try:
            self._save_checkpoint(self.model_wrapped, trial=None)
        except (DivergenceError, OSError, RuntimeError) as problem:
            logger.error("step %d: its state can't be saved (%s)", step, problem)
            return
        logger.error("step %d is saved; when the data is in order, go on by --resume_from_checkpoint last", step)


class DataFailureError(RuntimeError):
    """A process's data can't be read, and all processes know it."""


class _AgreedBatches:
    """The batches of a loader, whose processes stop together where the data of one fails.

    All of them have the same number of batches, which accelerate sees to.
    """

    def __init__(self, loader: DataLoader, fetch_together: Callable[[Callable[[], Any]], Any]):
        self._loader, self._fetch_together = loader, fetch_together

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self._loader), object()
        while (batch := self._fetch_together(lambda: next(batches, end))) is not end:
            yield batch


def _kill_daemons() -> None:
    """End those child processes that Python ends when this one does, also those that ignore signals."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


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
        self.sampler = EpochSampler(len(self.train_dataset), order_seed(self.args))
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

    A second signal acts as without this callback. Several processes also tell each other here, in the same exchange, of a
    loss that isn't finite.
    """

    def __init__(self, watch: LossWatch | None = None):
        self.signal, self.watch = 0, watch or LossWatch()
        self._before: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (
            args.world_size > 1
        ):  # a signal, or a loss that isn't finite, may reach one process first: all must stop at one step
            noted = torch.tensor([self.signal, 0], device=args.device)
            if self.watch.step is not None:
                noted[1] = self.watch.step
            torch.distributed.all_reduce(noted, op=torch.distributed.ReduceOp.MAX)
            self.signal, self.watch.step = int(noted[0]), noted[1]
        if self.signal:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # launchers wait half a minute or so before they kill

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)


def train_to_end(trainer: StoppableTrainer) -> None:
    """Train, from a checkpoint if the arguments say so.

    Raises:
        SystemExit: stopped by a signal, with the status that shells expect (128 + its number); a checkpoint is saved.
        DivergenceError: the loss or the weights aren't finite any more; nothing is saved.
        CheckpointError: there is no whole checkpoint to resume from.
    """
    checkpoint = checkpoint_to_resume(trainer.args)
    check_run_shape(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.interruption.restore_handlers()
    if trainer.interruption.signal:
        logger.warning("stopped at step %d; go on with --resume_from_checkpoint last", trainer.state.global_step)
        raise SystemExit(128 + trainer.interruption.signal)
    trainer.check_losses()
    trainer.check_weights()


def order_seed(training: TrainingArguments) -> int:
    """The seed of the order of data: `data_seed`, which may be 0, or else `seed`."""
    return training.seed if training.data_seed is None else training.data_seed


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
        publish_weights(temporary)
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
