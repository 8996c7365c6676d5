"""What the page does for a visitor: read, encode, write, explain, answer. It knows nothing of gradio."""

import dataclasses
import logging
import queue
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from samf.model.ct_common import collected_warnings
from samf.model.ct_volume import CTVolume
from samf.model.model_card import public_name
from samf.model.pipeline_samf import SamfReportPipeline
from samf.model.report_samf import REPORT_QUESTION, Report
from samf.web import markup
from samf.web.display import save_display, save_heat_image, save_montage, save_overlay
from samf.web.downloads import kinds, write_file
from samf.web.turns import BusyError, Ticket, Turns, progress_of, start
from samf.web.uploads import UploadError, find_uploads, phantom_file, plain_words, take_scan
from samf.web.visits import Study, Visits

logger = logging.getLogger(__name__)

EvidenceChoice = Literal["fast", "full", "none"]
MAX_QUESTION = 500  # characters
_INTERVAL = 0.5  # seconds between signs of life; a closed tab ends the work at the next one
_DRAFT_INTERVAL = 0.12
_UNEXPECTED = "Something went wrong on this page's side. Try again, or another scan."


@dataclass(frozen=True)
class Update:
    """Parts of the page that change; None = stays.

    Attributes:
        status: steps and a sentence, HTML.
        viewer: files and places for the viewer.
        report, findings, facts, answers: HTML.
        files: whether there is something to download.
    """

    status: str | None = None
    viewer: dict[str, Any] | None = None
    report: str | None = None
    findings: str | None = None
    facts: str | None = None
    answers: str | None = None
    files: bool | None = None


Updates = Iterator[Update]
_CLEARED = Update(viewer={}, report="", findings="", facts="", answers="", files=False)


class _StoppedError(Exception):
    """The visitor has stopped the work, or gone."""


class _Stop(StoppingCriteria):
    """Ends a generation at its next token, or a search for evidence at its next pass, once `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise _StoppedError if it was asked for."""
        if self.asked:
            raise _StoppedError

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


class Workflow:
    """The work behind the page, for any number of visitors and one model.

    Args:
        reporter: the pipeline.
        visits: the visitors and their files.
        max_bytes: of a visitor's upload.
        evidence: how what a sentence rests on is found; "none" = not at all.
    """

    def __init__(self, reporter: SamfReportPipeline, visits: Visits, max_bytes: int, evidence: EvidenceChoice = "fast"):
        self.reporter, self.visits, self.max_bytes, self.evidence = reporter, visits, max_bytes, evidence
        self.turns = Turns()

    def report(self, visitor: str, chosen: object) -> Updates:
        """Yield the page's changes from the choice of a scan to the evidence of its report.

        Args:
            visitor: name of the browser's tab.
            chosen: {"files": [paths of uploads]} or {"phantom": name}.
        """
        yield from self._guarded(self._report(visitor, chosen), visitor)

    def ask(self, visitor: str, question: object) -> Updates:
        """Yield the page's changes while a question about the visitor's scan is answered."""
        yield from self._guarded(self._ask(visitor, question), None)

    def file(self, visitor: str, kind: object) -> tuple[Path | None, str]:
        """Write one kind of file of the visitor's report.

        Args:
            visitor: name of the browser's tab.
            kind: key of `downloads.kinds`.

        Returns:
            The file, or None and the reason.
        """
        study = self.visits.study(visitor)
        if study is None or study.report is None:
            return None, "There is no report yet."
        study.hold()
        try:
            return write_file(study.report, str(kind), study.folder / "files"), ""
        except (ValueError, OSError, ImportError) as error:
            return None, plain_words(error, self.visits.root)
        except Exception as error:  # noqa: BLE001 - a visitor gets a sentence, whatever a writer raises
            logger.error("%s was not written: %s", kind if str(kind) in kinds() else "A file", type(error).__name__)
            return None, "This file can't be made of this scan."
        finally:
            study.release()

    def leave(self, visitor: str) -> None:
        """Forget a visitor and remove the files."""
        self.visits.end(visitor)

    def _guarded(self, updates: Updates, visitor: str | None) -> Updates:
        """Yield updates; an error becomes one sentence, and ends the study of `visitor`."""
        try:
            yield from updates
            return
        except (UploadError, BusyError, ValueError, OSError) as error:  # CTReadError is a ValueError
            message = plain_words(error, self.visits.root)
        except MemoryError:
            message = "There is not enough memory for this scan. Crop it, or choose a coarser series."
        except Exception as error:  # noqa: BLE001 - no traceback, which could have data in it, leaves this place
            logger.error("Unexpected %s while a visitor was served", type(error).__name__)
            message = _UNEXPECTED
        if visitor is None:
            yield Update(status=markup.failure_html(message))
            return
        self.leave(visitor)
        yield dataclasses.replace(_CLEARED, status=markup.failure_html(message))

    def _report(self, visitor: str, chosen: object) -> Updates:
        started = time.monotonic()
        study = self.visits.new_study(visitor)
        yield dataclasses.replace(_CLEARED, status=markup.steps_html("queue", "Taking the files …"))
        study.hold()
        taken = start(lambda: self._take(study, chosen))
        taken.add_done_callback(lambda _: study.release())
        for _ in progress_of(taken, _INTERVAL):
            yield Update(status=markup.steps_html("queue", "Taking the files …"))
        study.path = taken.result()
        ticket = self._ticket(study)
        try:
            yield from self._wait(ticket, "report")
            warnings = yield from self._show(ticket, study)
            yield from self._encode(ticket, study, warnings)
            yield from self._write(ticket, study, started)
        finally:
            ticket.leave()
        if self.evidence != "none" and study.report is not None and study.report.sentences:
            ticket = self._ticket(study, patient=True)  # others' first words are more urgent
            try:
                yield from self._wait(ticket, "evidence")
                yield from self._explain(ticket, study)
            finally:
                ticket.leave()
        yield Update(status=markup.steps_html("done", _summary(study.report, time.monotonic() - started), "done"))

    def _ticket(self, study: Study, patient: bool = False) -> Ticket:
        """Return a ticket that keeps the study's files until its work has ended; see `Turns.join`."""
        ticket = self.turns.join(patient)
        study.hold()
        ticket.on_left.append(study.release)
        return ticket

    def _wait(self, ticket: Ticket, what: str) -> Updates:
        step = "evidence" if what == "evidence" else "queue"
        for ahead in ticket.waiting(_INTERVAL):
            yield Update(status=markup.steps_html(step, f"Waiting: {ahead} ahead of you in the queue."))

    def _take(self, study: Study, chosen: object) -> Path:
        """Return the path of the scan that a visitor has chosen."""
        if isinstance(chosen, dict) and "phantom" in chosen:
            return phantom_file(chosen["phantom"], self.visits.phantoms)
        files = chosen.get("files") if isinstance(chosen, dict) else None
        return take_scan(find_uploads(files, self.visits.uploads, self.max_bytes), study.folder)

    def _show(self, ticket: Ticket, study: Study) -> Generator[Update, None, tuple[CTVolume, list[str]]]:
        """Read the scan and give the viewer its copy; return the volume and what the reader repaired."""
        reader = self.reporter.processor.image_processor

        def read() -> tuple[CTVolume, list[str]]:
            with collected_warnings(type(reader).__module__.rpartition(".")[0]) as found:
                volume = reader.read(str(study.path))
            if not study.ended:
                save_display(volume, study.folder / "ct.nii.gz")
                save_montage(volume, study.folder / "montage.png")
            return volume, found

        job = ticket.start(read)
        for seconds in progress_of(job, _INTERVAL):
            yield Update(status=markup.steps_html("read", f"Reading the scan … {seconds:.0f} s"))
        volume, found = job.result()
        yield Update(viewer=self._viewer(study))
        return volume, [plain_words(text, self.visits.root) for text in found]

    def _viewer(self, study: Study) -> dict[str, Any]:
        """Return what the viewer shows."""
        shown: dict[str, Any] = {"ct": _address(study.folder / "ct.nii.gz")}
        shown["montage"] = _address(study.folder / "montage.png")
        evidence = None if study.report is None else study.report.evidence
        if evidence is None:
            return shown
        peaks = [None if found.peak is None else found.peak.ras_mm for found in evidence.sentences]
        said = [sentence.findings for sentence in study.report.sentences] if study.report is not None else []
        first = next((n for n, what in enumerate(said) if "present" in what.values() and peaks[n]), 0)
        images = [_address(study.folder / f"sentence{number}.png") for number in range(len(peaks))]
        return {
            **shown,
            "heat": _address(study.folder / "heat.nii.gz"),
            "peaks": peaks,
            "images": images,
            "first": first,
        }

    def _encode(self, ticket: Ticket, study: Study, read: tuple[CTVolume, list[str]]) -> Updates:
        volume, warnings = read
        keep = self.evidence != "none"
        job = ticket.start(lambda: self.reporter.encode(volume, require_chest=True, keep_images=keep))
        for seconds in progress_of(job, _INTERVAL):
            yield Update(status=markup.steps_html("encode", f"Encoding the slices … {seconds:.0f} s"))
        encoded = job.result()
        own = [plain_words(text, self.visits.root) for text in encoded.warnings]
        study.encoded = dataclasses.replace(encoded, warnings=tuple(dict.fromkeys([*own, *warnings])))

    def _write(self, ticket: Ticket, study: Study, started: float) -> Updates:
        first: float | None = None
        with closing(self._stream(ticket, study, REPORT_QUESTION)) as stream:
            while True:
                try:
                    text = next(stream)
                except StopIteration as end:
                    report: Report = end.value
                    break
                if first is None and text.strip():
                    first = time.monotonic() - started
                count = len(text.split())
                note = f"Writing … {count} words" if count else "Writing …"
                yield Update(status=markup.steps_html("write", note), report=markup.draft_html(text))
        study.report = report
        first = time.monotonic() - started if first is None else first
        yield Update(
            status=markup.steps_html("evidence", "The report is written."),
            report=markup.report_html(report, explained=False),
            findings=markup.findings_html(report),
            facts=markup.facts_html(report, public_name(report.provenance.model), first),
            files=True,
        )

    def _stream(self, ticket: Ticket, study: Study, question: str) -> Generator[str, None, Report]:
        """Yield the text of an answer as far as it is written, and return the report."""
        stop, encoded = _Stop(), study.encoded
        if encoded is None:
            raise UploadError("The scan is no longer here. Choose it again.")
        streamer = TextIteratorStreamer(
            self.reporter.processor.tokenizer, skip_prompt=True, timeout=_INTERVAL, skip_special_tokens=True
        )
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "streamer": streamer}
        options["stopping_criteria"] = StoppingCriteriaList([stop])
        job = ticket.start(lambda: self.reporter.answer([(encoded, question)], **options)[0])
        try:
            yield from _pieces(streamer, job)
        finally:
            stop.asked = True
        return job.result()

    def _explain(self, ticket: Ticket, study: Study) -> Updates:
        """Find what each sentence rests on, and show it."""
        report, encoded, mode, stop = study.report, study.encoded, self.evidence, _Stop()
        if report is None or encoded is None or mode == "none":
            return

        def explain() -> Report:
            explained = self.reporter.explain(report, encoded, mode, stop.check)
            if explained.evidence is not None and not study.ended:
                save_overlay(explained.evidence, study.folder / "heat.nii.gz")
                for number, sentence in enumerate(explained.evidence.sentences):
                    if sentence.slice_heat is not None:
                        save_heat_image(sentence.slice_heat, study.folder / f"sentence{number}.png")
            return explained

        job = ticket.start(explain)
        try:
            for seconds in progress_of(job, _INTERVAL):
                note = f"Finding what each sentence rests on … {seconds:.0f} s"
                yield Update(status=markup.steps_html("evidence", note))
        finally:
            stop.asked = True
        study.report = job.result()
        yield Update(viewer=self._viewer(study), report=markup.report_html(study.report, explained=True))

    def _ask(self, visitor: str, question: object) -> Updates:
        study = self.visits.study(visitor)
        if study is None or study.encoded is None:
            raise UploadError("Choose a scan first; then ask about it.")
        asked = " ".join(question.split()) if isinstance(question, str) else ""
        if not asked:
            raise UploadError("The question is empty.")
        if len(asked) > MAX_QUESTION:
            raise UploadError(f"The question has {len(asked)} characters; at most {MAX_QUESTION} are taken.")
        known = study.answers
        ticket = self._ticket(study)
        try:
            yield from self._wait(ticket, "report")
            with closing(self._stream(ticket, study, asked)) as stream:
                while True:
                    try:
                        text = next(stream)
                    except StopIteration as end:
                        known.append((asked, end.value.to_text()))
                        break
                    note = markup.steps_html("write", "Answering …")
                    yield Update(status=note, answers=markup.answers_html([*known, (asked, text)], busy=True))
        finally:
            ticket.leave()
        yield Update(status=markup.steps_html("done", "Answered.", "done"), answers=markup.answers_html(known))


def _pieces(streamer: TextIteratorStreamer, job: "Future[Any]") -> Iterator[str]:
    """Yield the whole text now and then, until it ends or the job does."""
    text, shown = "", time.monotonic()
    while True:
        try:
            text += next(streamer)
        except queue.Empty:
            if job.done():  # it has failed: no end was sent
                return
        except StopIteration:
            return
        if time.monotonic() - shown > _DRAFT_INTERVAL or not text:
            shown = time.monotonic()
            yield text.strip()


def _address(path: Path) -> str:
    """Return the address of a file, relative to the page's."""
    return f"gradio_api/file={path}"


def _summary(report: Report | None, seconds: float) -> str:
    """Return the last sentence about the steps."""
    if report is None:
        return ""
    checks = len(report.disagreements)
    doubt = f" {checks} {'place' if checks == 1 else 'places'} to check." if checks else ""
    return f"Done in {seconds:.0f} s.{doubt} Select a sentence to see what it rests on."
