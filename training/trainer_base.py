"""Base classes of all stages' Trainers: checkpoints on signals and failures, and an order of data that survives both."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import EvalLoopOutput

from samf.model.hub_samf import publish_weights
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.data_failures import AgreedBatches, DataFailureError, fetch_together
from samf.training.divergence import READ_EVERY, DivergenceError, LossWatch, diverged, has_finite_weights
from samf.training.interruption import Interruption, shield_workers
from samf.training.launchers import refuse_shards
from samf.training.run_shape import check_run_shape, shape_of
from samf.training.sampling import EpochSampler, SetEpoch, order_seed
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StoppableTrainer(Trainer):
    """A Trainer that never stops without a checkpoint and never saves a bad one.

    - Ctrl-C and SIGTERM: finish the step, save, end.
    - Data that can't be read: save the state of the last step, then raise.
    - A loss or weights that aren't finite: raise before anything is saved. Each loss is checked without waiting for the
      device. The result is read every `READ_EVERY` steps (on CPUs and on several processes, which wait for each other
      anyway, at every step), and always before a log entry, an evaluation and a checkpoint.

    All processes stop together. A finished run that is resumed takes no further step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The library's filter removes losses that aren't finite from the mean, and waits for the device at every step.
        self.args.logging_nan_inf_filter = False
        self.watch = LossWatch()
        self.interruption = Interruption(self.watch)
        self.add_callback(self.interruption)
        self.add_callback(shape_of(self))
        self._processes: Processes | None = None
        self._saved_step, self._is_saving = 0, False

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return Trainer's loader with workers that ignore signals."""
        loader = super()._get_dataloader(*args, **kwargs)
        shield_workers(loader)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run Trainer's epoch unless training is finished: Trainer checks that only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take Trainer's step and note its loss."""
        loss = super().training_step(*args, **kwargs)
        self.watch.note(loss, self.state.global_step + 1)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control, step = self.control, self.state.global_step
        will_use = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        is_free = self.args.device.type == "cpu" or self.args.world_size > 1
        if will_use or is_free or step % READ_EVERY == 0:
            self.check_losses()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except DivergenceError:
            raise
        except Exception as error:  # of an evaluation: its data or its code
            if not self._is_saving and (self.args.world_size == 1 or isinstance(error, DataFailureError)):
                self._save_before_raising(error)
            raise

    def check_losses(self) -> None:
        """Raise DivergenceError if a loss since the start of training wasn't finite."""
        if (found := self.watch.first()) is not None:
            step, loss = found
            raise diverged(f"the loss is {loss}", step, self.args.output_dir)

    def check_weights(self) -> None:
        """Raise DivergenceError if a trained weight isn't finite. Every process must call it."""
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as Trainer does, and give safetensors files the permissions that the umask allows."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            publish_weights(output_dir or self.args.output_dir)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any) -> tuple:
        """Return Trainer's micro-batches of a step; data that can't be read ends training on all processes, after a save.

        Args:
            epoch_iterator: The batches of the epoch.
            num_batches: Micro-batches of the step.
            *args: As for Trainer.
            **kwargs: As for Trainer.
        """
        try:
            batches = self._fetch_together(lambda: list(islice(epoch_iterator, num_batches)))
        except Exception as error:
            self._save_before_raising(error)
            raise
        return super().get_batch_samples(iter(batches), num_batches, *args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run Trainer's loop over batches that end on all processes where the data of one fails.

        Args:
            dataloader: The batches.
            *args: As for Trainer.
            **kwargs: As for Trainer.
        """
        batches = AgreedBatches(dataloader, self._fetch_together) if self.args.world_size > 1 else dataloader
        return super().evaluation_loop(batches, *args, **kwargs)

    def _fetch_together(self, fetch: Callable[[], T]) -> T:
        if self.args.world_size == 1:
            return fetch()
        self._processes = self._processes or Processes()
        return fetch_together(fetch, self._processes)

    def _save_before_raising(self, error: Exception) -> None:
        """Save the state of the last complete step. A failure to save is only logged: `error` is what ends training."""
        step = self.state.global_step
        logger.error("step %d: training ends (%s: %s)", step + 1, type(error).__name__, error)
        if step == 0 or step == self._saved_step or not self.is_in_train:
            return
        try:
            self._save_checkpoint(self.model_wrapped, trial=None)
        except (DivergenceError, OSError, RuntimeError) as problem:
            logger.error("step %d: its state can't be saved (%s)", step, problem)
            return
        logger.error("step %d is saved; repair the data, then resume with --resume_from_checkpoint last", step)


class ResumableTrainer(StoppableTrainer):
    """A StoppableTrainer whose training set is indexed by (epoch, index).

    Raises:
        ValueError: The training set has fewer rows than one step needs, `push_to_hub` is set, or the launcher shards weights.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        training: TrainingArguments = kwargs["args"]
        if training.push_to_hub:
            out = training.output_dir
            raise ValueError(
                "push_to_hub would push the weights of checkpoints, which hold more than the result of this stage. Leave it "
                f"out, and afterwards run `hf upload OWNER/NAME {out} --exclude '_*' --exclude 'checkpoint-*'`."
            )
        refuse_shards(training, type(self).__name__)
        super().__init__(*args, **kwargs)
        self.args.dataloader_drop_last = True  # every step has a whole batch, on any number of processes
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
        """Log the metrics of an evaluation, call the callbacks' `on_evaluate`, and return the metrics."""
        self.log(metrics)
        handler: CallbackHandler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train_to_end(trainer: StoppableTrainer) -> None:
    """Train, from a checkpoint if the arguments name one.

    Raises:
        SystemExit: A signal stopped the run, with the status that shells expect (128 + its number); a checkpoint is saved.
        DivergenceError: The loss or the weights aren't finite; nothing is saved.
        CheckpointError: There is no whole checkpoint to resume from.
    """
    checkpoint = checkpoint_to_resume(trainer.args)
    check_run_shape(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.interruption.restore_handlers()
    if trainer.interruption.signal:
        logger.warning("stopped at step %d; resume with --resume_from_checkpoint last", trainer.state.global_step)
        raise SystemExit(128 + trainer.interruption.signal)
    trainer.check_losses()
    trainer.check_weights()
