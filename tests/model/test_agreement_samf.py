"""What sentences say about findings, and where the findings' probabilities disagree."""

import pytest

from samf.model.agreement_samf import Disagreement, find_disagreements, said_of_findings
from samf.model.report_samf import (
    Provenance,
    Report,
    assign_tokens,
    locate_tokens,
    make_sentences,
    split_sentences,
)

TEXT = (
    "Heart size is normal, cardiomegaly was not observed. A lung nodule is observed in the left upper lobe. "
    "Consolidation may be present.\nNo pleural effusion was detected. Bone structures are natural."
)


def said_in(text: str):
    return said_of_findings(text, split_sentences(text))


def test_each_sentence_has_its_own_findings():
    assert said_in(TEXT) == [
        {"Cardiomegaly": "absent"},
        {"Lung nodule": "present"},
        {"Consolidation": "uncertain"},
        {"Pleural effusion": "absent"},
        {},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No nodule in the right lung, a nodule in the left lung.", [{"Lung nodule": "present"}]),
        ("Emphysema.  EMPHYSEMA.", [{"Emphysema": "present"}] * 2),
        ("No emphysema. Emphysema is seen.", [{"Emphysema": "absent"}, {"Emphysema": "present"}]),
        ("(b) emphysema", [{}]),
        ("", []),
    ],
)
def test_what_sentences_say(text, expected):
    assert said_in(text) == expected


def test_repeated_sentences_are_each_read_where_they_are():
    text = "No emphysema was detected. " * 3 + "There is a nodule. No emphysema was detected."
    assert said_in(text) == [{"Emphysema": "absent"}] * 3 + [{"Lung nodule": "present"}, {"Emphysema": "absent"}]


def test_disagreements_are_contradictions_and_silence():
    probabilities = {
        "Cardiomegaly": 0.9,  # the text says absent
        "Lung nodule": 0.2,  # the text says present
        "Consolidation": 0.99,  # the text is uncertain
        "Pleural effusion": 0.05,  # both say absent
        "Emphysema": 0.7,  # the text is silent
        "Atelectasis": 0.1,  # both silent
        "Rib fracture": 0.99,  # no text is read for it
    }
    assert find_disagreements(said_in(TEXT), probabilities) == (
        Disagreement("Cardiomegaly", "absent", 0.9, 0),
        Disagreement("Lung nodule", "present", 0.2, 1),
        Disagreement("Emphysema", "nothing", 0.7, None),
    )
    assert [item.finding for item in find_disagreements(said_in(TEXT), probabilities, is_report=False)] == [
        "Cardiomegaly",
        "Lung nodule",
    ]
    kept = find_disagreements(said_in(TEXT), probabilities, margin=0.35)
    assert [item.finding for item in kept] == ["Cardiomegaly"]


def test_a_negation_elsewhere_is_no_disagreement():
    """The nodule on the left is meant; "no nodule" of another place doesn't contradict it."""
    said = said_in("No nodule is seen in the right lung. A nodule is seen in the left lung.")
    assert find_disagreements(said, {"Lung nodule": 0.9}) == ()
    assert find_disagreements(said, {"Lung nodule": 0.1}) == (Disagreement("Lung nodule", "present", 0.1, 1),)


def test_every_token_belongs_to_one_sentence_by_its_first_letter():
    """As a tokenizer with leading blanks cuts it: " No" begins the second sentence, and a blank alone ends the first."""
    tokens = [" ", "Heart", " normal", ".", " No", " effusion", ".", " ", "\n", "Emphysema", "."]
    text, values = "".join(tokens), [-float(index + 1) for index in range(len(tokens))]
    places = [len("".join(tokens[:index])) for index in range(len(tokens))]
    first, second, third = make_sentences(text, places, values)
    assert [first.text, second.text, third.text] == ["Heart normal.", "No effusion.", "Emphysema."]
    assert [first.tokens, second.tokens, third.tokens] == [4, 5, 2]
    assert first.log_probability == -10 and third.log_probability == -21
    assert sum(sentence.log_probability for sentence in (first, second, third)) == sum(values)
    for sentence in (first, second, third):
        assert text.strip()[sentence.start : sentence.end] == sentence.text
    assert first.token_probability == pytest.approx(2.718281828 ** (-10 / 4))
    assert second.findings == {"Pleural effusion": "absent"}


class Letters:
    """A tokenizer of one letter per id; 0 is special."""

    all_special_ids = (0,)

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(token) for token in ids if token)


def test_special_tokens_belong_to_no_sentence():
    ids = [0, *map(ord, "One. "), 0, *map(ord, "Two."), 0]
    text, kept, places = locate_tokens(Letters(), ids)
    assert text == "One. Two." and [ids[index] for index in kept] == list(map(ord, text))
    first, second = assign_tokens(text, split_sentences(text), places)
    assert [text[places[index]] for index in first] == list("One. ") and len(first) + len(second) == len(kept)


def test_a_report_with_disagreements_survives_its_json_and_shows_them_in_its_text():
    sentences = make_sentences("A lung nodule is seen.", [0], [-2.0])
    made = Provenance("scan", (1, 1, 1), (1.0, 1.0, 1.0), "RAS", "", "model")
    flags = find_disagreements([sentences[0].findings], {"Lung nodule": 0.25, "Emphysema": 0.75})
    report = Report("A lung nodule is seen.", "?", sentences, made, {"Lung nodule": 0.25}, disagreements=flags)
    assert Report.from_json(report.to_json()) == report
    assert report.to_dict()["sentences"][0]["token_probability"] == pytest.approx(2.718281828**-2)
    assert report.to_text().splitlines() == [
        "A lung nodule is seen.",
        "check: Lung nodule: the report says present, but its probability is 0.25",
        "check: Emphysema: the report doesn't mention it, but its probability is 0.75",
    ]
    before = {name: value for name, value in report.to_dict().items() if name != "disagreements"}
    assert Report.from_dict(before).disagreements == (), "reports of earlier versions are read"
