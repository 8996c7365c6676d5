"""A converted model gives what the paper's published code gave for the same weights ($SAMF_TEST_REFERENCE)."""

import pytest
import torch
from safetensors.torch import load_file

from samf import SamfForConditionalGeneration, SamfImageProcessor
from samf.scripts.convert_published_checkpoint import ConvertArguments, convert_model


@pytest.fixture(scope="module", params=["samf", "ao2d"])
def case(request, test_reference, tmp_path_factory):
    """The converted model, and the recorded inputs and outputs."""
    file = test_reference / f"published_{request.param}_tiny.safetensors"
    folder = tmp_path_factory.mktemp("converted") / request.param
    convert_model(ConvertArguments(str(file), str(folder), image_token_id=120))
    model = SamfForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    assert (model.config.fusion_type, model.config.project_text) == (request.param, request.param == "ao2d")
    assert SamfImageProcessor.from_pretrained(folder).size == 224
    tensors = load_file(file)
    given, expected = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in ("input/", "output/")
    )
    given["pixel_values"] = (given.pop("images_u8").float() / 255)[:, :, None].expand(-1, -1, 3, -1, -1)
    return model, given, expected


def test_outputs_of_the_published_code(case):
    model, given, expected = case
    fused = []
    hook = model.model.fusion.register_forward_hook(lambda module, inputs, output: fused.append(output[0]))
    with torch.no_grad():
        outputs = model(**given)
    hook.remove()
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(outputs.image_outputs.last_hidden_state, expected["slice_embeddings"], **close)
    torch.testing.assert_close(outputs.image_outputs.pooler_output[:, 0], expected["volume_embedding"], **close)
    torch.testing.assert_close(fused[0], expected["fused_token"], **close)
    torch.testing.assert_close(outputs.logits[:, -40:], expected["logits_last40"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, expected["loss"].reshape(()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_of_the_published_code(case, use_cache):
    model, given, expected = case
    ids, wanted = given["input_ids"][:1], expected["greedy_tokens_sample0"]
    made = model.generate(
        input_ids=ids,
        pixel_values=given["pixel_values"][:1],
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        use_cache=use_cache,
    )
    assert made[:, ids.shape[1] :].tolist() == wanted.tolist()
