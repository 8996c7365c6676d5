"""Which option an answer names, and the scores that follow."""

import pytest

from samf.evaluation.multiple_choice import parse_choice, score_multiple_choice

CHOICES = ["A few millimetric nodules", "Normal aeration", "Pleural effusion on the left", "Not visible"]

NAMES_B = """
b | B | B. | (b) | (B) | b) | [b] | b: | {b} | **b** | **B.** Normal aeration | "b" | `b` | b. Normal aeration
(b) Normal aeration | b) Normal aeration | B. Normal aeration | b: Normal | b - Normal | (b)Normal aeration
The answer is b | The answer is b. | the correct answer is (b) | The correct answer is (b) Normal aeration.
Answer: B | answer:b | Answer = b | Answer: (b) | answer(b) | Answer b | Answer choice: b | The answer is: b
Option b | Option (b) | Choice B | Option B is correct | b is correct | (b) is the correct answer | B is the answer
The best option is b because the lungs are clear | The correct choice is option b | The answer is option (b).
Normal aeration | normal aeration. | NORMAL   AERATION | The answer is Normal aeration | Answer: normal aeration.
Normal aeration (b) | Option a is wrong, option b is right
"""
NAMES_NONE = """
e | (e) | The answer is (f) | A nodule is seen | The answer is a nodule | A large effusion | a or b | a, b | (a) and (b)
b/c | b & c | B, C | (a) A few millimetric nodules (b) Normal aeration | answer (a), answer (b) | Normal
The answer is not b | Both lungs are clear | I don't know | 不知道 | I think there is effusion | abcd | 2 | bb | - | ???
Normal aeration, pleural effusion on the left | c. effusion a) no
"""


def forms(table: str) -> list[str]:
    return [form.strip() for line in table.strip().splitlines() for form in line.split(" | ")]


@pytest.mark.parametrize("answer", [*forms(NAMES_B), "\nb\n", "b\n\nBecause the lung is clear", "The answer is\nb"])
def test_names_b(answer):
    assert parse_choice(answer, CHOICES) == 1


@pytest.mark.parametrize("answer", [*forms(NAMES_NONE), "", "   ", "\n"])
def test_names_none(answer):
    assert parse_choice(answer, CHOICES) is None


@pytest.mark.parametrize(
    "answer, index",
    [
        ("a", 0),
        ("A.", 0),
        ("The answer is a", 0),
        ("The answer is (a)", 0),
        ("A few millimetric nodules", 0),
        ("The answer is a few millimetric nodules", 0),
        ("(a) A few millimetric nodules", 0),
        ("My answer is C, effusion", 2),
        ("d. Not visible.", 3),
        ("(c) Pleural effusion on the left, not (as before) on the right", 2),
    ],
)
def test_names_another(answer, index):
    """ "a" is a word too: it counts as a letter only where no word can be meant."""
    assert parse_choice(answer, CHOICES) == index


@pytest.mark.parametrize("index", range(4))
def test_every_form_of_the_data_is_read(index):
    """CT-RATE's "(b) text" and the paper's CSVs' letter and text."""
    for answer in (f"({'abcd'[index]}) {CHOICES[index]}", "abcd"[index], CHOICES[index]):
        assert parse_choice(answer, CHOICES) == index


def test_option_text_wins_over_a_letter_in_it():
    assert parse_choice("C. difficile colitis", ["Crohn's disease", "C. difficile colitis", "Normal"]) == 1


def test_numbers_as_options():
    assert [parse_choice(answer, ["0", "1", "2", "a"]) for answer in ("2", "The answer is 1.", "(b) 1", "a")] == [
        2,
        1,
        1,
        0,
    ]


def test_a_text_that_two_options_share_names_none():
    assert parse_choice("normal", ["Normal", "normal.", "Enlarged"]) is None


def test_scores_by_hand():
    """Right a, a, b, b; answered a, b, b, nothing: a has P 1, R 1/2, F1 2/3 and b has P 1/2, R 1/2, F1 1/2."""
    scores = score_multiple_choice(
        ["(a)", "b", "The answer is b", "no idea"],
        ["(a) x", "a", "(b) y", "z"],
        [["x", "y", "z", "w"]] * 3 + [["x", "z"]],
    )
    assert scores["count"] == 4 and scores["unparsed"] == 1
    assert scores["accuracy"] == 0.5
    assert scores["precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["recall"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert scores["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["chance"] == pytest.approx((3 * 1 / 4 + 1 / 2) / 4)


def test_unparsed_answers_are_wrong():
    scores = score_multiple_choice(["", "a or b"], ["a", "b"], [CHOICES, CHOICES])
    assert scores["accuracy"] == 0 and scores["unparsed"] == 2 and scores["f1"] == 0


def test_wrong_numbers_and_references_are_errors():
    with pytest.raises(ValueError, match="0 predictions"):
        score_multiple_choice([], [], [])
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        score_multiple_choice(["a"], ["a", "b"], [CHOICES])
    with pytest.raises(ValueError, match="'nothing of these' names none"):
        score_multiple_choice(["a"], ["nothing of these"], [CHOICES])
