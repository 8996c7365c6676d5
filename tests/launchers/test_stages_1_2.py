"""Stages 1 and 2 under the recipe `ddp`, with two processes, against one process."""

import pytest
import torch
from launch import run_script
from launchers.harness import Run, accelerate, assert_same_weights, succeed, without_cpu
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMON = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "valid_share": 0.34,
}
ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "slices_per_plane": 4,
    "local_crops": 2,
    "local_crop_size": 16,
    "head_dim": 32,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "attention_slices": 0,
    "weight_decay": 0.04,
}
WARMUP = {
    "volume_dim": 8,
    "aggregator_num_heads": 2,
    "aggregator_ffn_dim": 24,
    "aggregator_dropout": 0.0,
    "adjacent_slices": 1,
}


@pytest.mark.parametrize(
    ("script", "own", "batch", "metric"),
    [
        ("pretrain_encoder.py", ENCODER, 8, "eval_knn_accuracy"),
        ("warmup_aggregator.py", WARMUP, 4, "eval_retrieval_contiguous"),
    ],
    ids=["stage 1", "stage 2"],
)
def test_a_stage_trains_under_ddp_as_on_one_process(work, tmp_path, script, own, batch, metric):
    options = {**COMMON, **own, "data": work / "phantoms", "slice_cache": tmp_path / "cache"}
    if script == "warmup_aggregator.py":
        options["slice_encoder"] = work / "encoder"
    sizes = {"per_device_train_batch_size": batch, "output_dir": tmp_path / "one"}
    run_script(script, 1, {**options, **sizes})
    sizes = {"per_device_train_batch_size": batch // 2, "output_dir": tmp_path / "ddp"}
    succeed(accelerate("ddp"), script, without_cpu({**options, **sizes}))
    single, both = Run(tmp_path / "one"), Run(tmp_path / "ddp")
    assert len(both.facts()) == 2 and len(single.logged()) == 4
    assert both.logged() == pytest.approx(single.logged(), abs=1e-4)
    assert both.logged(metric) == single.logged(metric)
    (file,) = (path.name for path in single.folder.glob("*.safetensors"))
    weights = load_file(both.folder / file)
    assert_same_weights(weights, single.weights(file), atol=2e-4)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
