"""The demo runs from nothing to a report, and a second run keeps what the first one finished."""

import numpy as np

from samf.experiments import demo
from samf.phantoms.dataset import make_phantom, write_nifti


def test_the_demo_runs_and_goes_on_where_it_stopped(tmp_path, capsys):
    scan = tmp_path / "scan.nii.gz"
    write_nifti(make_phantom(np.random.default_rng(1)), scan, "PIR")
    arguments = [
        "--output",
        str(tmp_path / "demo"),
        "--train_patients",
        "8",
        "--valid_patients",
        "3",
        "--max_steps",
        "2",
    ]
    demo.main(arguments)
    first = capsys.readouterr().out
    assert "reports: findings, macro-F1" in first and "multiple choice: accuracy" in first
    assert "Reference:" in first and (tmp_path / "demo" / "slices.png").stat().st_size > 10_000

    weights = tmp_path / "demo" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    demo.main([*arguments, "--ct", str(scan)])
    second = capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before and "train 3_report" not in second
    assert f"Report for {scan}" in second and (tmp_path / "demo" / "scan.nii.gz.png").is_file()
