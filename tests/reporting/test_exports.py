"""Reports as files: what is written is what was in the report, on every page."""

import re

import pytest
from matplotlib.backends.backend_agg import RendererAgg

from samf.model.report_samf import DISCLAIMER, REPORT_QUESTION, Provenance, Report, Sentence, split_sentences
from samf.reporting.exports import export, writer
from samf.reporting.exports import pages as drawing
from samf.reporting.exports.record import read_reports

TEXT = "Size ≥ 5 µm, $ a $ b < c. Плевральный выпот. " + "A consolidation is seen in the right lower lobe. " * 80


def report(text: str = TEXT, question: str = REPORT_QUESTION) -> Report:
    sentences = tuple(Sentence(text[a:b], a, b, 4, -1.0) for a, b in split_sentences(text))
    made = Provenance("/secret/patients/scan_1.nii.gz", (10, 20, 30), (1.0, 1.0, 2.5), "LPS", "abc", "runs/model")
    warnings = ("/secret/patients/scan_1.nii.gz: axes 20° off",)
    return Report(text, question, sentences, made, {"Emphysema": 0.25, "Lung nodule": 1.0}, warnings=warnings)


@pytest.fixture
def drawn(monkeypatch) -> list[list[str]]:
    """The texts of each page of the PDFs that are saved, in order."""
    found: list[list[str]] = []
    save = drawing.Pages.save

    def keep(self, path, title):
        save(self, path, title)
        found.extend([text.get_text() for text in figure.texts] for figure in self.figures)

    monkeypatch.setattr(drawing.Pages, "save", keep)
    return found


def test_pdf_has_every_word_and_the_disclaimer_on_every_page(drawn, tmp_path):
    (file,) = export([report()], tmp_path, "scan", ["pdf"])
    data = file.read_bytes()
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", data)) == len(drawn) > 1
    assert b"/CIDFontType2" in data and b"/ToUnicode" in data  # embedded TrueType, searchable
    assert all(DISCLAIMER in page[-1] and f"of {len(drawn)}" in page[-1] for page in drawn)
    words = " ".join(line for page in drawn for line in page[:-1])
    for word in set(TEXT.split()):
        assert word in words.split(), word
    assert words.count("consolidation") == TEXT.count("consolidation")
    assert words.index("Lung nodule") < words.index("Emphysema")  # by probability
    assert "scan_1.nii.gz: axes" in words and "/secret" not in words and b"/secret" not in data


def test_equal_reports_give_equal_pdfs(tmp_path):
    first, second = (export([report("Normal.")], tmp_path, name, ["pdf"])[0].read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("text", ["one two three " * 30, "x" * 400, "short", "", "a\nb", "日本語" * 60])
def test_wrapping_loses_nothing_and_keeps_to_the_width(text):
    lines = list(drawing.wrapped(text, 200.0, 10.0))
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    renderer = RendererAgg(1, 1, 72)
    for line in lines:
        assert renderer.get_text_width_height_descent(line, drawing._font(10.0, False), ismath=False)[0] <= 201


def test_answers_go_together_and_come_back(tmp_path):
    answers = [report("Yes.", "Is there emphysema?"), report("No.", "Is the heart enlarged?")]
    files = export(answers, tmp_path / "new", "scan", ["txt", "json", "pdf"])
    assert [file.name for file in files] == ["scan.txt", "scan.json", "scan.pdf"]
    assert read_reports(files[1]) == answers
    text = files[0].read_text(encoding="utf-8")
    assert text.index("emphysema?\nYes.") < text.index("enlarged?\nNo.") < text.index(DISCLAIMER)


def test_the_record_of_something_else_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "scan.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="scan.json: not a report"):
        read_reports(tmp_path / "scan.json")
    with pytest.raises(KeyError):
        writer("doc")
