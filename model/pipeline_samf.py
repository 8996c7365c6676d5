"""`pipeline("ct-report")`: CT scans to reports, or to the answers of questions about them."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from transformers import Pipeline, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .agreement_samf import find_disagreements
from .ct_common import collected_warnings
from .ct_region import check_region
from .explain_samf import EvidenceMode, EvidenceOptions, Explainer, ScanImages
from .findings_samf import FindingsMixin
from .quantization_samf import quantization_name
from .report_samf import REPORT_QUESTION, Provenance, Report, locate_tokens, make_sentences

TASK = "ct-report"
# For config.json; with exactly one entry `pipeline(model=…)` needs no task.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_samf.SamfReportPipeline", "pt": ["AutoModelForImageTextToText"]}}
# Options of `generate`; some are objects of the library.
GenerateOptions: TypeAlias = Mapping[str, object]
SLICE_INPUTS = ("pixel_values", "slice_mask", "slice_planes", "slice_positions")


@dataclass(frozen=True)
class Failure:
    """A scan of a list that could not be read.

    Attributes:
        source: the scan as it was given.
        error: the reason, with the remedy.
    """

    source: str
    error: str


@dataclass(frozen=True)
class EncodedScan:
    """A scan after the slice encoder: all that any number of questions about it need.

    Attributes:
        source: the scan as it was given.
        shape, spacing, orientation: of the volume, as in [`Provenance`].
        features: `slice_embeddings` float32 (S, D), `slice_planes` and `slice_positions` (S,).
        findings: probability of each finding by the findings head; empty without one.
        warnings: what the reader repaired or found unusual.
        images: the slices themselves, for evidence; None unless they were asked for.
        series: which DICOM series was read, as in [`Provenance`].
    """

    source: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    features: Mapping[str, np.ndarray]
    findings: Mapping[str, float]
    warnings: tuple[str, ...]
    images: ScanImages | None = None
    series: str | None = None


class SamfReportPipeline(FindingsMixin, Pipeline):
    """Write reports of CT scans, or answer questions about them.

    ```python
    from transformers import pipeline

    reporter = pipeline("ct-report", model="someone/samf", trust_remote_code=True)
    report = reporter("scan.nii.gz")
    answers = reporter("scan.nii.gz", question=["Is there a pleural effusion?", "Is the heart enlarged?"])
    reports = reporter(["a.nii.gz", "dicom_folder"], batch_size=2)
    ```
    """

    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    processor: Any
    model: Any

    def __call__(  # type: ignore[override]
        self,
        inputs: Any,
        question: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        evidence: bool | EvidenceMode = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Return the report of a scan, or what `question` asks for.

        Args:
            inputs: a path, folder, zip or address of a scan, a `CTVolume`, an HU array (X, Y, Z) in RAS+, a nibabel or
                SimpleITK image, or anything else that `samf.read_ct` or the processor takes; or a list of them. (The files
                of one DICOM series go as a folder, or as a list within the list.)
            question: None for the report, a question, or several questions: the scan is then encoded once.
            batch_size: prompts that are answered together; 1 by default.
            evidence: also `explain`: True or "full", or "fast". Heat maps take megabytes per report.
            generate_kwargs: of `generate`, such as `max_new_tokens` or `num_beams`.

        Returns:
            A [`Report`] for one scan and at most one question; for several questions a list of reports. For a list of scans a
            list with one such entry per scan, and a [`Failure`] for each scan that can't be read.

        Raises:
            CTReadError: a single scan can't be read.
        """
        questions = [question or REPORT_QUESTION] if question is None or isinstance(question, str) else list(question)
        if not questions:
            raise ValueError("question is an empty list; leave it out for a report, or pass at least one question.")
        if not isinstance(inputs, (list, tuple)):
            scan = self.encode(inputs, keep_images=bool(evidence))
            (outcome,) = self._answer_scans([scan], questions, batch_size, generate_kwargs, evidence)
            return self._unwrapped(outcome, question)
        size = batch_size or self._batch_size or 1
        results: list[Any] = []
        for start in range(0, len(inputs), size):  # no more scans than a batch has room for are held at once
            scans = [self._encode_or_fail(scan, bool(evidence)) for scan in inputs[start : start + size]]
            results += self._answer_scans(scans, questions, size, generate_kwargs, evidence)
        return [self._unwrapped(outcome, question) for outcome in results]

    def _answer_scans(
        self,
        scans: Sequence["EncodedScan | Failure"],
        questions: Sequence[str],
        batch_size: int | None,
        generate_kwargs: GenerateOptions,
        evidence: bool | EvidenceMode,
    ) -> list["list[Report] | Failure"]:
        """Return the reports of each scan, one per question, and failures as they are."""
        jobs = [(scan, asked) for scan in scans if isinstance(scan, EncodedScan) for asked in questions]
        size = batch_size or self._batch_size or 1
        batches = (jobs[start : start + size] for start in range(0, len(jobs), size))
        reports = [report for batch in batches for report in self.answer(batch, **generate_kwargs)]
        if evidence:
            mode: EvidenceMode = "full" if evidence is True else evidence
            reports = [self.explain(report, scan, mode) for report, (scan, _) in zip(reports, jobs, strict=True)]
        answered = iter(reports)
        return [scan if isinstance(scan, Failure) else [next(answered) for _ in questions] for scan in scans]

    @staticmethod
    def _unwrapped(outcome: "list[Report] | Failure", question: str | Sequence[str] | None) -> Any:
        """Return the only report in place of a list of one, unless the questions came as a list."""
        single = question is None or isinstance(question, str)
        return outcome[0] if single and isinstance(outcome, list) else outcome

    def explain(
        self,
        report: Report,
        scan: Any,
        mode: EvidenceMode = "full",
        before_pass: Callable[[], object] | None = None,
    ) -> Report:
        """Return a report, or an answer, with what of the scan each of its sentences rests on.

        Args:
            report: of the scan; its text need not be the model's own.
            scan: as in `__call__`; or encoded with `keep_images=True`, so that it is not read again.
            mode: "full" finds slices by occlusion, "fast" by gradient.
            before_pass: as in `Explainer`; what it raises ends the search.

        Raises:
            CTReadError: the scan can't be read.
            ValueError: an encoded scan without images, or a language model without a backward pass.
        """
        encoded = self.encode(scan, keep_images=True)
        if encoded.images is None:
            raise ValueError(
                "Evidence needs the slices' pixels: encode(scan, keep_images=True), or pass the scan itself."
            )
        if not report.sentences:
            return report
        explain = Explainer(self.model, self.processor, EvidenceOptions(mode=mode), before_pass).explain
        found = explain(encoded.images, encoded.features, report.text, report.question)
        return dataclasses.replace(report, evidence=found)

    def encode(self, scan: Any, require_chest: bool = False, keep_images: bool = False) -> EncodedScan:
        """Read a scan and run the slice encoder, aggregator and findings head on it.

        Args:
            scan: as in `__call__`, or an `EncodedScan`, which is returned as it is.
            require_chest: refuse a scan that shows no chest; by default the report's warnings say so.
            keep_images: keep the slices' pixels, for `explain`: 150 kB per slice of 224 x 224 in three windows.

        Raises:
            CTReadError: the scan can't be read, or shows no chest.
        """
        if isinstance(scan, EncodedScan):
            return scan
        reader = self.processor.image_processor
        with collected_warnings(type(reader).__module__.rpartition(".")[0]) as warnings:
            warnings += [self.model.config.caution] if self.model.config.caution else []
            volume = reader.read(scan)
            check_region(volume, describe_source(scan), refuse=require_chest)
            extracted = reader.extract(volume)
            stack = reader([extracted], return_tensors="pt")
        tensors = {name: stack[name].to(self.device) for name in SLICE_INPUTS}
        with torch.inference_mode():
            outputs = self.model(**tensors)
        features = {
            "slice_embeddings": outputs.image_outputs.last_hidden_state[0].float().cpu().numpy(),
            "slice_planes": stack["slice_planes"][0].numpy(),
            "slice_positions": stack["slice_positions"][0].numpy(),
        }
        logits = outputs.finding_logits
        found = {} if logits is None else self.finding_probabilities(logits[0].float().tolist())
        orientation = volume.stored_orientation
        images = ScanImages.of(volume, extracted, reader) if keep_images else None
        return EncodedScan(
            source=describe_source(scan),
            shape=volume.shape,
            spacing=volume.spacing,
            orientation=orientation,
            features=features,
            findings=found,
            warnings=tuple(warnings),
            images=images,
            series=volume.series,
        )

    def answer(self, jobs: Sequence[tuple[EncodedScan, str]], **generate_kwargs: Any) -> list[Report]:
        """Answer one question per encoded scan, all in one batch.

        Args:
            jobs: pairs of a scan and a question.
            generate_kwargs: of `generate`.

        Returns:
            One report per pair, in order.
        """
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: a report is one sequence; call the pipeline once for each sample.")
        inputs = self.prompts(jobs)
        asked = {**generate_kwargs, "return_dict_in_generate": True, "output_logits": True}
        with torch.inference_mode():
            output = self.model.generate(**inputs, **asked)
        made = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
        scores = self.model.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )
        return [
            self._report(scan, asked_for, tokens, row, generate_kwargs)
            for (scan, asked_for), tokens, row in zip(jobs, made.cpu(), scores.float().cpu(), strict=True)
        ]

    def stream(
        self, scan: Any, question: str | None = None, timeout: float | None = None, **generate_kwargs: Any
    ) -> Iterator[str]:
        """Yield the report of one scan, or the answer to one question, piece by piece as it is written.

        Closing the iterator ends the generation at its next token.

        Args:
            scan: as in `__call__`.
            question: None for the report.
            timeout: seconds to wait for each piece; None = no limit.
            generate_kwargs: of `generate`.

        Raises:
            CTReadError: the scan can't be read. Whatever `generate` raises is raised here too.
        """
        inputs = self.prompts([(self.encode(scan), question or REPORT_QUESTION)])
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, timeout=timeout, skip_special_tokens=True
        )
        stop, failure = _Stop(), []

        def work() -> None:
            try:
                with torch.inference_mode():
                    criteria = StoppingCriteriaList([stop])
                    self.model.generate(**inputs, **generate_kwargs, streamer=streamer, stopping_criteria=criteria)
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.asked = True
            thread.join()
        if failure:
            raise failure[0]

    # What transformers' Pipeline asks of its classes; `__call__` goes its own way, because several questions share a scan.

    def _sanitize_parameters(self, **generate_kwargs: Any) -> tuple[GenerateOptions, GenerateOptions, GenerateOptions]:
        return {}, generate_kwargs, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, "EncodedScan"]:  # type: ignore[override]
        """Return the encoded scan."""
        return {"scan": self.encode(input_)}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, "EncodedScan"], **generate_kwargs: Any
    ) -> Any:
        return self.answer([(input_tensors["scan"], REPORT_QUESTION)], **generate_kwargs)[0]

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Report:
        """Return the report as it is."""
        return model_outputs

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model and the processor into a folder that loads as a pipeline, a model and a processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _encode_or_fail(self, scan: Any, keep_images: bool) -> EncodedScan | Failure:
        try:
            return self.encode(scan, keep_images=keep_images)
        except (OSError, TypeError, ValueError) as error:  # CTReadError is a ValueError
            return Failure(describe_source(scan), str(error))

    def prompts(self, jobs: Sequence[tuple[EncodedScan, str]]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for pairs of a scan and a question, padded on the left."""
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "volume", "volume": dict(scan.features)}, {"type": "text", "text": asked}],
                }
            ]
            for scan, asked in jobs
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        unread = self.processor.unused_input_names
        return {name: value.to(self.device) for name, value in inputs.items() if name not in unread}

    def _report(
        self,
        scan: EncodedScan,
        question: str,
        tokens: torch.Tensor,
        log_probabilities: torch.Tensor,
        generate_kwargs: GenerateOptions,
    ) -> Report:
        """Return the report of one row of generated tokens (T,) with their log-probabilities (T,)."""
        tokenizer = self.processor.tokenizer
        ends = generate_kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        known = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        stops = torch.isin(tokens, torch.tensor(known, dtype=tokens.dtype))
        count = int(stops.nonzero()[0]) if stops.any() else len(tokens)
        ids = tokens[:count].tolist()
        text, kept, places = locate_tokens(tokenizer, ids)
        sentences = make_sentences(text, places, log_probabilities[kept].tolist())
        said = [sentence.findings for sentence in sentences]
        findings = self.findings_of(scan, question, text.strip())
        disagreements = find_disagreements(said, findings, is_report=question == REPORT_QUESTION)
        quantization = quantization_name(self.model)
        made_from = Provenance(
            source=scan.source,
            shape=scan.shape,
            spacing=scan.spacing,
            orientation=scan.orientation,
            slice_settings=self.processor.image_processor.settings_hash(),
            model=self.model.config._name_or_path,
            revision=getattr(self.model.config, "_commit_hash", None),
            generation={
                name: value for name, value in generate_kwargs.items() if isinstance(value, (bool, int, float, str))
            },
            versions={
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                **({"quantization": quantization} if quantization is not None else {}),
            },
            series=scan.series,
        )
        limit = not stops.any()
        return Report(text.strip(), question, sentences, made_from, findings, limit, scan.warnings, disagreements)


class _Stop(StoppingCriteria):
    """Ends a generation as soon as `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


def describe_source(scan: Any) -> str:
    """Return a path or address as it is, and for an object in memory its class."""
    if isinstance(scan, EncodedScan):
        return scan.source
    if isinstance(scan, (str, os.PathLike)):
        return os.fspath(scan)
    if isinstance(scan, (list, tuple)) and scan and isinstance(scan[0], (str, os.PathLike)):
        return f"{os.fspath(scan[0])} and {len(scan) - 1} more"
    return str(getattr(scan, "source", type(scan).__name__))
