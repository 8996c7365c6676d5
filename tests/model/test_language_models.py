"""The library's language models in SAMF: their own logits, losses and caches, or a refusal by name."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from samf import SamfForConditionalGeneration
from samf.benchmarks.component_tables import SWITCH
from samf.benchmarks.components import (
    ANSWER,
    IMAGE_ID,
    LANGUAGE_MODELS,
    from_components,
    randomise,
    reloaded,
    samf_config,
    text_config,
    train_in_processes,
    try_language_model,
    volume_batch,
)
from samf.model.language_model_samf import rope_sets

REFUSED = {
    "gemma3n_text": ("Gemma3nForCausalLM", "hidden_size_per_layer_input"),
    "bert": ("BertLMHeadModel", "head"),
    "bart": ("BartForCausalLM", "inputs_embeds"),
    "xlnet": ("XLNetLMHeadModel", "cache"),
}
# One of each kind: rope switch, softcap, bias, experts with a loss, other names of the embeddings, a head that calls its
# model's decoder, a recurrent one whose model fills its children's buffers.
QUICK = ("phi3, longrope", "llama, dynamic rope", "gemma2", "phi", "mixtral", "gpt2", "opt", "falcon_h1")
ACCEPTED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in LANGUAGE_MODELS
    if name not in REFUSED
]
GREEDY = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
GREEDY |= {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_language_model_keeps_its_own_logits_loss_and_cache(name):
    """On text alone as its own class; with a volume as without the cache; as before after save and load."""
    row = try_language_model(name)
    assert all(float(row[key]) < 1e-5 for key in ("text", "cache", "reload")), row


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_loss_without_logits_is_the_loss(name):
    """The head runs on the hidden states before labels only; each row has another number of them, and padding."""
    model = randomise(SamfForConditionalGeneration(samf_config(text=name)))
    batch = volume_batch(answer=ANSWER)
    batch["attention_mask"][1, -3:], batch["labels"][1, -7:] = 0, -100
    whole, needed = model(**batch), model(**batch, skip_logits=True)
    assert needed.logits is None and whole.logits.shape[:2] == batch["labels"].shape
    torch.testing.assert_close(needed.loss, whole.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_language_model_that_cant_be_run_is_refused_by_name(name):
    class_name, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{class_name} can't be SAMF's language model: .*{reason}"):
        SamfForConditionalGeneration(samf_config(text=name))


def test_a_multimodal_model_is_refused_with_the_remedy():
    config = samf_config()
    config.text_config = type("Composite", (type(config.text_config),), {})()
    config.text_config.get_text_config = lambda *args, **kwargs: config.text_config.__class__()
    with pytest.raises(ValueError, match="Composite can't .* only the configuration of its text model"):
        SamfForConditionalGeneration(config)


def test_rope_sets_follow_the_librarys_switch():
    """Long factors from the first position past the original length on, in each rotary embedding that has them."""
    config = text_config("phi3, longrope")
    assert [rope_sets(config, length) for length in (1, SWITCH, SWITCH + 1)] == [[0], [0], [1]]
    config = text_config("llama, dynamic rope")
    assert [rope_sets(config, length) for length in (1, SWITCH, SWITCH + 1)] == [[0], [0], [SWITCH + 1]]
    assert rope_sets(text_config("llama"), 10**6) == []


@pytest.mark.parametrize("switches", ["llama, dynamic rope", "both kinds of layers"])
def test_logits_depend_on_no_earlier_calls(switches):
    """Dynamic rotary embeddings keep the factors of the longest sequence; each call here as the first of a new model."""
    config = text_config("llama, dynamic rope")
    if switches != "llama, dynamic rope":
        config = text_config("gemma3_text")
        config.max_position_embeddings = SWITCH
        for parameters in config.rope_parameters.values():
            parameters.update(rope_type="dynamic", factor=4.0)
    own = randomise(AutoModelForCausalLM.from_config(config))
    settings = samf_config()
    settings.text_config = config
    model = SamfForConditionalGeneration(settings).eval()
    model.model.language_model.load_state_dict(own.base_model.state_dict())
    model.lm_head.load_state_dict(own.lm_head.state_dict())
    with torch.no_grad():
        for length in (60, 50, SWITCH, 40, 20, 60):
            input_ids = torch.randint(6, 99, (2, length), generator=torch.Generator().manual_seed(length))
            expected = copy.deepcopy(own)(input_ids=input_ids).logits
            torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)


def test_the_cache_is_filled_anew_at_the_switch_by_positions_and_not_by_padding():
    """A batch whose every row is padded passes the switch later than its length says; each row as by itself."""
    model = randomise(SamfForConditionalGeneration(samf_config("phi3, longrope")))
    batch = volume_batch(rows=2)
    encoded = []
    padded = {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (5, 0), value=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (5, 0)),
    }
    reads = []
    model.model.aggregator.register_forward_hook(lambda *_: reads.append(1))
    model.model.slice_encoder.register_forward_hook(lambda *_: encoded.append(1))
    expected = model.generate(**batch, **GREEDY, use_cache=False).logits
    reads.clear()
    encoded.clear()
    actual = model.generate(**padded, **GREEDY).logits
    assert len(encoded) == 1
    assert (
        2 <= len(reads) <= 3
    )  # with the prompt, at the switch, and where Phi-3's own code counts padding as positions
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama, tied"])
def test_tied_weights_stay_tied_whatever_they_are_called(name, tmp_path):
    own = randomise(AutoModelForCausalLM.from_config(text_config(name)))
    model = from_components(tmp_path, own)
    again = reloaded(model, tmp_path)
    for tied in (model, again):
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, own.get_output_embeddings().weight)


def test_the_layout_of_saved_folders_is_what_it_was():
    """Weights lie under model.language_model and lm_head, a bias included, and nowhere twice."""
    names = set(SamfForConditionalGeneration(samf_config("phi")).state_dict())
    assert {"lm_head.weight", "lm_head.bias", "model.language_model.embed_tokens.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"model", "lm_head"}


def test_experts_have_a_loss_and_their_routers_logits_are_given():
    model = randomise(SamfForConditionalGeneration(samf_config("mixtral")))
    batch = volume_batch(answer=ANSWER)
    output = model(**batch)
    model.config.text_config.output_router_logits = False
    without = model(**batch)
    expected = without.loss + model.config.text_config.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(output.loss, expected)
    assert output.aux_loss > 0 and len(output.router_logits) == 2
    assert without.aux_loss is None and without.router_logits is None


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_every_weight_of_a_language_model_gets_a_gradient(name):
    """DistributedDataParallel waits for each, and dies at the second step for want of one."""
    model = SamfForConditionalGeneration(samf_config(name)).train()
    model(**volume_batch(answer=ANSWER)).loss.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.slow
def test_two_steps_in_two_processes():
    names = [("text", name) for name in LANGUAGE_MODELS if name not in REFUSED]
    assert set(train_in_processes(names).values()) == {"yes"}
