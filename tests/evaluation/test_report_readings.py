"""What the rules read in reports, in this process and in another; and expressions that are tried only where they may match."""

import os
import re
import signal
from pathlib import Path

import pytest

from samf.evaluation.metrics import report_readings as readings
from samf.evaluation.metrics.labelled_sentences import read_labelled_sentences
from samf.evaluation.metrics.report_sizes import read_sizes
from samf.model import text_cues, text_laterality
from samf.model.text_expressions import Expression, required_literals
from samf.model.text_labeller import TERMS, finding_sides, label_report

SENTENCES = [s.text for s in read_labelled_sentences(Path(__file__).with_name("labeller_sentences.txt"))]


@pytest.fixture
def can_fork(monkeypatch):
    """A process that may fork, and has read nothing."""
    monkeypatch.setattr(readings, "_can_fork", lambda: True)
    monkeypatch.setattr(readings, "_FEWEST_IN_BACKGROUND", 1)
    monkeypatch.setattr(readings, "_known", {})


def expected_reading(report):
    return tuple(label_report(report).values()), finding_sides(report), read_sizes(report)


def test_the_other_process_reads_what_this_one_does(can_fork, monkeypatch):
    with readings.reading_in_background(SENTENCES[:40]):
        monkeypatch.setattr(readings, "_read", lambda report: pytest.fail("read in this process"))
        found = [readings.read_report(report) for report in SENTENCES[:40]]
    for report, reading in zip(SENTENCES, found, strict=False):
        labels, sides, sizes = expected_reading(report)
        assert (reading.labels, reading.sides) == (labels, sides)
        assert sorted(reading.sizes) == sorted(sizes.elements())


def test_reports_of_a_process_that_was_killed_are_read_here(can_fork, monkeypatch, caplog):
    monkeypatch.setattr(readings, "_send_readings", lambda sender, reports: os.kill(os.getpid(), signal.SIGKILL))
    with readings.reading_in_background(SENTENCES[:3]):
        found = readings.rule_labels(SENTENCES[:3])
    assert found.tolist() == [list(label_report(report).values()) for report in SENTENCES[:3]]
    assert "ended early" in caplog.text


def test_no_process_is_left_when_nothing_asks_for_its_readings(can_fork):
    with readings.reading_in_background(SENTENCES):
        pass
    assert not readings._running and not readings.multiprocessing.active_children()


def patterns():
    parts = [getattr(term, name) for terms in TERMS.values() for term in terms for name in ("head", "near", "unless")]
    cues = [e for module in (text_cues, text_laterality) for e in vars(module).values() if isinstance(e, Expression)]
    return [*filter(None, parts), *(expression._pattern.pattern for expression in cues)]


def test_every_match_contains_a_literal_that_is_required():
    """On the labelled sentences, for each expression of the labeller; and most expressions have literals."""
    found = {pattern: required_literals(pattern) for pattern in patterns()}
    matches = 0
    for pattern, literals in found.items():
        for sentence in SENTENCES:
            for match in re.finditer(pattern, sentence.lower()):
                matches += 1
                assert literals is None or any(literal in match[0] for literal in literals), pattern
    assert matches > 1000 and sum(literals is not None for literals in found.values()) > 0.9 * len(found)


@pytest.mark.parametrize(
    "pattern, literals",
    [
        (r"consolid\w+", {"consolid"}),
        (r"(?:micro)?nodul(?:e|es)\b", {"nodule"}),
        (r"stents?|ports?", {"stent", "port"}),
        (r"(?<!pleural )(?:effusion|fluid){1,3}", {"effusion", "fluid"}),
        (r"lung|\d+ mm|\w", None),
        (r"(?i:lung)", None),
        (r"a*", None),
    ],
)
def test_required_literals_by_hand(pattern, literals):
    found = required_literals(pattern)
    assert (None if found is None else set(found)) == literals
