"""Which option an answer names, and the scores that follow."""

import pytest

from samf.evaluation.metrics.multiple_choice import (
    not_rotated,
    parse_choice,
    position_bias,
    rotated_records,
    score_multiple_choice,
)
from samf.evaluation.results_table import position_bias_table

CHOICES = ["A few millimetric nodules", "Normal aeration", "Pleural effusion on the left", "Not visible"]

NAMES_B = """
b | B | B. | (b) | (B) | b) | [b] | b: | {b} | <b> | **b** | **B.** Normal aeration | "b" | `b` | b. Normal aeration
(b) Normal aeration | b) Normal aeration | B. Normal aeration | b: Normal | b - Normal | (b)Normal aeration | b; Normal
The answer is b | The answer is b. | the correct answer is (b) | The correct answer is (b) Normal aeration.
Answer: B | answer:b | Answer = b | Answer: (b) | answer(b) | Answer b | Answer choice: b | The answer is: b | Answer - b
Option b | Option (b) | Choice B | Option B is correct | b is correct | (b) is the correct answer | B is the answer
The best option is b because the lungs are clear | The correct choice is option b | The answer is option (b).
Normal aeration | normal aeration. | NORMAL   AERATION | The answer is Normal aeration | Answer: normal aeration.
Normal aeration (b) | Option a is wrong, option b is right | Option c is wrong, option b is right
I choose b | I would select (b) | I'd go with B. | My choice: b | Selected option: b | It is (b). | It's b. | It would be (b)
Final answer: b | Maybe (c)? No. Final answer: b | The final answer is (b). | Sure! The answer is (b). | The answer is **(b)**
$\\boxed{b}$ | \\boxed{\\text{B}} | <answer>b</answer> | {"answer": "b"} | (b) Normal aeration<multiple_choice> | b<|end|>
（b） | Ｂ | （Ｂ） Normal aeration | The answer is b, since neither a nodule nor an effusion is seen | _b_ | ***(b)***
(c) is incorrect. The answer is (b). | (b) Normal aeration, not (as before) reduced | b — Normal aeration
"""
NAMES_NONE = """
e | (e) | The answer is (f) | A nodule is seen | The answer is a nodule | A large effusion | a or b | a, b | (a) and (b)
b/c | b & c | B, C | (a) A few millimetric nodules (b) Normal aeration | answer (a), answer (b) | Normal
The answer is not b | Both lungs are clear | I don't know | 不知道 | I think there is effusion | abcd | 2 | bb | - | ???
Normal aeration, pleural effusion on the left | c. effusion a) no | Answer: b and c | Answer: b, c | The answer is (b) or (c)
The answer is b or c. | I choose b/c | الجواب صحيح | Ответ неизвестен | 😀 | It is a nodule | No. | I | I am not sure
Option b is wrong | b is incorrect | Final answer: b or c | The answer depends | boxed{} | () | (?) | Answer: | The answer is
"""


def forms(table: str) -> list[str]:
    return [form.strip() for line in table.strip().splitlines() for form in line.split(" | ")]


OTHER_FORMS_OF_B = ["\nb\n", "b\n\nBecause the lung is clear", "The answer is\nb", "(b)\nNormal aeration", "\t(b) \r\n"]


def test_the_tables_hold_at_least_sixty_forms():
    assert len(set(forms(NAMES_B))) >= 60 and len(set(forms(NAMES_NONE))) >= 40


@pytest.mark.parametrize("answer", [*forms(NAMES_B), *OTHER_FORMS_OF_B])
def test_names_b(answer):
    assert parse_choice(answer, CHOICES) == 1


@pytest.mark.parametrize("answer", [*forms(NAMES_NONE), "", "   ", "\n", "\x00", "b\u0301", "a\nb"])
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
        ("{'answer': a}", 0),
        ("I choose (a)", 0),
        ("It is a.", 0),
        ("My answer is C, effusion", 2),
        ("d. Not visible.", 3),
        ("(c) Pleural effusion on the left, not (as before) on the right", 2),
        ("The answer is c, a large effusion", 2),
    ],
)
def test_names_another(answer, index):
    """ "a" is a word too: it counts as a letter only where no word can be meant."""
    assert parse_choice(answer, CHOICES) == index


def test_ten_thousand_words_are_read_quickly_and_by_their_beginning():
    for words in ("effusion ", "a ", "b or ", "(b) ", "is ", "the answer ", "option choice answer "):
        text = words * (10_000 // len(words.split()))
        assert parse_choice(text, CHOICES) in (None, 1)
    assert parse_choice("(b) Normal aeration. " + "The lungs are clear. " * 2500, CHOICES) == 1
    assert parse_choice("The lungs are clear. " * 2500, CHOICES) is None


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


def test_wrong_numbers_are_errors():
    with pytest.raises(ValueError, match="0 predictions"):
        score_multiple_choice([], [], [])
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        score_multiple_choice(["a"], ["a", "b"], [CHOICES])


@pytest.mark.parametrize("reference", ["", "nothing of these", "(e)", "a or b"])
def test_a_question_without_a_right_option_is_left_out_and_counted(reference):
    scores = score_multiple_choice(["a", "b"], ["a", reference], [CHOICES, CHOICES])
    assert scores["count"] == 1 and scores["accuracy"] == 1 and scores["without_reference"] == 1
    alone = score_multiple_choice(["b"], [reference], [CHOICES])
    assert alone["count"] == 0 and alone["accuracy"] is None and alone["without_reference"] == 1


@pytest.mark.parametrize("prediction", ["", "b " * 10_000, "\n", "不知道", "\u2028", "(b)\x00"])
def test_odd_predictions_have_a_result(prediction):
    scores = score_multiple_choice([prediction, "a"], ["a", "a"], [CHOICES, CHOICES])
    assert scores["count"] == 2 and scores["accuracy"] == 0.5


# ---- does the place matter? ------------------------------------------------------------------------------------------


def question(number: int, right: int, choices=CHOICES) -> dict:
    answer = f"({'abcdefghij'[right]}) {choices[right]}"
    return {"id": f"q{number}", "task": "multiple_choice", "choices": list(choices), "answer": answer, "volume": None}


def answered(records, choose) -> list[dict]:
    """Rows of predictions in which `choose(choices)` gives the place that is named."""
    rows = []
    for record in records:
        place = choose(record["choices"])
        prediction = "no idea" if place is None else f"({'abcd'[place]}) {record['choices'][place]}"
        rows.append({**record, "reference": record["answer"], "prediction": prediction})
    return rows


def test_rotations_put_every_option_once_at_every_letter():
    record = question(7, right=2)
    rotations = rotated_records([record])
    assert [r["id"] for r in rotations] == ["q7@0", "q7@1", "q7@2", "q7@3"]
    assert {**rotations[0], "id": "q7"} == record
    for place in range(4):
        assert sorted(r["choices"][place] for r in rotations) == sorted(CHOICES)
    for r in rotations:
        assert parse_choice(r["answer"], r["choices"]) == r["choices"].index(CHOICES[2])
        assert r["choices"][parse_choice(r["answer"], r["choices"])] == CHOICES[2]


def test_records_that_cannot_be_rotated_are_left_out():
    bound = ["Emphysema", "Effusion", "Both (a) and (b)", "None of the above"]
    other = {**question(3, 0), "task": "report", "choices": None, "answer": "Normal."}
    senseless = {**question(4, 0), "answer": "something else"}
    records = [question(1, 0, bound), other, senseless, question(5, 0, ["Emphysema"]), question(6, 1)]
    assert {r["id"].partition("@")[0] for r in rotated_records(records)} == {"q6"}
    reasons = not_rotated(records)
    assert list(reasons.values()) == [1, 1, 1] and "options that speak of others' places" in reasons


def test_a_model_that_goes_by_content_has_no_bias():
    records = rotated_records([question(n, right=1) for n in range(5)])
    bias = position_bias(answered(records, lambda choices: choices.index("Normal aeration")))
    assert bias["questions"] == 5 and bias["accuracy"] == 1 == bias["consistency"]
    assert bias["named_by_letter"] == dict.fromkeys("abcd", 0.25) and set(bias["accuracy_by_letter"].values()) == {1.0}
    wrong = position_bias(answered(records, lambda choices: choices.index("Not visible")))
    assert wrong["accuracy"] == 0 and wrong["consistency"] == 1


def test_a_model_that_always_says_b_is_found_out():
    """Right whenever the right option stands at b: once in four rotations."""
    records = rotated_records([question(n, right=n % 4) for n in range(8)])
    bias = position_bias(answered(records, lambda choices: 1))
    assert bias["accuracy"] == 0.25 and bias["consistency"] == 0 and bias["named_by_letter"] == {"b": 1.0}
    assert bias["accuracy_by_letter"] == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
    first = position_bias(answered(rotated_records([question(n, right=1) for n in range(3)]), lambda choices: 1))
    assert (first["accuracy_lowest"], first["accuracy_highest"]) == (0.0, 1.0)


def test_unparsed_and_incomplete_questions():
    records = rotated_records([question(n, right=0) for n in range(3)])
    rows = answered(records, lambda choices: None)
    bias = position_bias(rows[1:])  # question 0 lacks a rotation
    assert bias["questions"] == 2 and bias["incomplete"] == 1 and bias["unparsed"] == 8 and bias["consistency"] == 0
    assert position_bias([])["questions"] == 0 and position_bias(rows[:2])["accuracy"] is None
    assert "no question was answered" in position_bias_table(position_bias([]))
    table = position_bias_table({**bias, "left_out": {"the answer is none of the options": 3}})
    assert "not included: 3 (the answer is none of the options), 1 (not answered in all rotations)" in table
    assert "8 answers named no option" in table


def test_bias_has_intervals_over_patients():
    """Two patients with ten questions each, one right in all rotations and one in none: draws give 0, 1/2 or 1."""
    records = rotated_records([question(n, right=1) for n in range(20)])
    rows = answered(records, lambda choices: choices.index("Normal aeration"))
    for row in rows:
        patient = int(row["id"].partition("@")[0][1:]) % 2
        row["scan_id"] = f"valid_{patient}_a"
        row["prediction"] = row["prediction"] if patient else "no idea"
    bias = position_bias(rows)
    assert bias["accuracy"] == bias["consistency"] == 0.5
    for bounds in bias["intervals"].values():
        assert bounds == pytest.approx([0, 1], abs=1e-3), "two patients that have nothing in common say nothing"
    assert "accuracy 0.500 (0.000 to 1.000)" in position_bias_table(bias)
    assert position_bias(rows, intervals=False)["intervals"] == {"accuracy": None, "consistency": None}
