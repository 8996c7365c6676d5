"""SIGINT and SIGTERM during training: finish the step, save a checkpoint, stop."""

import atexit
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samf.training.divergence import LossWatch

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What `signal.signal` returns and takes: a function, one of the two constants, or None for a handler set outside Python.
_Handler = Callable[[int, FrameType | None], Any] | int | None


class Interruption(TrainerCallback):
    """A callback that handles SIGINT and SIGTERM: it finishes the step, saves a checkpoint and ends training.

    A second signal is handled as without this callback. Under several processes, the exchange that agrees on the step to
    stop at also tells all processes of a loss that isn't finite.

    Args:
        watch: The losses seen so far; None = a new watch.

    Attributes:
        signal: Number of the signal received; 0 = none.
    """

    def __init__(self, watch: LossWatch | None = None):
        self.signal, self.watch = 0, watch or LossWatch()
        self._previous_handlers: dict[int, _Handler] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Install the handlers. Python allows it in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Restore the handlers that were there before training."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the handlers that were there before training; does nothing when called again."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other processes on a signal or a bad loss, and ask Trainer to save and stop after a signal.

        Args:
            args: The run's arguments.
            state: Unused.
            control: Gets the requests to save and to stop.
            **kwargs: Unused; what Trainer passes to callbacks.
        """
        if args.world_size > 1:
            # One process may see a signal or a bad loss before the others; all of them must stop at the same step.
            seen = torch.tensor([self.signal, 0], device=args.device)
            if self.watch.step is not None:
                seen[1] = self.watch.step
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
            self.signal, self.watch.step = int(seen[0]), seen[1]
        if self.signal:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # launchers kill their processes after about half a minute

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._previous_handlers[number])
        logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)


def shield_workers(loader: DataLoader) -> None:
    """Let a loader's worker processes ignore SIGINT and SIGTERM, and kill them when this process exits.

    Launchers and terminals signal the whole process group; without its workers this process couldn't finish the step.
    """
    if not loader.num_workers:
        return
    # When Python exits, it would ask the workers to end by SIGTERM, which they ignore, and wait for them forever.
    atexit.unregister(_kill_daemons)
    atexit.register(_kill_daemons)
    inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps the loader that starts the workers
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)


def _kill_daemons() -> None:
    """Kill the child processes that Python ends with this one, including those that ignore signals."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader's worker, which ends with its parent, then call the loader's `init_fn`."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init_fn is not None:
        init_fn(worker)
