"""Does evidence point at the findings? Measured on phantoms, whose findings have masks.

    python -m samf.experiments.evidence --model runs/demo/model --data runs/demo/phantoms --output runs/evidence

For each held-out phantom the reference report is explained (teacher forced, so that each finding has its cases whether or not
the model would report it), and each sentence that states a finding is scored against that finding's mask:

- pointing: the heat map's maximum is in the mask or within `--margin_mm` of it; against chance (the share of the body that is),
  the fusion's weights alone, and the map of another patient's scan for the same sentence;
- slices: the top slice shows the finding; against the share of slices that do;
- deletion and insertion: the sentence's mean log-likelihood while slices are taken away or added by rank, minus that in random
  order.

Several models, each with its own phantoms (`--model A B C --data X Y Z`), give mean and standard deviation over them. Finished
phantoms are kept, so that an interrupted experiment resumes. `evidence.md` has the tables, `evidence.json` the cases.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from tqdm import tqdm

from samf import SamfForConditionalGeneration, SamfProcessor, read_ct
from samf.data.prompts import REPORT_QUESTION
from samf.evaluation.markdown import markdown_table
from samf.experiments.evidence_scores import Case, MaskScorer, order_effects, weights_point
from samf.model.ct_volume import CTVolume
from samf.model.evidence_samf import Evidence
from samf.model.explain_samf import EvidenceMode, EvidenceOptions, Explainer
from samf.model.pipeline_samf import EncodedScan, SamfReportPipeline
from samf.model.sentence_likelihood_samf import SentenceLikelihood, tokenize_answer
from samf.phantoms.findings import DEMO_FINDINGS
from samf.phantoms.plan import PhantomSettings, Scan, plan_patient, reconstruction_seed
from samf.phantoms.text import join_report
from samf.phantoms.volume import render_phantom
from samf.utils.files import atomic_write, write_json

_CHOICES = ("hit", "chance", "weights", "shuffled", "slice_hit", "slice_chance", "deletion", "insertion")
_TITLES = {
    "hit": "pointing",
    "chance": "chance",
    "weights": "weights alone",
    "shuffled": "another's scan",
    "slice_hit": "top slice",
    "slice_chance": "chance",
    "deletion": "deletion",
    "insertion": "insertion",
}


class Run(TypedDict):
    """The cases of one model and its phantoms."""

    model: str
    data: str
    cases: list[Case]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.evidence",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="trained on phantoms; one per seed")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="output of python -m samf.phantoms.dataset; one per model"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--patients", type=int, default=30, help="held-out phantoms per model")
    parser.add_argument("--first", type=int, default=1, help="number of the first of them")
    parser.add_argument("--margin_mm", type=float, default=15.0)
    parser.add_argument("--mode", choices=("full", "fast"), default="full", help="how slices are found")
    args = parser.parse_args(argv)
    if len(args.model) != len(args.data):
        parser.error(f"{len(args.model)} models and {len(args.data)} data sets; give one for each, in the same order")
    return args


def load_settings(data: Path) -> PhantomSettings:
    """Return the settings of a phantom set."""
    values = json.loads((data / "phantom.json").read_text(encoding="utf-8"))
    return PhantomSettings(**{**values, "nodule_mm": tuple(values["nodule_mm"])})


class PhantomRun:
    """One model with its phantoms.

    Args:
        model: folder.
        data: folder of the phantoms.
        margin_mm: see `MaskScorer`.
        mode: how slices are found.
    """

    def __init__(self, model: Path, data: Path, margin_mm: float, mode: EvidenceMode):
        loaded = SamfForConditionalGeneration.from_pretrained(model)
        self.reporter = SamfReportPipeline(model=loaded, processor=SamfProcessor.from_pretrained(model))
        self.data, self.margin_mm, self.settings = data, margin_mm, load_settings(data)
        self.explainer = Explainer(loaded, self.reporter.processor, EvidenceOptions(mode=mode))
        # Of another patient's scan only the place counts, found as for the own scan.
        searched = self.explainer.options.searched_slices
        self.fast = Explainer(loaded, self.reporter.processor, EvidenceOptions(mode="fast", searched=searched))

    def cases(self, patient: int) -> list[Case]:
        """Return the scores of the findings of one phantom."""
        scan = plan_patient(self.settings, "valid", patient)[0]
        present = [name for name in DEMO_FINDINGS if name in scan.findings]
        if not present:
            return []
        volume, encoded = self._read(scan)
        _, others = self._read(plan_patient(self.settings, "valid", self._another(patient))[0])
        report = join_report(scan.statements)
        own = self._explain(self.explainer, encoded, report)
        other = self._explain(self.fast, others, report)
        phantom = render_phantom(
            scan.findings, **scan.seeds, recon=reconstruction_seed(scan, 0), voxel_mm=self.settings.voxel_mm
        )
        return [
            self._case(
                name, patient, scan, encoded, MaskScorer(phantom.masks[name], volume, self.margin_mm), own, other
            )
            for name in present
            if phantom.masks[name].any()  # a lesion may be hidden by another
        ]

    def _another(self, patient: int) -> int:
        """Return the next patient, or the one before where there is none."""
        following = plan_patient(self.settings, "valid", patient + 1)[0]
        return patient + 1 if self._path(following).exists() else patient - 1

    def _path(self, scan: Scan) -> Path:
        return self.data / "dataset" / scan.path(scan.volumes[0])

    def _read(self, scan: Scan) -> tuple[CTVolume, EncodedScan]:
        volume = read_ct(self._path(scan))
        return volume, self.reporter.encode(volume, keep_images=True)

    def _explain(self, explainer: Explainer, scan: EncodedScan, report: str) -> Evidence:
        if scan.images is None:
            raise ValueError("the scan was encoded without its images")
        return explainer.explain(scan.images, scan.features, report, REPORT_QUESTION)

    def _case(
        self,
        name: str,
        patient: int,
        scan: Scan,
        encoded: EncodedScan,
        scorer: MaskScorer,
        own: Evidence,
        other: Evidence,
    ) -> Case:
        """Return the scores of one finding.

        Args:
            name: of the finding.
            patient: number of the phantom.
            scan: its plan.
            encoded: its scan.
            scorer: of the finding's mask.
            own: evidence of the scan's reference report.
            other: evidence of the same report and another patient's scan.
        """
        texts = [sentence.text for sentence in own.sentences]
        number = next(index for index, text in enumerate(texts) if text in scan.statements[name])
        sentence = own.sentences[number]
        places = [evidence.sentences[number].peak for evidence in (own, other)]
        distances = [None if place is None else scorer.distance_of(place.ras_mm) for place in places]
        shown = scorer.slices_shown(encoded.images)
        return Case(
            finding=name,
            patient=patient,
            head=encoded.findings.get(name),
            log_probability=sentence.log_probability,
            distance_mm=distances[0],
            hit=distances[0] is not None and distances[0] <= self.margin_mm,
            chance=scorer.chance(),
            weights=scorer.distance_of(weights_point(encoded.images, own)) <= self.margin_mm,
            shuffled=distances[1] is not None and distances[1] <= self.margin_mm,
            slice_hit=bool(shown[sentence.top_slices[0].number]),
            slice_chance=float(shown.mean()),
            **order_effects(
                self._likelihood(encoded, scan), self._slices(encoded), sentence.slice_scores, number, patient
            ),
        )

    def _likelihood(self, encoded: EncodedScan, scan: Scan) -> SentenceLikelihood:
        tokens = tokenize_answer(self.reporter.processor, encoded.features, join_report(scan.statements))
        return SentenceLikelihood(self.reporter.model, tokens, encoded.features, batch_size=16)

    def _slices(self, encoded: EncodedScan) -> torch.Tensor:
        return torch.from_numpy(encoded.features["slice_embeddings"]).to(self.reporter.model.device)


def run_all(args: argparse.Namespace) -> list[Run]:
    """Score all phantoms of all models, except finished ones."""
    runs = []
    for number, (model, data) in enumerate(zip(args.model, args.data, strict=True)):
        folder, run, cases = args.output / f"run_{number}", None, []
        patients = range(args.first, args.first + args.patients)
        for patient in tqdm(patients, desc=f"{model}", unit="phantom"):
            file = folder / f"patient_{patient}.json"
            if not file.is_file():
                run = run or PhantomRun(model, data, args.margin_mm, args.mode)
                write_json(file, run.cases(patient))
            cases += json.loads(file.read_text(encoding="utf-8"))
        runs.append(Run(model=str(model), data=str(data), cases=cases))
    return runs


def finding_rows(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Yield a row per finding: its cases, and the mean of each score over them (± deviation over several models)."""
    means: list[dict[str, list[float]]] = [{score: [] for score in _CHOICES} for _ in runs]
    for name in DEMO_FINDINGS:
        own = [[case for case in run["cases"] if case["finding"] == name] for run in runs]
        if not all(own):
            continue
        per_run = [{score: statistics.mean(case[score] for case in cases) for score in _CHOICES} for cases in own]
        for total, found in zip(means, per_run, strict=True):
            for score in _CHOICES:
                total[score].append(found[score])
        yield [name, str(sum(map(len, own))), *(_cell([found[score] for found in per_run]) for score in _CHOICES)]
    count = sum(len(run["cases"]) for run in runs)
    averaged = [{score: statistics.mean(values) for score, values in total.items()} for total in means]
    yield ["mean over findings", str(count), *(_cell([found[score] for found in averaged]) for score in _CHOICES)]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def seen_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with only the cases that the findings head sees (probability above one half)."""
    return [Run(**{**run, "cases": [case for case in run["cases"] if (case["head"] or 0) > 0.5]}) for run in runs]


def write_tables(output: Path, runs: Sequence[Run], margin_mm: float) -> str:
    """Write the tables as Markdown and the cases as JSON; return the tables.

    Args:
        output: folder.
        runs: the cases.
        margin_mm: as they were scored.
    """
    header = ["finding", "cases", *_TITLES.values()]
    parts = [f"Sentences of the reference report that state a finding; margin {margin_mm:g} mm."]
    parts.append(markdown_table(header, list(finding_rows(runs))))
    seen = seen_runs(runs)
    if all(run["cases"] for run in seen):
        parts.append("Of these, the findings that the model's findings head sees:")
        parts.append(markdown_table(header, list(finding_rows(seen))))
    text = "\n\n".join(parts)
    atomic_write(output / "evidence.md", text + "\n")
    write_json(output / "evidence.json", runs)
    return text


def check_settings(args: argparse.Namespace) -> None:
    """Save the settings that the finished phantoms depend on.

    Raises:
        ValueError: the folder holds phantoms of other settings.
    """
    file = args.output / "settings.json"
    settings: Mapping[str, object] = {
        "model": [str(path.resolve()) for path in args.model],
        "data": [str(path.resolve()) for path in args.data],
        "margin_mm": args.margin_mm,
        "mode": args.mode,
    }
    if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{args.output} holds results of {found}, not {settings}. Give another --output.")
    write_json(file, settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    check_settings(args)
    text = write_tables(args.output, run_all(args), args.margin_mm)
    sys.stdout.write(f"\n{text}\n\nFor research only, not for diagnosis.\n")


if __name__ == "__main__":
    main()
