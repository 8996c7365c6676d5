"""Several processes share one group, however often they exchange something."""

from types import SimpleNamespace

import pytest

from samf.utils import distributed as processes
from samf.utils.distributed import Processes


@pytest.fixture
def two_processes(monkeypatch) -> SimpleNamespace:
    """torch.distributed as the first of two processes sees it; counts the groups that are made."""
    made = []
    fake = SimpleNamespace(
        group=SimpleNamespace(WORLD=object()),
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: 0,
        new_group=lambda **options: made.append(options) or object(),
        made=made,
    )
    monkeypatch.setattr(processes, "_started", lambda: fake)
    return fake


def test_processes_meet_in_one_group(two_processes):
    """Every evaluation asks for one, and each group has threads and connections of its own."""
    groups = {id(Processes()._group()) for _ in range(3)}
    assert len(groups) == len(two_processes.made) == 1
    two_processes.group.WORLD = object()  # the processes have left and joined again
    assert id(Processes()._group()) not in groups


def test_asking_who_is_first_makes_no_group(two_processes):
    """Making one is a collective: a single process that only asks for its rank would wait for the others."""
    processes._gloo_group.cache_clear()
    assert Processes().is_first and Processes().count == 2
    assert two_processes.made == []
