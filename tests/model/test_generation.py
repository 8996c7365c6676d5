"""generate() by the library's own machinery: every strategy, cache and batch gives the tokens that the model means."""

import copy

import pytest
import torch
from tiny import FUSION_TYPES, IMAGE_ID, tiny_batch, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
PROMPT_LENGTHS = (9, 4, 6)
# Strategies that the library runs on a batch; the others take one prompt at a time.
BATCHED = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


class KeyedSampling(LogitsProcessor):
    """Draws from the softmax by noise that depends on a row's own tokens, not on its place in the batch.

    Gumbel noise and a maximum are one draw from the softmax (Gumbel-max); all else is then excluded.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids):
            seed = hash(tuple(token for token in ids.tolist() if token != 1)) % 2**31
            uniform = torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(seed))
            best = (scores[row] - (-uniform.log()).log()).argmax()
            chosen[row, best] = scores[row, best]
        return chosen


def prompts(fusion_type: str) -> tuple[list[dict], dict]:
    """Three prompts of different lengths with volumes of their own, each alone and as one left-padded batch."""
    singles = []
    for seed, length in enumerate(PROMPT_LENGTHS):
        batch = tiny_batch(fusion_type, rows=1, prompt=length, answer=0, seed=seed)
        batch.pop("labels")
        singles.append(batch)
    longest = max(single["input_ids"].shape[1] for single in singles)
    columns: dict[str, list[torch.Tensor]] = {key: [] for key in singles[0]}
    for single in singles:
        missing = longest - single["input_ids"].shape[1]
        columns["input_ids"].append(torch.nn.functional.pad(single["input_ids"], (missing, 0), value=1))
        columns["attention_mask"].append(torch.nn.functional.pad(single["attention_mask"], (missing, 0)))
        columns["pixel_values"].append(single["pixel_values"])
    return singles, {key: torch.cat(rows) for key, rows in columns.items()}


def made(model, batch: dict, **options) -> torch.Tensor:
    return model.generate(**batch, **{**GREEDY, **options})[:, -NEW_TOKENS:]


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("strategy", BATCHED)
def test_a_left_padded_batch_makes_the_tokens_that_each_prompt_makes_alone(strategy, fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    singles, batch = prompts(fusion_type)
    options = dict(BATCHED[strategy])
    if strategy == "sampling":
        options["logits_processor"] = LogitsProcessorList([KeyedSampling()])
    if strategy == "beam sampling":
        options["logits_processor"] = LogitsProcessorList([Sharpened()])
    together = made(model, batch, **options)
    for row, single in enumerate(singles):
        assert torch.equal(together[row], made(model, single, **options)[0])
    assert len({tuple(row.tolist()) for row in together}) > 1  # the rows differ: the comparison could fail


class Sharpened(LogitsProcessor):
    """Scores so far apart that beam sampling can only draw the best ones."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores * 1e4


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("strategy", ["assisted", "prompt lookup", "streaming"])
def test_speculative_and_streamed_tokens_are_the_greedy_ones(strategy, fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    singles, batch = prompts(fusion_type)
    expected = made(model, batch)
    for row, single in enumerate(singles):
        options, streamer = {}, Collected()
        if strategy == "assisted":
            options["assistant_model"] = noisy_copy(model)
        elif strategy == "prompt lookup":
            options["prompt_lookup_num_tokens"] = 3
        else:
            options["streamer"] = streamer
        assert torch.equal(made(model, single, **options)[0], expected[row])
        if strategy == "streaming":
            assert streamer.tokens[-NEW_TOKENS:] == expected[row].tolist()


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def noisy_copy(model):
    """An assistant that is often right and sometimes wrong."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    return assistant


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("cache", ["off", "dynamic", "static", "offloaded", "offloaded_static"])
def test_every_cache_makes_the_tokens_of_the_default_one(cache, fusion_type):
    model = tiny_model(fusion_type=fusion_type, text={"sliding_window": 12})  # shorter than the sequence
    _, batch = prompts(fusion_type)
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("an offloaded cache moves between a GPU and the CPU")
    options = {"use_cache": False} if cache == "off" else {"cache_implementation": cache}
    for strategy in ({}, {"num_beams": 3}):
        assert torch.equal(made(model, batch, **strategy, **options), made(model, batch, **strategy))


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_one_text_is_the_same_in_a_prefill_and_token_by_token(fusion_type):
    """Logits of a whole sequence in one pass are those of steps through the cache: decoding drops nothing of the volume."""
    model = tiny_model(fusion_type=fusion_type)
    _, batch = prompts(fusion_type)
    result = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    length = batch["input_ids"].shape[1]
    attention_mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)
    whole = {
        "input_ids": result.sequences,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": batch["pixel_values"],
        "prompt_mask": batch["attention_mask"].bool(),
    }
    with torch.no_grad():
        logits = model(**whole).logits[:, length - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(result.logits, dim=1), rtol=0, atol=1e-5)


def test_text_only_prompts_generate():
    model = tiny_model()
    input_ids = torch.randint(6, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    plain = model.model.language_model
    expected = input_ids
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model.lm_head(plain(input_ids=expected).last_hidden_state[:, -1])
        logits[:, 3] = -torch.inf  # min_new_tokens: no end yet
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_several_sequences_of_a_volume_share_its_fused_vector(fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    singles, _ = prompts(fusion_type)
    beams = model.generate(**singles[0], **GREEDY, num_beams=3, num_return_sequences=3)
    assert beams.shape[0] == 3 and torch.equal(beams[:1], model.generate(**singles[0], **GREEDY, num_beams=3))


def test_a_second_turn_goes_on_from_the_first_ones_cache():
    """A cache that holds the volume's tokens is not asked for them again; a prompt without any place for them is refused."""
    model = tiny_model()
    singles, _ = prompts("ao2d")
    first = singles[0]
    mask = first["attention_mask"].bool()
    turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = torch.cat([turn.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    second = {**first, "input_ids": more, "attention_mask": torch.ones_like(more), "prompt_mask": mask}
    expected = model.generate(**second, **GREEDY)
    cache = {"cache" if "cache" in turn else "past_key_values": turn.get("cache", turn.get("past_key_values"))}
    assert torch.equal(model.generate(**second, **cache, **GREEDY), expected)
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**{**first, "input_ids": first["input_ids"].clamp(min=6)}, **GREEDY)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_text_in_the_cache_before_the_volume_changes_no_token(fusion_type):
    """A shared system prompt, or a first turn without a volume: the tokens of the whole sequence without a cache."""
    model = tiny_model(fusion_type=fusion_type)
    single = prompts(fusion_type)[0][0]
    start = torch.randint(6, 99, (1, 5), generator=torch.Generator().manual_seed(3))
    turn = model.generate(start, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    name = "cache" if "cache" in turn else "past_key_values"
    ids = torch.cat([turn.sequences, single["input_ids"]], dim=1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": single["pixel_values"]}
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    for mask in (None, torch.arange(ids.shape[1])[None] != 5):  # all of the prompt, and all but one token
        whole["prompt_mask"] = mask
        expected = model.generate(**whole, **options)
        found = model.generate(**whole, **options, **{name: copy.deepcopy(turn[name])})
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_no_strategy_makes_a_placeholder(fusion_type):
    """Neither a processor that demands it nor a proposal brings it in, and the other tokens are those made without it."""
    model = tiny_model(fusion_type=fusion_type)
    single = prompts(fusion_type)[0][0]

    def demand(ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(1, torch.tensor([IMAGE_ID]), 1e4)

    expected = made(model, single)
    beams = made(model, single, num_beams=3)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}):
        found = made(model, single, logits_processor=LogitsProcessorList([demand]), **options)
        assert torch.equal(found, beams if options.get("num_beams") else expected)
        assert not (found == IMAGE_ID).any()
    # A prompt that says again what stands before its image tokens: look-up proposes them.
    again = torch.cat([torch.tensor([[40, 41]]), single["input_ids"], torch.tensor([[40, 41]])], dim=1)
    looked_up = {"input_ids": again, "attention_mask": torch.ones_like(again), "pixel_values": single["pixel_values"]}
    assert torch.equal(made(model, looked_up, prompt_lookup_num_tokens=3), made(model, looked_up))


def test_look_up_behind_a_filled_cache_is_refused():
    """The library reads the prompt again over what the cache holds: any language model then makes other tokens."""
    model = tiny_model()
    single = prompts("ao2d")[0][0]
    turn = model.generate(**single, **GREEDY, return_dict_in_generate=True)
    name = "cache" if "cache" in turn else "past_key_values"
    more = torch.cat([turn.sequences, torch.tensor([[9, 40, 41]])], dim=1)
    second = {**single, "input_ids": more, "attention_mask": torch.ones_like(more)}
    with pytest.raises(ValueError, match="Prompt look-up and assisted decoding"):
        model.generate(**second, **GREEDY, **{name: turn[name]}, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 5}, {"do_sample": True, "num_return_sequences": 4}, {"use_cache": False}]
)
def test_the_slices_of_a_volume_are_encoded_once(options):
    model, read = tiny_model(), []
    single = prompts("ao2d")[0][0]
    model.model.slice_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    made(model, single, **options)
    assert read == [single["pixel_values"].shape[1]]


def test_what_the_language_model_cannot_see_is_said(caplog):
    single = prompts("ao2d")[0][0]  # 13 tokens, of which 4 are image tokens
    for text, told in (
        ({"sliding_window": 21}, ""),
        ({"sliding_window": 20}, "20 tokens back"),
        ({"max_position_embeddings": 20}, "the 20 positions"),
    ):
        caplog.clear()
        made(tiny_model(text=text), single)
        assert told in caplog.text and bool(caplog.text) is bool(told)
    caplog.clear()
    tiny_model(text={"sliding_window": 11})(**single)
    assert "11 tokens back" in caplog.text
    with pytest.raises(ValueError, match="prefill_chunk_size=4"):
        made(tiny_model(), single, prefill_chunk_size=4)
