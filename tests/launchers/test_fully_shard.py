"""`fully_shard` without accelerate: SamfTrainer saves a sharded model whole."""

import json

import pytest
import torch
from launch import REPOSITORY
from launchers.fsdp2_training import build, train
from launchers.harness import launch, torchrun
from peft import PeftModel
from tiny import tiny_batch, tiny_model

from samf import SamfForConditionalGeneration
from samf.training.repository import check_whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_sharded_weights_train_and_are_saved_whole(tmp_path, kind):
    """fully_shard on the CPU over gloo trains as one process on the whole batch, and from_pretrained reads the result."""
    done = launch([*torchrun(2), str(REPOSITORY / "tests/launchers/fsdp2_training.py"), str(tmp_path), kind])
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert all(fact["sharded"] for fact in facts)
    assert sum(fact["own_share"] for fact in facts) == pytest.approx(1)
    assert max(fact["own_share"] for fact in facts) < 0.6

    expected = build(kind == "adapter")
    losses = train(expected, slice(0, 4))
    means = [sum(pair) / 2 for pair in zip(*(fact["losses"] for fact in facts), strict=True)]
    torch.testing.assert_close(means, losses, rtol=0, atol=1e-4)

    saved = tmp_path / "saved"
    check_whole(saved)
    if kind == "adapter":
        base = tiny_model(finding_names=["a", "b"], aggregator_dropout=0.0)
        model = PeftModel.from_pretrained(base, saved)
    else:
        model = SamfForConditionalGeneration.from_pretrained(saved)
        assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["architectures"] == [
            "SamfForConditionalGeneration"
        ]
    batch = tiny_batch("ao2d", rows=4)
    with torch.no_grad():
        output, wanted = model.eval()(**batch).logits, expected.eval()(**batch).logits
        untrained = build(kind == "adapter").eval()(**batch).logits
    # Initial weights that differ by 1e-7 of themselves end in logits that differ by 4e-3 (of 3.5).
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-2)
    assert (untrained - wanted).abs().max() > 0.1
