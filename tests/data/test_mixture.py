"""A mixture of tasks: exact shares, every record in its turn, and the same rows for the same seed and epoch."""

from collections import Counter

import datasets
import numpy as np
import pytest

from samf.data.mixture import TaskMixture, apportion, parse_weights

SIZES = {"report": 7, "multiple_choice": 20, "short_answer": 11}


def records(**sizes: int) -> datasets.Dataset:
    """Tasks in an order that isn't sorted."""
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    return datasets.Dataset.from_dict({"task": tasks}).shuffle(seed=1)


def test_equal_weights_give_the_scarcer_task_once_and_as_many_of_the_other():
    """As the paper has it: every report, and as many multiple-choice questions."""
    found = records(**SIZES)
    mixture = TaskMixture(found, {"report": 1, "multiple_choice": 1})
    assert len(mixture) == 14
    for epoch in range(5):
        rows = mixture.epoch_rows(epoch)
        assert Counter(found["task"][int(row)] for row in rows) == {"report": 7, "multiple_choice": 7}
        assert set(mixture.rows["report"]) <= set(rows)
    assert len(set(mixture.epoch_rows(0)) | set(mixture.epoch_rows(1))) == 7 + 14


@pytest.mark.parametrize("size", [3, 10, 19, 57, 1000])
def test_every_epoch_has_the_same_exact_shares(size):
    found = records(**SIZES)
    mixture = TaskMixture(found, {"report": 1, "multiple_choice": 2.5, "short_answer": 0.5}, epoch_size=size)
    first = Counter(np.array(found["task"])[mixture.epoch_rows(0)])
    assert sum(first.values()) == size == len(mixture)
    for task, weight in {"report": 1, "multiple_choice": 2.5, "short_answer": 0.5}.items():
        assert abs(first[task] - size * weight / 4) < 1
    for epoch in range(1, 6):
        assert Counter(np.array(found["task"])[mixture.epoch_rows(epoch)]) == first


@pytest.mark.parametrize("size", [4, 26, 100])
def test_no_record_comes_twice_before_all_of_its_task_have_come_once(size):
    found = records(**SIZES)
    mixture = TaskMixture(found, {"report": 1, "multiple_choice": 3}, seed=5, epoch_size=size)
    seen: Counter[int] = Counter()
    for epoch in range(30):
        seen.update(mixture.epoch_rows(epoch).tolist())
        for task in ("report", "multiple_choice"):
            counts = [seen[int(row)] for row in mixture.rows[task]]
            assert max(counts) - min(counts) <= 1
    assert set(seen) == set(mixture.rows["report"]) | set(mixture.rows["multiple_choice"])


def test_rows_depend_on_seed_and_epoch_alone():
    """What a resumed run asks for first, an unbroken one asks for later."""
    found, weights = records(**SIZES), {"report": 1, "short_answer": 1}
    unbroken = TaskMixture(found, weights, seed=3, epoch_size=9)
    epochs = [unbroken.epoch_rows(epoch).tolist() for epoch in range(8)]
    for epoch in (7, 2):
        resumed = TaskMixture(found, dict(reversed(weights.items())), seed=3, epoch_size=9)
        assert sorted(resumed.epoch_rows(epoch)) == sorted(epochs[epoch])
        assert TaskMixture(found, weights, seed=3, epoch_size=9).epoch_rows(epoch).tolist() == epochs[epoch]
    assert TaskMixture(found, weights, seed=4, epoch_size=9).epoch_rows(0).tolist() != epochs[0]
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_each_deal_has_an_order_of_its_own():
    mixture = TaskMixture(records(**SIZES), {"multiple_choice": 1})
    deals = [mixture.epoch_rows(epoch).tolist() for epoch in range(4)]
    assert all(sorted(deal) == mixture.rows["multiple_choice"].tolist() for deal in deals)
    assert len(set(map(tuple, deals))) == 4


def test_rows_of_a_selection_are_its_own():
    found = records(**SIZES)
    chosen = found.select([k for k, task in enumerate(found["task"]) if task != "multiple_choice"])
    rows = TaskMixture(chosen, {"short_answer": 1}).epoch_rows(0)
    assert sorted(rows) == [k for k, task in enumerate(chosen["task"]) if task == "short_answer"]


def test_shares_by_largest_remainders():
    assert apportion({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert apportion({"a": 47.3, "b": 33.6, "c": 19.1}, 10) == {"a": 5, "b": 3, "c": 2}


@pytest.mark.parametrize("items", [["report"], ["report=x"], ["report=-1"], ["report=1", "report=2"], ["=1"]])
def test_weights_are_checked(items):
    with pytest.raises(ValueError, match="expected each task once with a weight"):
        parse_weights(items)


def test_what_cannot_be_mixed_is_an_error():
    assert parse_weights(["report=1", "short_answer=0.5"]) == {"report": 1.0, "short_answer": 0.5}
    with pytest.raises(ValueError, match="names long_answer; the records' tasks are .'multiple_choice', 'report'"):
        TaskMixture(records(**SIZES), {"long_answer": 1})
    with pytest.raises(ValueError, match="expected positive numbers"):
        TaskMixture(records(**SIZES), {"report": 0})
