"""Make the demo model that comes with the package from a finished run of the demo.

    python -m samf.experiments.demo --output runs/demo           # trains and evaluates it: recipes/demo
    python -m samf.scripts.make_demo_model --from runs/demo      # writes demo_model/

The weights are stored in half precision if that changes no report of the held-out phantoms, else in float32. The folder
has no code: it belongs to the package of its version, and `samf push` adds the code.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from samf import SamfConfig, SamfForConditionalGeneration, SamfProcessor, SamfReportPipeline
from samf.evaluation.schema import Results
from samf.experiments.demo import STAGES, Volumes, metric_values
from samf.model.model_card import README, Fact, make_card, write_model_card
from samf.utils.files import atomic_update, write_json
from samf.utils.packaged import DEMO_MODEL
from samf.utils.text_files import read_json

logger = logging.getLogger(__name__)

CAUTION = "This model knows synthetic phantoms only; what it writes about a real scan means nothing."
MAX_BYTES = 10_000_000
_CODE_KEYS = ("auto_map", "custom_pipelines")  # of JSON files: which code to load from the folder


class DemoModelError(ValueError):
    """A run that no demo model can be made from; says what is missing or wrong."""


@dataclass(frozen=True)
class DemoRun:
    """A finished run of the demo.

    Attributes:
        folder: its output folder.
        results: scores with own and with shuffled volumes.
        phantoms: settings of its phantoms.
        scans: the held-out scans.
    """

    folder: Path
    results: Mapping[Volumes, Results]
    phantoms: Mapping[str, object]
    scans: Sequence[Path]

    @classmethod
    def read(cls, folder: Path) -> "DemoRun":
        """Return the run in a folder.

        Raises:
            DemoModelError: it isn't finished.
        """
        names: tuple[Volumes, ...] = ("own", "shuffled")
        files = {name: folder / f"evaluation_{name}" / "results.json" for name in names}
        needed = [*files.values(), folder / "model" / "model.safetensors", folder / "phantoms" / "phantom.json"]
        missing = [str(file) for file in needed if not file.is_file()]
        if missing:
            raise DemoModelError(
                f"{', '.join(missing)}: missing; expected a finished run of python -m samf.experiments.demo."
            )
        scans = sorted((folder / "phantoms" / "dataset" / "valid_fixed").rglob("*.nii.gz"))
        results = {name: read_json(file) for name, file in files.items()}
        return cls(folder, results, read_json(folder / "phantoms" / "phantom.json"), scans)

    def patients(self, split: str) -> int:
        """Return the number of patients of a split, "train" or "valid"."""
        return sum(1 for entry in (self.folder / "phantoms" / "dataset" / f"{split}_fixed").iterdir() if entry.is_dir())

    def steps(self) -> str:
        """Return the steps of each training stage, in words."""
        folders = [*STAGES[:-1], "model"]
        states = (read_json(self.folder / name / "trainer_state.json") for name in folders)
        return ", ".join(f"{stage} {state['global_step']}" for stage, state in zip(STAGES, states, strict=True))


def make_demo_model(run: DemoRun, output: Path) -> torch.dtype:
    """Write the demo model of a run and return the precision of its weights.

    Args:
        run: the finished run.
        output: the folder; an earlier demo model in it is replaced when the new one is complete.

    Raises:
        DemoModelError: the model is too large.
    """
    source = run.folder / "model"
    processor = SamfProcessor.from_pretrained(source)
    expected = _reports(source, processor, run.scans)
    with atomic_update(output) as folder:
        dtype = torch.float16
        _save(source, processor, dtype, folder)
        changed = sum(a != b for a, b in zip(expected, _reports(folder, processor, run.scans), strict=True))
        if changed:
            logger.info("%d of %d reports change in float16: stored in float32", changed, len(expected))
            dtype = torch.float32
            _save(source, processor, dtype, folder)
        _write_card(run, dtype, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > MAX_BYTES:
            raise DemoModelError(
                f"{source}: {size} bytes in {dtype}; expected at most {MAX_BYTES}. Train a smaller one."
            )
    logger.info("%s: %.2f MB, weights in %s", output, size / 1e6, dtype)
    return dtype


def _reports(folder: Path, processor: SamfProcessor, scans: Sequence[Path]) -> list[str]:
    """Return a model's greedy reports of scans, computed in float32 as on any CPU."""
    model = SamfForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    reporter = SamfReportPipeline(model=model.eval(), processor=processor)
    return [report.text for report in reporter([str(scan) for scan in scans], batch_size=16, do_sample=False)]


def _save(source: Path, processor: SamfProcessor, dtype: torch.dtype, folder: Path) -> None:
    """Save a model in a precision, without code."""
    model = SamfForConditionalGeneration.from_pretrained(source, dtype=dtype)
    model.config.caution = CAUTION
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in [*folder.glob("*.py"), folder / README]:
        file.unlink()
    for file in folder.glob("*.json"):
        content = _without_code(read_json(file))
        write_json(file, content)


def _without_code(content: Any) -> Any:
    """Return JSON content without the keys that name code in its folder."""
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if key not in _CODE_KEYS}
    return [_without_code(value) for value in content] if isinstance(content, list) else content


def _write_card(run: DemoRun, dtype: torch.dtype, folder: Path) -> None:
    """Write the model card: how it was made, and what it scores on held-out phantoms."""
    facts: dict[str, Fact] = {
        "Recipes": ", ".join(f"`recipes/demo/{stage}.yaml`" for stage in STAGES),
        "Steps": run.steps(),
        "Seed": str(run.phantoms["seed"]),
        "Made by": "`python -m samf.experiments.demo`, then `python -m samf.scripts.make_demo_model`",
        "Comes with": "the package: `samf report scan.nii.gz` uses it",
        "Weights": f"{str(dtype).removeprefix('torch.')}; greedy reports of {len(run.scans)} held-out phantoms as in float32",
    }
    data = f"{run.patients('train')} synthetic phantoms"
    metrics: dict[str, float] = {}
    for name, own, shuffled in metric_values(run.results):
        metrics |= {name: own} if own is not None else {}
        metrics |= {f"{name}, another patient's volume": shuffled} if shuffled is not None else {}
    config = SamfConfig.from_pretrained(folder)
    write_model_card(folder, make_card(config, facts=facts, data=data, metrics=metrics, tags=["phantoms"]))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.scripts.make_demo_model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--from", dest="run", type=Path, default=Path("runs", "demo"), help="output folder of the demo")
    parser.add_argument("--output", type=Path, default=DEMO_MODEL, help="folder of the demo model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the demo model as the command line says."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    try:
        make_demo_model(DemoRun.read(args.run), args.output)
    except DemoModelError as error:
        sys.exit(f"make_demo_model: {error}")


if __name__ == "__main__":
    main()
