"""One model, one thread, one queue: jobs that wait are answered together."""

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import StoppingCriteriaList

from samf.model.ct_common import CTReadError
from samf.serving.errors import ApiError, internal_error
from samf.serving.jobs import Answer, Done, Failed, Job, Piece, Started
from samf.serving.rows import Row, RowWatcher
from samf.serving.scan_cache import ScanCache
from samf.serving.settings import ApiSettings

if TYPE_CHECKING:
    from samf.model.pipeline_samf import EncodedScan, SamfReportPipeline
    from samf.model.report_samf import Report

logger = logging.getLogger(__name__)

_PROMPT_MARGIN = 16  # control tokens of a prompt beside the volume's and the question's
_MODEL_LIMIT = 512  # tokens of an answer where neither the client nor the model's configuration has a limit


class Engine:
    """Answers jobs about scans, several at a time.

    A scan's warnings are collected from the readers' loggers, so that scans must be read one after the other; generation
    takes all cores or the GPU anyway. So one thread does both.

    Args:
        reporter: the pipeline.
        settings: limits of the queue, the batch and the cache.
    """

    def __init__(self, reporter: "SamfReportPipeline", settings: ApiSettings) -> None:
        self._reporter = reporter
        self._settings = settings
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._busy = 0
        self.cache = ScanCache(settings.cached_scans, settings.cached_bytes)
        self.batches = 0
        self.answered = 0
        self._thread = threading.Thread(target=self._run, name="samf-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return how many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return how many jobs are being answered."""
        return self._busy

    @property
    def caution(self) -> str | None:
        """Return what the model's users must know."""
        return self._reporter.model.config.caution

    def check_room(self) -> None:
        """Raise ApiError: 429 where the queue is full, 503 where the service is closing or its thread has ended."""
        if self._closing or not self._thread.is_alive():
            raise _shutting_down()
        if len(self._waiting) >= self._settings.queue:
            raise ApiError(429, f"{len(self._waiting)} requests are waiting; try again.", "queue_full", None, 2)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            ApiError: as in `check_room`.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Refuse the jobs that wait, end those that run, and wait for the thread."""
        with self._changed:
            self._closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.send(Failed(_shutting_down()))
        self._thread.join()

    # --- In the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while jobs := self._next_jobs():
            self._busy = len(jobs)
            try:
                self._answer_jobs(jobs)
            except Exception as error:  # noqa: BLE001 - the thread must outlive any request
                self._fail(jobs, error)
            finally:
                self._busy = 0

    def _next_jobs(self) -> list[Job]:
        """Return the first job that waits, and others of the same sampling; none when the service closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return []
            first = self._waiting[0]
            like = [job for job in self._waiting if job.sampling == first.sampling]
            taken = like[: 1 if first.evidence else self._settings.batch]
            for job in taken:
                self._waiting.remove(job)
        return taken

    def _answer_jobs(self, jobs: Sequence[Job]) -> None:
        ready = [(job, *found) for job in jobs if (found := self._encoded(job)) is not None]
        if not ready:
            return
        try:
            self._generate(ready)
        except Exception as error:  # noqa: BLE001 - below, each job for itself
            left = [item for item in ready if not item[0].ended]
            if len(ready) == 1:
                self._fail([item[0] for item in left], error)
                return
            for item in left:  # one of them may be at fault, or together they were too large
                if item[0].pieces:
                    self._fail([item[0]], error)
                else:
                    self._answer_jobs([item[0]])

    def _encoded(self, job: Job) -> "tuple[EncodedScan, bool] | None":
        """Return a job's scan and whether it was kept from an earlier one; None = the job has ended."""
        if job.cancelled:
            return None
        try:
            images = job.evidence is not None
            key = f"{job.scan.key} {job.any_region}"
            scan = self.cache.get(key, images)
            was_kept = scan is not None
            if scan is None:
                read = self._reporter.encode(job.scan.path, require_chest=not job.any_region, keep_images=images)
                warnings = tuple(job.scan.without_paths(text) for text in read.warnings)
                scan = dataclasses.replace(read, source=job.scan.label, warnings=warnings)
                self.cache.put(key, scan)
            self._check_length(job, scan)
        except Exception as error:  # noqa: BLE001 - of this job only
            self._fail([job], error)
            return None
        job.send(Started())
        return scan, was_kept

    def _check_wanted(self, job: Job) -> None:
        """Raise ApiError where nobody waits for a job any more."""
        if job.cancelled:
            raise ApiError(499, "The client is gone.", "cancelled")
        if self._closing:
            raise _shutting_down()

    def _limit(self, job: Job) -> int:
        own = self._reporter.model.generation_config.max_new_tokens or _MODEL_LIMIT
        return own if job.max_tokens is None else job.max_tokens

    def _check_length(self, job: Job, scan: "EncodedScan") -> None:
        """Raise ApiError where prompt and answer don't fit into the model's context."""
        processor, config = self._reporter.processor, self._reporter.model.config.text_config
        images = processor.num_image_tokens or len(scan.features["slice_positions"])
        prompt = images + len(processor.tokenizer(job.question)["input_ids"]) + _PROMPT_MARGIN
        if prompt + self._limit(job) > config.max_position_embeddings:
            raise ApiError(
                400,
                f"About {prompt} tokens of the prompt and up to {self._limit(job)} of the answer; the model's context has "
                f"{config.max_position_embeddings}. Shorten the question or lower max_tokens.",
                "context_length_exceeded",
                "max_tokens",
            )

    def _generate(self, ready: "Sequence[tuple[Job, EncodedScan, bool]]") -> None:
        """Answer jobs of one sampling in one batch."""
        rows = [self._row(*item) for item in ready]
        watcher = RowWatcher(rows, self._reporter.processor.tokenizer.pad_token_id)
        options: dict[str, Any] = {
            **ready[0][0].sampling.options(),
            "max_new_tokens": max(self._limit(job) for job, _, _ in ready),
            "num_beams": 1,
            "streamer": watcher,
            "stopping_criteria": StoppingCriteriaList([watcher]),
        }
        self.batches += 1
        reports = self._reporter.answer([(scan, job.question) for job, scan, _ in ready], **options)
        for (job, scan, was_kept), row, report in zip(ready, rows, reports, strict=True):
            if not job.ended and not job.cancelled:
                self._finish(job, scan, was_kept, row, self._private(job, scan, report, row))

    def _row(self, job: Job, scan: "EncodedScan", was_kept: bool) -> Row:
        """Return the row of a job, which is finished with it unless its report is wanted, too."""
        processor, generation = self._reporter.processor, self._reporter.model.generation_config
        ends = torch.as_tensor([] if generation.eos_token_id is None else generation.eos_token_id).flatten().tolist()

        def decode(tokens: Sequence[int]) -> str:
            return str(processor.tokenizer.decode(tokens, skip_special_tokens=True))

        def on_end(row: Row) -> None:
            if row.end != "cancelled" and not job.report:
                self._finish(job, scan, was_kept, row, None)

        on_text = (lambda text: job.send(Piece(text))) if job.stream else None
        return Row(decode, frozenset(ends), self._limit(job), lambda: job.cancelled, on_text, on_end)

    def _finish(self, job: Job, scan: "EncodedScan", was_kept: bool, row: Row, report: "Report | None") -> None:
        ended: Literal["stop", "length"] = "length" if row.end == "length" else "stop"
        counts = (row.prompt_tokens, len(row.tokens))
        self.answered += 1
        job.send(Done(Answer(row.text(), ended, *counts, scan.warnings, was_kept, report)))

    def _private(self, job: Job, scan: "EncodedScan", report: "Report", row: Row) -> "Report":
        """Return a report, with its evidence if that is wanted, that names no folder of this machine."""
        if job.evidence is not None:
            report = self._reporter.explain(report, scan, job.evidence, lambda: self._check_wanted(job))
        made = dataclasses.replace(report.provenance, model=self._settings.model_id)
        # The row was ended by its own limit, after which it has padding only.
        return dataclasses.replace(report, provenance=made, truncated=row.end == "length")

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Tell clients that there is no answer, and the log of which type the error was: its text may say more."""
        for job in jobs:
            told = _told(error, job)
            if told.status >= 500:
                logger.error("a request failed: %s", type(error).__name__)
            job.send(Failed(told))


def _shutting_down() -> ApiError:
    return ApiError(503, "The service is shutting down.", "shutting_down")


def _told(error: Exception, job: Job) -> ApiError:
    """Return what the client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CTReadError):
        return ApiError(400, job.scan.without_paths(str(error)), "bad_volume", "messages")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ApiError(503, "Not enough memory for this request now; try again later.", "out_of_memory", None, 10)
    if isinstance(error, ValueError):  # of the prompt or of evidence; its text may hold the server's paths
        return ApiError(400, "The model can't answer this request as it is asked.", "bad_request")
    return internal_error()
