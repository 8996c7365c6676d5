"""The page's HTML: whatever a model or a file says is text there, and disagreements are to be seen."""

import dataclasses
from html.parser import HTMLParser

from samf.model.agreement_samf import Disagreement
from samf.model.report_samf import Provenance, Report, Sentence
from samf.web import markup

EVIL = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(1)> {{value}} ${1+1}'


class Elements(HTMLParser):
    """Names and attributes of all elements, and all text."""

    def __init__(self, html):
        super().__init__()
        self.found, self.words, self.open = [], "", []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def report(**changes):
    made = Provenance("scan", (3, 4, 5), (1.0, 1.5, 2.25), "LPS", "hash", EVIL)
    sentences = (
        Sentence(EVIL, 0, 1, findings={EVIL: "present"}),
        Sentence("No nodule.", 2, 3, findings={"Lung nodule": "absent"}),
        Sentence("Clear.", 4, 5),
    )
    doubts = (Disagreement("Lung nodule", "absent", 0.91, 1), Disagreement("Emphysema", "nothing", 0.8))
    base = Report(
        "text", "?", sentences, made, {EVIL: 0.25, "Lung nodule": 0.91, "Emphysema": 0.8}, False, (EVIL,), doubts
    )
    return dataclasses.replace(base, **changes)


def test_nothing_that_a_model_or_a_file_says_becomes_markup():
    one = report()
    for html in (
        markup.report_html(one, True), markup.findings_html(one), markup.facts_html(one, EVIL, 1.0), markup.draft_html(EVIL),
        markup.failure_html(EVIL), markup.answers_html([(EVIL, EVIL)]), markup.steps_html("read", EVIL),
    ):  # fmt: skip
        parsed = Elements(html)
        names = {name for name, _ in parsed.found}
        assert names <= {"ol", "ul", "li", "p", "span", "button", "dl", "dt", "dd", "div"}, names
        assert not any(key.startswith("on") for _, attributes in parsed.found for key in attributes)
        assert "<script>alert(1)</script>" in parsed.words


def test_sentences_are_numbered_buttons_and_the_doubtful_one_is_flagged():
    parsed = Elements(markup.report_html(report(), explained=True))
    buttons = [attributes for name, attributes in parsed.found if name == "button"]
    assert [button["data-sentence"] for button in buttons] == ["0", "1", "2"]
    assert ["doubted" in button["class"] for button in buttons] == [False, True, False]
    assert "check: Lung nodule 0.91" in parsed.words
    assert all("aria-disabled" not in button for button in buttons)
    waiting = Elements(markup.report_html(report(), explained=False))
    assert all(attributes["aria-disabled"] == "true" for name, attributes in waiting.found if name == "button")


def test_findings_are_sorted_meters_next_to_what_the_text_says():
    parsed = Elements(markup.findings_html(report()))
    meters = [attributes for _, attributes in parsed.found if attributes.get("role") == "meter"]
    assert [meter["aria-valuenow"] for meter in meters] == ["0.91", "0.80", "0.25"]
    assert parsed.words.count("check") == 2 and "text: not mentioned" in parsed.words and "text: absent" in parsed.words


def test_the_running_step_is_the_current_one():
    parsed = Elements(markup.steps_html("encode", "Encoding"))
    states = [attributes["class"] for name, attributes in parsed.found if name == "li"]
    assert states == ["done", "done", "active", "next", "next"]
    assert [attributes.get("aria-current") for name, attributes in parsed.found if name == "li"].count("step") == 1
    done = Elements(markup.steps_html("done", "Done", "done"))
    assert all(attributes["class"] == "done" for name, attributes in done.found if name == "li")


def test_a_report_without_text_or_findings_says_so():
    empty = report(sentences=(), findings={}, disagreements=(), truncated=True)
    assert "no text" in markup.report_html(empty, True) and "limit" in markup.report_html(empty, True)
    assert "no probabilities" in markup.findings_html(empty) and markup.answers_html([]) == ""
