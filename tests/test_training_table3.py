"""Table 3 in miniature: what is finished stays, what the table says, and that two rows run."""

import json
import statistics
from pathlib import Path

import pytest

from samf.data.phantom import PhantomSettings, write_dataset
from samf.training import table3
from samf.training.table3 import COLUMNS, all_runs, main, table_rows


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
    assert choices == expected | {("ao2d", None, "none", "sequence")}
    assert len(variants) == len(choices)


def test_the_table_has_means_and_standard_deviations():
    seeds = [{"accuracy": 0.25, "gap": 0.1}, {"accuracy": 0.75, "gap": 0.2}]
    name, count, *cells = next(table_rows({"row": seeds}))
    assert (name, count) == ("row", "2")
    by_column = dict(zip(COLUMNS, cells, strict=True))
    assert by_column["accuracy"] == f"0.500 ± {statistics.stdev([0.25, 0.75]):.3f}"
    assert by_column["alpha_entropy"] == ""


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(table3, "call", lambda script, recipes, options: started.append(options))
    monkeypatch.setattr(table3, "prepare_language_model", lambda args: tmp_path)
    monkeypatch.setattr(table3, "prepare_warmup", lambda args, scope: tmp_path / scope)
    monkeypatch.setattr(table3, "measure", lambda args, folder: {"accuracy": 0.5})
    finish(tmp_path, "samf_warmup", 0, accuracy=0.1)
    (tmp_path / "runs" / "samf_warmup_seed1").mkdir()
    (tmp_path / "runs" / "samf_warmup_seed1" / "left").touch()  # of a run that was cut off
    options = ["--data", "phantoms", "--output", str(tmp_path), "--runs", "samf_warmup", "--seeds", "0", "1"]
    monkeypatch.setattr(table3, "write_atomic", write_with_folder)
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
    monkeypatch.setattr(table3, "train_run", lambda args, run, seed: {"accuracy": 0.5})
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


@pytest.mark.slow
def test_two_rows_run_from_phantoms_to_the_table(tmp_path):
    write_dataset(
        tmp_path / "phantoms",
        train_patients=34,  # a batch of the warm-up has 32 scans
        valid_patients=5,
        settings=PhantomSettings(voxel_mm=8.0),
        text_questions=50,
        workers=1,
        progress=False,
    )
    names = ["ao2d_warmup_both_frozen", "slice_tokens"]
    steps = [f"--{name}=4" for name in ("max_steps", "language_steps", "warmup_steps")]
    options = [
        "--data",
        str(tmp_path / "phantoms"),
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
