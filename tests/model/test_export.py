"""torch.export and ONNX: one graph for any number of volumes, slices and tokens, saved and read again."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.export import Dim

from samf import SamfForConditionalGeneration

ROWS, SLICES, TOKENS = Dim("rows", min=1, max=64), Dim("slices", min=1, max=1024), Dim("tokens", min=5, max=400)
SHAPES = (1, 9, 4), (3, 12, 9)  # volumes, slices, prompt tokens: others than those exported with


class Features(nn.Module):
    """Slice encoder and aggregator: z_2d (B, S, D) and z_3d (B, 1, volume_dim)."""

    def __init__(self, model: SamfForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        output = self.model.get_image_features(pixel_values)
        return output.last_hidden_state, output.pooler_output


class Logits(Features):
    def forward(self, pixel_values, input_ids, attention_mask, slice_planes=None, slice_positions=None):
        places = {"slice_planes": slice_planes, "slice_positions": slice_positions}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return (self.model(**inputs, **places, use_cache=False).logits,)


def arguments(
    part: type[Features], rows: int, slices: int, prompt: int, places: bool = False
) -> tuple[torch.Tensor, ...]:
    batch = tiny_batch("ao2d", rows=rows, prompt=prompt)
    given = (torch.randn(rows, slices, 3, 32, 32),)
    if part is Logits:
        given += (batch["input_ids"], batch["attention_mask"])
        if places:
            given += (torch.randint(0, 3, (rows, slices)), torch.rand(rows, slices))
    return given


def exported_with(part: type[Features], places: bool) -> tuple[tuple[torch.Tensor, ...], tuple[dict, ...]]:
    """The example inputs (2 volumes, 6 slices), and which of their sizes are free."""
    text, volume = {0: ROWS, 1: TOKENS}, {0: ROWS, 1: SLICES}
    free = (volume, text, text, volume, volume)
    example = arguments(part, 2, 6, 7, places)
    return example, free[: len(example)]


@pytest.mark.parametrize("part", [Features, pytest.param(Logits, marks=pytest.mark.slow)])
def test_an_exported_model_is_saved_and_reads_other_volumes(part, tmp_path):
    """The whole model without planes and positions too, which the model then finds by itself."""
    module = part(tiny_model()).eval()
    example, free = exported_with(part, places=False)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=free)
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2").module()
        for shape in SHAPES:
            given = arguments(part, *shape)
            for actual, expected in zip(again(*given), module(*given), strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "places"), [(Features, False), (Logits, False), (Logits, True)])
def test_onnx_reads_other_volumes(part, places, tmp_path: Path):
    pytest.importorskip("onnx", reason="export: pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="export: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="export: pip install onnx onnxscript onnxruntime")
    module = part(tiny_model()).eval()
    example, free = exported_with(part, places)
    with torch.no_grad():
        program = torch.onnx.export(module, example, dynamic_shapes=free, dynamo=True)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for shape in SHAPES:
        given = arguments(part, *shape, places)
        outputs = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
        with torch.no_grad():
            for actual, expected in zip(outputs, module(*given), strict=True):
                torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=1e-5)
