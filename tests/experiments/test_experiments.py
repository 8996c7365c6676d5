"""Experiments on phantoms: what is finished stays, what the tables say, and that two rows and the three stages run."""

import json
import statistics
from pathlib import Path

import pytest

from samf.experiments import phantoms, stages, table3
from samf.experiments.phantoms import COLUMNS, table_rows
from samf.experiments.table3 import all_runs, main
from samf.phantoms.dataset import PhantomSettings, write_dataset
from samf.training.param_groups import PARTS


def finish(output: Path, name: str, seed: int, **figures: float) -> None:
    folder = output / "runs" / f"{name}_seed{seed}"
    folder.mkdir(parents=True)
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def test_runs_cover_fusions_scales_positions_and_the_leak():
    runs = all_runs()
    variants = [run.overrides for run in runs.values() if run.overrides]
    choices = {
        (v["fusion_type"], v.get("fusion_scale"), v["slice_position_scope"], v.get("fusion_text_scope"))
        for v in variants
    }
    expected = {
        (fusion, scale, positions, None)
        for fusion in ("samf", "ao2d", "slice_tokens")
        for scale in (None, "rsqrt")
        for positions in ("none", "all")
    }
    recipe = ("samf", None, "none", None)  # the variants' own: it isn't trained twice
    assert choices == (expected - {recipe}) | {("ao2d", None, "none", "sequence")}
    assert len(variants) == len(choices)


def test_the_table_has_means_and_standard_deviations():
    seeds = [{"accuracy": 0.25, "gap": 0.1}, {"accuracy": 0.75, "gap": 0.2}]
    name, count, *cells = next(table_rows({"row": seeds}, COLUMNS))
    assert (name, count) == ("row", "2")
    by_column = dict(zip(COLUMNS, cells, strict=True))
    assert by_column["accuracy"] == f"0.500 ± {statistics.stdev([0.25, 0.75]):.3f}"
    assert by_column["alpha_entropy"] == ""


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(phantoms, "call", lambda script, recipes, options: started.append(options))
    monkeypatch.setattr(phantoms, "prepare_language_model", lambda args: tmp_path)
    monkeypatch.setattr(table3, "prepare_encoder", lambda args: tmp_path)
    monkeypatch.setattr(table3, "prepare_warmup", lambda args, scope: tmp_path / scope)
    monkeypatch.setattr(phantoms, "measure", lambda args, folder: {"accuracy": 0.5})
    finish(tmp_path, "samf_warmup", 0, accuracy=0.1)
    (tmp_path / "runs" / "samf_warmup_seed1").mkdir()
    (tmp_path / "runs" / "samf_warmup_seed1" / "left").touch()  # of a run that was cut off
    options = ["--data", "phantoms", "--output", str(tmp_path), "--runs", "samf_warmup", "--seeds", "0", "1"]
    monkeypatch.setattr(phantoms, "atomic_write", write_with_folder)
    main(options)
    assert [(run["seed"], run["aggregator"].name) for run in started] == [(1, "none")]
    assert not (tmp_path / "runs" / "samf_warmup_seed1" / "left").exists()
    main(options)
    assert len(started) == 1
    assert "| samf_warmup | 2 | 0.300 ± 0.283 |" in capsys.readouterr().out


def write_with_folder(path: Path, text: str) -> None:
    """The trained folder isn't there: nothing was trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_runs_of_other_settings_are_not_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(table3, "run_metrics", lambda args, run, seed: {"accuracy": 0.5})
    options = ["--data", "phantoms", "--output", str(tmp_path / "out"), "--runs", "samf_warmup", "--seeds"]
    main([*options, "0", "--max_steps", "4"])
    main([*options, "0", "1", "--max_steps", "4"])
    with pytest.raises(
        ValueError, match=r"max_steps \(4, now 5\), valid_limit \(None, now 9\)\. Give another --output"
    ):
        main([*options, "0", "--max_steps", "5", "--valid_limit", "9"])


def test_an_unknown_run_is_an_error_that_lists_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--data", "x", "--output", str(tmp_path), "--runs", "samf_warm"])
    assert "samf_warmup_both_frozen" in capsys.readouterr().err


def write_log(folder: Path, **values: list[float]) -> None:
    folder.mkdir(parents=True)
    rows = [{name: value} for name, found in values.items() for value in found]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}), encoding="utf-8")


def test_stages_compare_what_is_trained_with_what_is_not(tmp_path, monkeypatch, capsys):
    """Beside each row stands what its encoder and its aggregator reached, trained or not."""
    retrieval = {"eval_retrieval_interleaved": [0.1, 0.8], "eval_retrieval_contiguous": [0.2, 0.6]}
    write_log(tmp_path / "seed0" / "1_encoder", eval_knn_accuracy=[0.5, 0.4, 0.75])
    write_log(tmp_path / "seed0" / "2_aggregator", **retrieval)
    started = []
    monkeypatch.setattr(phantoms, "call", lambda script, recipes, options: started.append(options))
    monkeypatch.setattr(phantoms, "prepare_language_model", lambda args: tmp_path)
    monkeypatch.setattr(phantoms, "measure", lambda args, folder: {"accuracy": 0.5})
    monkeypatch.setattr(phantoms, "atomic_write", write_with_folder)
    stages.main(["--data", "phantoms", "--output", str(tmp_path), "--seeds", "0"])
    folder = tmp_path / "seed0"
    untrained, trained = folder / "untrained_encoder", folder / "1_encoder"
    aggregator = folder / "2_aggregator"
    starts = [(untrained, None)] * 2 + [(trained, None)] + [(trained, aggregator)] * 3
    assert [(run["slice_encoder"], run.get("aggregator")) for run in started] == starts
    frozen = ["slice_encoder" not in run.get("train_parts", PARTS) for run in started]
    assert frozen == [name.endswith("vit_frozen") for name in stages.ROWS]
    assert ["learning_rates" in run for run in started] == [name.endswith("vit_slow") for name in stages.ROWS]
    assert {(run["max_steps"], run["seed"]) for run in started} == {(stages.STEPS["max_steps"], 0)}
    table = capsys.readouterr().out
    assert "| scratch_vit_frozen | 1 | 0.500 |  |  | 0.500 |" in table
    assert "| stage_1_vit_frozen | 1 | 0.750 | 0.100 | 0.200 | 0.500 |" in table
    assert "| stages | 1 | 0.750 | 0.800 | 0.600 | 0.500 |" in table


def small_phantoms(folder: Path) -> Path:
    write_dataset(
        folder,
        train_patients=34,  # a batch of the warm-up has 32 scans
        valid_patients=5,
        settings=PhantomSettings(voxel_mm=8.0),
        text_questions=50,
        workers=1,
        progress=False,
    )
    return folder


@pytest.mark.slow
def test_two_rows_run_from_phantoms_to_the_table(tmp_path):
    data = small_phantoms(tmp_path / "phantoms")
    names = ["ao2d_warmup_both_frozen", "slice_tokens"]
    steps = [f"--{name}=4" for name in ("max_steps", "language_steps", "encoder_steps", "warmup_steps")]
    options = [
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--runs",
        *names,
        "--seeds",
        "0",
    ]
    main([*options, *steps, "--valid_limit", "12"])
    found = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert list(found) == names
    common = {"accuracy", "finding_f1", "own_loss", "gap"}  # four steps log no training loss
    entropies = {"alpha_entropy", "alpha_largest", "gamma_entropy"}
    assert set(found[names[0]][0]) == common | entropies
    assert set(found[names[1]][0]) == common


@pytest.mark.slow
def test_three_stages_run_from_phantoms_to_the_table(tmp_path):
    data = small_phantoms(tmp_path / "phantoms")
    steps = [f"--{name}=2" for name in ("dino_steps", "max_steps", "language_steps", "warmup_steps")]
    stages.main(["--data", str(data), "--output", str(tmp_path / "out"), "--seeds", "0", *steps, "--valid_limit", "12"])
    found = json.loads((tmp_path / "out" / "stages.json").read_text(encoding="utf-8"))
    assert list(found) == list(stages.ROWS)
    for name, (figures,) in found.items():
        assert {"knn", "accuracy", "own_loss", "gap"} <= set(figures)
        assert ("retrieval_contiguous" in figures) == (not name.startswith("scratch"))
