"""The scoreboard: beside the paper's tables, side by side, as HTML, and for the model card."""

import base64
import html.parser
import json
import re

import nibabel
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from samf.evaluation.report import html_report, scoreboard
from samf.evaluation.report import plots as report_plots
from samf.evaluation.report.html_report import (
    Heading,
    Paragraph,
    Reports,
    Section,
    Table,
    markdown_blocks,
    render_blocks,
    render_page,
)
from samf.evaluation.report.paper_tables import COLUMNS, PAPER_TABLES, TABLE_1, TABLE_2, TABLE_3
from samf.evaluation.report.side_by_side import (
    AGREES,
    CONTRADICTS,
    UNSUPPORTED,
    choose_reports,
    common_rows,
    compare_choices,
    extreme_reports,
    mark_report,
    marked_text,
    report_scores,
)
from samf.evaluation.scoring import predictions_digest, read_predictions

CHOICES = ["emphysema", "consolidation", "cardiomegaly", "lung nodule"]
REFERENCES = [
    "Emphysema is observed in both lungs. Pleural effusion was not detected.",
    "There is consolidation in the right lower lobe. Heart size is normal.",
    "Cardiomegaly is observed. No pericardial effusion was detected.",
    "A nodule of 5 mm is observed in the left upper lobe.",
    "Lungs are clear. No pleural effusion was detected.",
    "Pleural effusion is observed on the left. Emphysema was not observed.",
]
GOOD = [*REFERENCES[:4], "Lungs are clear.", "Pleural effusion is observed on the left."]
BAD = ["No emphysema was detected. Pleural effusion is observed.", "", "Heart size is normal.", *REFERENCES[4:5] * 3]


def make_rows(texts, answers, tokens: bool = True) -> list[dict]:
    rows = []
    for n, (reference, text) in enumerate(zip(REFERENCES, texts, strict=True)):
        base = {"id": f"report_valid_{n}_a_1", "scan_id": f"valid_{n}_a", "task": "report", "question": "Write."}
        rows.append({**base, "choices": None, "reference": reference, "prediction": text})
    for n, answer in enumerate(answers):
        base = {"id": f"q{n}", "scan_id": f"valid_{n}_a", "task": "multiple_choice", "question": f"Which | {n}?"}
        rows.append({**base, "choices": CHOICES, "reference": "(b) consolidation", "prediction": answer})
    return [{**row, "tokens": len(row["prediction"].split()), "truncated": False} for row in rows] if tokens else rows


@pytest.fixture
def write(tmp_path):
    def write_rows(name, rows):
        path = tmp_path / name / "predictions.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


@pytest.fixture
def good(write):
    return write("good", make_rows(GOOD, ["(b)", "b", "c", "b", "b", "no idea"]))


@pytest.fixture
def bad(write):
    return write("bad", make_rows(BAD, ["(a)", "b", "b", "c", "d", ""]))


# ---- the paper -------------------------------------------------------------------------------------------------------


def test_the_papers_figures_are_those_of_its_text():
    """Sums of the columns, added from the printed tables by hand; blanks are left out."""
    sums = {
        1: {
            "bleu_1": 1.979,
            "bleu_4": 1.040,
            "rouge_l": 2.037,
            "meteor": 2.175,
            "bertscore_f1": 4.380,
            "judge": 25.971,
        },
        2: {"bleu_1": 2.720, "rouge_l": 2.749, "meteor": 2.433, "judge": 2.782, "accuracy": 1.835}
        | {"precision": 1.800, "recall": 1.793, "f1": 1.796},
        3: {"bleu_1": 2.579, "bleu_4": 1.419, "rouge_l": 1.993, "meteor": 2.344},
    }
    for table in PAPER_TABLES:
        for column in table.columns:
            total = sum(row.values.get(column, 0) for row in table.rows)
            assert total == pytest.approx(sums[table.number][column], abs=1e-9), (table.number, column)
    assert [len(table.rows) for table in PAPER_TABLES] == [7, 3, 7]
    assert all(set(table.columns) <= set(COLUMNS) for table in PAPER_TABLES)


def test_what_can_not_be_right_in_the_paper_is_marked():
    """With counts that only fall from order to order BLEU-4 can't be above BLEU-1."""
    for table in PAPER_TABLES:
        for row in table.rows:
            impossible = "bleu_4" in row.values and row.values["bleu_4"] > row.values.get("bleu_1", 1)
            assert bool(row.suspect) == impossible, row.name
    assert "suspect" in scoreboard.paper_table(TABLE_3, []) and "0.419 (?)" in scoreboard.paper_table(TABLE_3, [])


def cells(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_our_figures_stand_in_the_papers_columns(good):
    system = scoreboard.load_system("ours", good, resamples=50)
    report = system.results["tasks"]["report"]
    ours = cells(scoreboard.paper_table(TABLE_1, [system]), "**ours**")
    assert ours[1].startswith(f"{report['text']['mean_bleu_1']:.3f} (") and "to" in ours[1]
    assert ours[3].startswith(f"{report['text']['rouge_l']:.3f}") and ours[6] == ""
    pooled = cells(scoreboard.paper_table(TABLE_1, [system]), "ours, BLEU with pooled counts")
    assert pooled[2].startswith(f"{report['text']['bleu_4']:.3f}")
    assert cells(scoreboard.paper_table(TABLE_1, [system]), "SAMF + Ao2D (paper)")[2] == "0.261"
    choice = cells(scoreboard.paper_table(TABLE_2, [system]), "**ours**")
    accuracy = system.results["tasks"]["multiple_choice"]["multiple_choice"]["accuracy"]
    assert accuracy == pytest.approx(4 / 6) and choice[5].startswith(f"{accuracy:.3f}")
    always = cells(scoreboard.paper_table(TABLE_2, [system]), "constant: always (b)")
    assert always[5] == f"1.000 ({0.025 ** (1 / 6):.3f} to 1.000)" and always[1] == pooled[3] == ""


def test_the_judges_mean_stands_under_llama_score(good):
    judged = add_judge(good, [row for row in read_predictions(good) if row["task"] == "report"])
    mean = np.mean([score["score"] for score in judged["scores"]])
    system = scoreboard.load_system("ours", good, resamples=0)
    cell = cells(scoreboard.paper_table(TABLE_1, [system]), "**ours**")[6]
    assert cell.startswith(f"{mean:.3f} (") and cell.endswith("; n 6)")
    assert "ours is judge-1" in scoreboard.paper_comparison([system])


def test_a_judge_of_other_answers_is_not_shown(good, tmp_path, caplog):
    rows = read_predictions(good)
    add_judge(good, [{**row, "id": f"other {row['id']}"} for row in rows])
    system = scoreboard.load_system("ours", good, resamples=0)
    assert system.judge is None and "are of other answers" in caplog.text
    assert "- judge.json: its scores are of other answers" in scoreboard.scoreboard_markdown([system])
    with pytest.raises(ValueError, match=r"judge\.json: its scores are of other answers"):
        scoreboard.load_system("ours", good, good.with_name("judge.json"), resamples=0)
    add_judge(good, rows[:2])
    assert "2 of 6 answers judged" in scoreboard.scoreboard_markdown([scoreboard.load_system("x", good, resamples=0)])
    good.with_name("judge.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"judge\.json: a JSON list; expected an object"):
        scoreboard.load_system("ours", good, resamples=0)


def test_results_of_other_answers_are_not_shown(good):
    """Another run's results.json beside the predictions, even of the same ids; an old one that has the same number."""
    rows, file = read_predictions(good), good.with_name("results.json")
    before = {
        "generation": {"written": 12, "resumed": 0, "seconds": 3.0, "failures": 0, "tasks": {}},
        "model": {"x": 1},
    }
    other = [{**rows[0], "prediction": "Another text."}, *rows[1:]]
    for made_of, shown in ((rows, True), (other, False), (None, True)):
        digest = {} if made_of is None else {"predictions_digest": predictions_digest(made_of)}
        file.write_text(json.dumps({**before, **digest}), encoding="utf-8")
        results = scoreboard.load_system("ours", good, resamples=0).results
        assert ("generation" in results, "model" in results) == (shown, shown)
        assert ("results.json" in results["notes"]) == (made_of is not rows)
    before["generation"]["written"] = 11
    file.write_text(json.dumps(before), encoding="utf-8")
    results = scoreboard.load_system("ours", good, resamples=0).results
    assert "generation" not in results and "is of other answers" in results["notes"]["results.json"]
    assert results["answers"]["report"]["answers"] == 6


def test_legends_cover_no_plot_rows(good, bad):
    systems = {name: scoreboard.load_system(name, path) for name, path in (("one", good), ("two", bad))}
    results = {name: system.results for name, system in systems.items()}
    plots = [report_plots.interval_plot(results, "report"), report_plots.finding_bars(results)]
    plots.append(report_plots.length_histogram({name: system.rows for name, system in systems.items()}))
    for plot in plots:
        canvas = FigureCanvasAgg(plot)
        canvas.draw()
        (axes,) = plot.axes
        legend = axes.get_legend().get_window_extent(canvas.get_renderer())
        assert not legend.overlaps(axes.get_window_extent())


# ---- side by side ----------------------------------------------------------------------------------------------------


def verdicts(report: str, reference: str) -> list[tuple[str, str]]:
    return [(span.verdict, span.text) for span in mark_report(report, reference).spans if span.verdict]


def test_statements_by_hand():
    reference = "Emphysema is observed. Pleural effusion was not detected. There is a nodule in the left lung."
    report = "No emphysema was detected. Pleural effusion was not seen. Cardiomegaly is present. The trachea is open."
    assert [verdict for verdict, _ in verdicts(report, reference)] == [CONTRADICTS, AGREES, UNSUPPORTED]
    assert verdicts(report, reference)[0][1] == "No emphysema was detected"
    assert mark_report(report, reference).missed == ("Lung nodule",)
    assert [v for v, _ in verdicts("There is no cardiomegaly.", reference)] == [], "nobody said anything of it"


@pytest.mark.parametrize(
    "report, verdict",
    [
        ("Consolidation is seen in the left lung.", CONTRADICTS),
        ("Consolidation is seen in the right lung.", AGREES),
        ("Consolidation is seen in both lungs.", AGREES),
        ("Consolidation is seen.", AGREES),
        ("Emphysema is seen in the left lung.", AGREES),  # the reference names no side
    ],
)
def test_a_finding_on_the_other_side_is_a_contradiction(report, verdict):
    marked = mark_report(report, "There is consolidation in the right lower lobe. Emphysema is observed.")
    assert [span.verdict for span in marked.spans if span.verdict] == [verdict]


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_report_agrees_with_itself_and_spans_add_up_to_it(reference):
    for text in (
        reference,
        reference.upper(),
        f"  {reference}\n\n{reference}",
        "肺 – nothing’s there. " + reference,
        "",
    ):
        marked = mark_report(text, reference)
        assert "".join(span.text for span in marked.spans) == text
        assert {span.verdict for span in marked.spans} <= {None, AGREES}
    assert mark_report(reference, reference).missed == ()


def test_marked_reports_as_text_and_html():
    marked = mark_report(
        "Emphysema is observed <b>.\nCardiomegaly is observed.", "No emphysema. Consolidation is seen."
    )
    assert "**✗ Emphysema is observed" in marked_text(marked) and "\n" not in marked_text(marked)
    assert "Not mentioned: Consolidation" in marked_text(marked)
    text = render_blocks([Reports("x", [("name", marked)])])
    assert f'<span class="{CONTRADICTS}">' in text and "<b>" not in text and "&lt;b&gt;" in text
    assert "<i>empty</i>" in render_blocks([Reports("x", [("name", mark_report("", "x"))])])


def test_report_scores_rank_cases():
    perfect, half, wrong, both_clear = report_scores(
        [
            {"prediction": REFERENCES[0], "reference": REFERENCES[0]},
            {"prediction": "Emphysema is observed. Cardiomegaly is seen.", "reference": REFERENCES[0]},
            {"prediction": "There is consolidation.", "reference": REFERENCES[0]},
            {"prediction": "Lungs are clear.", "reference": REFERENCES[4]},
        ]
    )
    assert perfect == pytest.approx(1.0) and perfect > half > wrong and both_clear >= 1 / 1.01


def test_cases_are_those_that_differ_most():
    first, second = make_rows(GOOD, []), make_rows(BAD, [])
    cases = choose_reports(first, second, 5)
    gap = report_scores(second) - report_scores(first)
    assert cases[0].id == first[int(np.argmin(gap))]["id"] and "first is better" in cases[0].why
    assert len({case.id for case in cases}) == len(cases) <= 5 and cases[-1].why == "the median difference"
    assert [case.id for case in choose_reports(first, first, 5)], "equal systems have a median case"
    assert choose_reports(first, [], 5) == []


def test_rows_are_matched_by_id_and_reference():
    first = make_rows(GOOD, [])
    second = [{**row, "prediction": "x"} for row in first[::-1]]
    second[0]["reference"] = "another"
    second.append({**first[0], "prediction": "a repeated id"})
    pairs = common_rows(first, [*second, {**first[1], "id": None}], "report")
    assert [a["id"] for a, _ in pairs] == [row["id"] for row in first[:-1]]
    assert all(a["id"] == b["id"] and b["prediction"] == "x" for a, b in pairs)


def test_questions_of_two_systems_by_hand(good, bad):
    """Right: good 1, 1, 0, 1, 1, 0; bad 0, 1, 1, 0, 0, 0."""
    counts = compare_choices(read_predictions(good), read_predictions(bad))
    assert [counts.questions, counts.both, counts.only_first, counts.only_second, counts.neither] == [6, 1, 3, 1, 1]
    assert [case.id for case in counts.cases] == ["q0", "q3", "q2"]


# ---- HTML ------------------------------------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Every tag closes in order; collects images and what would be loaded from elsewhere."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.elsewhere, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes["src"])
        self.elsewhere += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag in ("script", "link", "iframe"):
            self.elsewhere.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_markdown_becomes_html():
    text = "# Head\n\n| a | b |\n| --- | ---: |\n| x \\| y | **1** |\n\n- one <i>\n- two\n\nA line\nand more."
    page = render_blocks(markdown_blocks(text))
    assert "<h1>Head</h1>" in page and "<td>x | y</td><td><b>1</b></td>" in page and "<th>a</th>" in page
    assert "<li>one &lt;i&gt;</li><li>two</li>" in page and "<p>A line and more.</p>" in page
    Checker(page)


def test_everything_on_the_page_is_escaped():
    evil = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    marked = mark_report(f"Emphysema is observed {evil}.", f"No emphysema {evil}.")
    blocks = [
        Heading(3, evil),
        Paragraph(evil),
        Table([evil], [[evil]]),
        html_report.Image(b"png", evil),
        Reports(evil, [(evil, marked)]),
    ]
    text = render_page(evil, [Section(evil, [*blocks, *markdown_blocks(f"# {evil}\n\n- **{evil}**")])])
    page = Checker(text)
    assert "<script" not in text and page.elsewhere == [] and "49" not in text
    assert "".join(page.text).count("<script>alert(1)</script>\"'&{{ 7 * 7 }}") == 12
    assert 'alt="&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;{{ 7 * 7 }}"' in text


def test_worst_and_best_reports(good):
    cases = extreme_reports(read_predictions(good), 2)
    assert [row["id"] for row, _ in cases.worst] != [row["id"] for row, _ in cases.best]
    assert max(score for _, score in cases.worst) <= min(score for _, score in cases.best)
    one = extreme_reports(make_rows(GOOD, [])[:1], 3)
    assert len(one.worst) == 1 and not one.best, "one report is shown once"
    assert not extreme_reports([], 3).worst and not extreme_reports([], 3).best


def test_calibration_needs_judged_rows(good):
    rows = read_predictions(good)
    scores = [{"id": row["id"], "task": row["task"], "score": 1.0, "status": "scored"} for row in rows]
    assert len(report_plots.judge_calibration(rows, {"scores": scores}).axes) == 2
    assert report_plots.judge_calibration(rows, {"scores": []}) is None
    unscored = [{**score, "score": None} for score in scores]
    assert report_plots.judge_calibration(rows, {"scores": unscored}) is None


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Volumes of noise for four of the six reports, as the paper's CSV names them; one of them can't be read."""
    folder, lines = tmp_path / "data", ["image,caption"]
    rng = np.random.default_rng(0)
    for n in range(4):
        path = folder / f"valid_{n}" / f"valid_{n}_a" / f"valid_{n}_a_1.nii.gz"
        path.parent.mkdir(parents=True)
        hu = rng.integers(-1000, 400, (12, 11, 10)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([3.0, 3.0, 4.0, 1.0])), path)
        lines.append(f'{path.relative_to(folder)},"{REFERENCES[n]}"')
    path.write_bytes(b"no volume")
    (folder / "reports.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "reports.csv"


def add_judge(path, rows) -> dict:
    scores = [{"id": r["id"], "task": r["task"], "score": len(r["prediction"]) % 2, "status": "scored"} for r in rows]
    counts = {"count": 6, "scored": 6, "unparsed": 0, "failed": 0, "empty": 0, "without_reference": 0}
    tasks = {"report": {**counts, "mean": 0.5, "interval": None, "highest": 10.0}}
    judge = {"judge": {"model": "judge-1"}, "prompt_version": "1", "ranges": 3, "tasks": tasks, "scores": scores}
    path.with_name("judge.json").write_text(json.dumps(judge), encoding="utf-8")
    return judge


def test_one_command_writes_everything(good, bad, data, tmp_path, capsys):
    add_judge(good, read_predictions(good))
    add_judge(bad, read_predictions(bad))
    generation = {"written": 12, "resumed": 0, "seconds": 3.0, "failures": 1, "failure_kinds": {"CTReadError": 1}}
    timing = {"answers": 6, "empty": 0, "truncated": 0, "tokens": 60, "tokens_mean": 10.0, "tokens_longest": 12}
    timing |= {"seconds_per_volume": 2.5, "seconds_per_answer": 2.5, "tokens_per_second": 30.0}
    before = {"generation": {**generation, "tasks": {"report": timing}}}
    good.with_name("results.json").write_text(json.dumps(before), encoding="utf-8")
    output = tmp_path / "board"
    argv = [str(good), "--output", str(output), "--against", str(bad), "--names", "A <1>", "B", "--resamples", "100"]
    argv += ["--permutations", "100"]
    scoreboard.main([*argv, "--data", str(data)])
    assert "Table 1" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("results.json", "results.md", "against.json", "against.md", "comparison.json"),
        *("scoreboard.md", "report.html", "model_index.yaml", "pictures"),
    }
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["generation"] == before["generation"] and results["tasks"]["report"]["count"] == 6

    markdown = (output / "scoreboard.md").read_text(encoding="utf-8")
    parts = ("Table 1", "Table 2", "Table 3", "B to A <1>", "The same reports", "✗", "2.5", "1 CTReadError")
    for part in (*parts, "| judge's score |"):
        assert part in markdown, part
    assert cells(markdown, "6 questions | both")[1:] == ["both right", "only A <1>", "only B", "neither"]

    page = Checker((output / "report.html").read_text(encoding="utf-8"))
    assert page.elsewhere == [] and "A <1>" in "".join(page.text)
    sizes = []
    for source in page.images:
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        (tmp_path / "image.png").write_bytes(png)
        sizes.append(Image.open(tmp_path / "image.png").size)
    pictures = len(list((output / "pictures").iterdir()))
    assert pictures == 3 and len(sizes) == 6 + pictures and min(min(size) for size in sizes) > 100
    assert "can't be shown" in "".join(page.text) and "No volume of this id" in "".join(page.text)


def test_the_model_index_is_what_the_hub_reads(good, tmp_path):
    argv = [str(good), "--output", str(tmp_path / "board"), "--names", "samf", "--resamples", "50"]
    scoreboard.main([*argv, "--dataset", "ibrahimhamamci/CT-RATE"])
    index = yaml.safe_load((tmp_path / "board" / "model_index.yaml").read_text(encoding="utf-8"))["model-index"]
    name, evaluations = model_index_to_eval_results(index)
    results = json.loads((tmp_path / "board" / "results.json").read_text(encoding="utf-8"))["tasks"]
    assert name == "samf" and {e.dataset_type for e in evaluations} == {"ibrahimhamamci/CT-RATE"}
    found = {e.metric_name: e.metric_value for e in evaluations}
    assert found["Accuracy"] == pytest.approx(results["multiple_choice"]["multiple_choice"]["accuracy"], abs=1e-4)
    assert found["BLEU-4"] == pytest.approx(results["report"]["text"]["bleu_4"], abs=1e-4)
    (accuracy,) = [e for e in evaluations if e.metric_name == "Accuracy"]
    assert accuracy.metric_args["interval_95"][0] <= accuracy.metric_value <= accuracy.metric_args["interval_95"][1]
    card = ModelCardData(model_name=name, eval_results=evaluations)
    assert "CT-RATE" in card.to_yaml()


CARD = """---
license: apache-2.0
tags: [samf]
model-index:
- name: ours
  results:
  - task: {type: image-text-to-text, name: Chest CT report generation}
    dataset: {type: ibrahimhamamci/CT-RATE, name: CT-RATE, split: valid}
    metrics: [{type: bleu, name: BLEU-1, value: 0.999}]
  - task: {type: image-text-to-text, name: Another}
    dataset: {type: ibrahimhamamci/CT-RATE, name: CT-RATE, split: valid}
    metrics: [{type: accuracy, name: Accuracy, value: 0.5}]
---

# Ours

Text that stays.
"""


def test_the_model_index_goes_into_a_card(good, tmp_path):
    """Twice, and from a card that held one of these results already: each result is there once, the text untouched."""
    card = tmp_path / "README.md"
    card.write_text(CARD, encoding="utf-8")
    argv = [str(good), "--output", str(tmp_path / "board"), "--resamples", "20", "--card", str(card)]
    argv += ["--dataset", "ibrahimhamamci/CT-RATE"]
    scoreboard.main(argv)
    scoreboard.main(argv)
    loaded = ModelCard.load(card)
    assert loaded.text.strip() == "# Ours\n\nText that stays." and loaded.data.license == "apache-2.0"
    assert loaded.data.model_name == "ours"
    results = {(e.task_name, e.metric_name): e.metric_value for e in loaded.data.eval_results}
    assert results["Another", "Accuracy"] == 0.5
    assert results["Chest CT report generation", "BLEU-1"] != 0.999
    assert len(results) == len(loaded.data.eval_results)
    assert ("Chest CT multiple-choice question answering", "Accuracy") in results


def test_a_card_that_is_none_is_an_error(good, tmp_path, capsys):
    argv = [str(good), "--card", str(tmp_path / "README.md")]
    for more, message in (([], "--card needs --dataset"), (["--dataset", "x/y"], "expected a model card")):
        with pytest.raises(SystemExit):
            scoreboard.main([*argv, *more])
        assert message in capsys.readouterr().err
    (tmp_path / "README.md").write_text("---\n[\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match="repair the block"):
        scoreboard.write_to_card(tmp_path / "README.md", [{"name": "x", "results": []}])
    (tmp_path / "README.md").write_text("# No metadata\n", encoding="utf-8")
    scoreboard.write_to_card(tmp_path / "README.md", [{"name": "x", "results": []}])
    assert yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1]) == {
        "model-index": [{"name": tmp_path.name, "results": []}]
    }


ODD = ["", "word " * 10_000, "line\nbreak | pipe", "肺野清晰 <script>alert(1)</script>", "\x00\u2028", "  "]


def test_odd_predictions_make_a_board(write, tmp_path):
    rows = make_rows(ODD, ODD, tokens=False)
    rows[1] = {key: value for key, value in rows[1].items() if key not in ("id", "scan_id")}
    rows[3]["id"] = rows[2]["id"]
    rows[4]["reference"] = rows[8]["reference"] = ""
    path = write("odd", rows)
    options = ["--resamples", "20", "--against", str(path), "--permutations", "20"]
    scoreboard.main([str(path), "--output", str(tmp_path / "board"), *options])
    page = (tmp_path / "board" / "report.html").read_text(encoding="utf-8")
    assert Checker(page).elsewhere == [] and "<script>" not in page


def test_reports_alone_and_questions_alone(write, tmp_path):
    for name, rows in (("reports", make_rows(GOOD, [])), ("questions", make_rows(GOOD, ["b"])[6:])):
        path = write(name, rows)
        scoreboard.main([str(path), "--output", str(tmp_path / f"{name}_board"), "--resamples", "0"])
        Checker((tmp_path / f"{name}_board" / "report.html").read_text(encoding="utf-8"))


def test_errors_say_what_to_do(good, write, tmp_path):
    other = write("other", [{**row, "id": f"x{n}"} for n, row in enumerate(make_rows(GOOD, []))])
    for argv, message in (
        ([str(tmp_path / "nowhere.jsonl")], "no such file"),
        ([str(good), "--against", str(other)], "answers none of the records"),
        ([str(good), "--judge", str(tmp_path / "no.json")], "no such file"),
        ([str(good), "--data", str(tmp_path / "no_data")], "no such folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            scoreboard.main([*argv, "--resamples", "0"])
    good.with_name("judge.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match="not JSON"):
        scoreboard.main([str(good), "--resamples", "0"])
