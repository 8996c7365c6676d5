"""Turns at the model: first come, first served, and nobody's work is run over when its visitor goes."""

import threading
import time

import pytest

from samf.web.turns import BusyError, Turns, progress_of, start


def test_the_queue_is_in_order_and_says_how_many_are_ahead():
    turns = Turns()
    tickets = [turns.join() for _ in range(3)]
    assert [turns.ahead(ticket) for ticket in tickets] == [0, 1, 2]
    assert list(tickets[0].waiting(0.01)) == []
    waiting = tickets[2].waiting(0.01)
    assert next(waiting) == 2
    tickets[1].leave()  # someone who gave up
    assert next(waiting) == 1
    tickets[0].leave()
    assert list(waiting) == [] and len(turns) == 1


def test_patient_ones_let_others_pass_but_not_during_their_turn():
    turns = Turns()
    running, patient, other = turns.join(patient=True), turns.join(patient=True), turns.join()
    assert [turns.ahead(ticket) for ticket in (running, other, patient)] == [0, 1, 2]
    later = turns.join(patient=True)
    assert turns.ahead(later) == 3 and turns.ahead(turns.join()) == 2


def test_a_full_queue_refuses():
    turns = Turns(most=2)
    turns.join(), turns.join()
    with pytest.raises(BusyError, match="2 requests"):
        turns.join()


def test_a_turn_ends_when_its_work_ends_not_when_its_visitor_goes():
    turns, may_end, order = Turns(), threading.Event(), []
    first, second = turns.join(), turns.join()
    first.on_left.append(lambda: order.append("left"))
    job = first.start(lambda: (may_end.wait(10), order.append("worked")))
    first.leave()
    assert not turns.wait(second, 0.05) and order == []
    may_end.set()
    job.result(10)
    assert turns.wait(second, 10) and order == ["worked", "left"]


def test_failed_work_gives_the_turn_on_and_raises_for_who_waits():
    turns = Turns()
    ticket = turns.join()
    job = ticket.start(lambda: 1 / 0)
    list(progress_of(job, 0.01))
    ticket.leave()
    assert len(turns) == 0
    with pytest.raises(ZeroDivisionError):
        job.result()


def test_progress_is_a_sign_of_life_until_the_job_is_done():
    seconds = list(progress_of(start(lambda: time.sleep(0.3)), 0.05))
    assert len(seconds) >= 2 and seconds == sorted(seconds)
