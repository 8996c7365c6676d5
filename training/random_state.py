"""The state of Python's, NumPy's and torch's random generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's generators when the block ends."""
    python, numpy = random.getstate(), np.random.get_state()
    # Only this process's device: forking the state of all devices would start a context on each.
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
