"""The scripts in examples/ run on tiny models and phantoms."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import model_for, tiny_processor

from samf import SamfForConditionalGeneration
from samf.phantoms.dataset import write_nifti
from samf.phantoms.volume import make_phantom

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REPORTS = ("Heart size is normal.", "A consolidation is seen in the right lower lobe.")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    model_for(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    paths = [folder / f"{seed}.nii.gz" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_nifti(make_phantom(np.random.default_rng(seed)), path)
    return paths


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / script, *arguments]
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_short_and_tested():
    scripts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {"report_a_scan.py", "finetune_on_your_csv.py"}
    for name, source in scripts.items():
        assert len(source.splitlines()) < 60, name
        assert "research only, not for diagnosis" in " ".join(source.split()), name


def test_report_a_scan(model_folder, scans, tmp_path):
    output = tmp_path / "report"
    printed = run("report_a_scan.py", model_folder, scans[0], "--output", output)
    report = (output / "report.txt").read_text(encoding="utf-8").strip()
    assert report in printed
    weights = json.loads((output / "weights.json").read_text(encoding="utf-8"))
    assert len(weights) == tiny_processor().image_processor.num_slices and sum(weights) == pytest.approx(1)
    assert (output / "slices.png").stat().st_size > 5_000


def test_finetune_on_your_csv(model_folder, scans, tmp_path):
    table = scans[0].parent / "reports.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "report", "patient"])
        writer.writerows((path.name, REPORTS[number % 2], f"patient {number}") for number, path in enumerate(scans))
    output = tmp_path / "finetuned"
    run("finetune_on_your_csv.py", model_folder, table, "--output", output, "--epochs", 1)
    before, after = (SamfForConditionalGeneration.from_pretrained(folder) for folder in (model_folder, output))
    changed = {
        name.split(".")[1]
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not old.equal(new)
    }
    assert changed == {"aggregator", "fusion", "language_model"}
