"""The module for the library `evaluate`: by path, batch by batch, over two processes, and without the package."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from samf.evaluation.metrics.clinical_metrics import score_findings
from samf.evaluation.metrics.text_metrics import TEXT_METRICS, text_metrics

evaluate = pytest.importorskip("evaluate")

MODULE = Path(__file__).resolve().parents[2] / "evaluation" / "report_generation"
REFERENCES = [
    "Pleural effusion was observed in the right hemithorax. Heart size is normal.",
    "No nodule was detected in both lungs.",
    "Emphysematous changes are observed, more prominent in the upper lobes; 4.5 mm nodule.",
    "Consolidation.",
]
PREDICTIONS = [
    "Pleural effusions were seen in the left hemithorax. The heart size is normal.",
    "A nodule was detected in the left lung.",
    "",
    "Consolidation.",
]
# Loads the module where samf can't be imported, feeds it every second pair from its own on, and writes what comes back.
ALONE = """
import json, sys
sys.modules["samf"] = None
import evaluate
folder, cache, rank, count, pairs, output = sys.argv[1:]
rank, count = int(rank), int(count)
predictions, references = json.loads(pairs)
options = {"num_process": count, "process_id": rank, "experiment_id": "test"} if count > 1 else {}
metric = evaluate.load(folder, cache_dir=cache, **options)
for k in range(rank, len(predictions), count):
    metric.add_batch(predictions=[predictions[k]], references=[references[k]])
json.dump(metric.compute(), open(output, "w", encoding="utf-8"))
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the module by path, its copy and its data below tmp_path."""
    monkeypatch.setattr(evaluate.loading, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    return lambda folder=MODULE, **options: evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def metric(load):
    return load()


@pytest.fixture
def without_package(load, tmp_path, monkeypatch):
    """The module as it is where samf is not installed."""
    for name in ("text_metrics", "clinical_metrics"):
        monkeypatch.setitem(sys.modules, f"samf.evaluation.metrics.{name}", None)
    folder = shutil.copytree(MODULE, tmp_path / MODULE.name)
    with (folder / f"{MODULE.name}.py").open("a", encoding="utf-8") as file:
        file.write("# another file: one that was imported before would not be imported again\n")
    return load(folder)


def compute_alone(tmp_path: Path, count: int) -> list[dict | None]:
    """What each of `count` processes gets that share the pairs and don't have samf."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    shared = [str(MODULE), str(tmp_path / "cache")]
    runs = []
    for rank in range(count):
        output = tmp_path / f"{rank}.json"
        rest = [str(rank), str(count), json.dumps([PREDICTIONS, REFERENCES]), str(output)]
        command = [sys.executable, "-c", ALONE, *shared, *rest]
        runs.append((subprocess.Popen(command, cwd=tmp_path, env=environment), output))
    assert [process.wait(timeout=200) for process, _ in runs] == [0] * count
    return [json.loads(output.read_text(encoding="utf-8")) for _, output in runs]


def test_figures_are_the_packages(metric):
    found = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    text, findings = text_metrics(PREDICTIONS, REFERENCES), score_findings(PREDICTIONS, REFERENCES)
    assert {name: found[name] for name in TEXT_METRICS} == text["scores"]
    assert found["finding_macro_f1"] == findings["macro"]["f1"] and found["crg"] == findings["crg"]
    assert found["count"] == 4 and found["empty_predictions"] == 1
    assert found["not_available"] == text["not_available"]


def test_batches_give_the_same(metric):
    at_once = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == at_once


def check_alone(found: dict) -> None:
    """The reference libraries' figures are our own to 1e-9."""
    expected = text_metrics(PREDICTIONS, REFERENCES)["scores"]
    for name in TEXT_METRICS:
        if found[name] is not None:  # CIDEr where pycocoevalcap is absent, METEOR without WordNet
            assert found[name] == pytest.approx(expected[name], abs=1e-9), name
        else:
            assert name in found["not_available"]
    assert found["count"] == 4 and found["rouge_l"] > 0
    assert found["finding_macro_f1"] is None and "samf" in found["not_available"]["crg"]


def test_without_the_package_the_reference_libraries_give_the_same(without_package):
    check_alone(without_package.compute(predictions=PREDICTIONS, references=REFERENCES))


def test_distributed(load):
    """Two instances, as in two processes, each with every second pair: the first gets the figures of all."""

    def work(rank: int) -> dict | None:
        part = load(num_process=2, process_id=rank, experiment_id="test")
        part.add_batch(predictions=PREDICTIONS[rank::2], references=REFERENCES[rank::2])
        return part.compute()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (0, 1))
    assert second is None and first["count"] == 4
    expected = text_metrics(PREDICTIONS, REFERENCES)["scores"]
    assert {name: first[name] for name in TEXT_METRICS} == pytest.approx(expected)


@pytest.mark.slow
def test_two_processes_without_the_package(tmp_path):
    first, second = compute_alone(tmp_path, 2)
    assert second is None
    check_alone(first)


def test_no_pairs_are_an_error(metric):
    with pytest.raises(ValueError, match="Evaluation module cache file doesn't exist|no predictions"):
        metric.compute(predictions=[], references=[])


def test_a_space_has_all_it_needs():
    """The folder is what is uploaded: a page, its requirements, and a README with the Space's settings."""
    names = {path.name for path in MODULE.iterdir() if not path.name.startswith((".", "__"))}
    assert names == {"README.md", "app.py", "report_generation.py", "requirements.txt"}
    readme = (MODULE / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("---\n") and "sdk: gradio" in readme and "app_file: app.py" in readme
