"""Conversations and volumes become inputs: placeholders, padding, the prompt mask, and the collator on top of it."""

import inspect

import numpy as np
import pytest
import torch
from tiny import IMAGE_TOKENS, model_for, tiny_processor
from transformers.processing_utils import ProcessorMixin

from samf import SamfProcessor
from samf.data.collator import SamfCollator
from samf.data.prompts import record_prompt
from samf.data.schema import IGNORE_INDEX, VolumeLike

PROMPT = "Which finding is present?"


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 400, (12, 14, 16)).astype(np.int16)


def conversation(*, with_volume: bool = True, answer: str | None = None) -> list[dict]:
    content = [{"type": "volume", "volume": volume()}] if with_volume else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": PROMPT}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(processor: SamfProcessor, conversations: list, **options) -> dict:
    options = {"add_generation_prompt": True, "processor_kwargs": {"padding": True}, "return_tensors": "pt"} | options
    return processor.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)


@pytest.mark.parametrize("num_image_tokens", [IMAGE_TOKENS, None])
def test_the_placeholder_becomes_as_many_tokens_as_the_model_reads(num_image_tokens):
    processor = tiny_processor(num_image_tokens)
    inputs = encode(processor, conversation())
    count = (inputs["input_ids"] == processor.image_token_id).sum().item()
    assert count == (num_image_tokens or inputs["slice_mask"].sum().item())
    assert model_for(processor).generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_the_phi3_format():
    processor = tiny_processor()
    text = processor.apply_chat_template(conversation(answer="emphysema"))
    assert text == f"<|user|>\n<image>\n{PROMPT}<|end|>\n<|assistant|>\nemphysema<|end|>\n"
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert (
        processor.apply_chat_template(plain, add_generation_prompt=True)
        == "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n"
    )


def test_prompt_mask_covers_the_prompt_and_never_the_answer():
    processor = tiny_processor()
    inputs = encode(
        processor,
        [conversation(answer="emphysema"), conversation(with_volume=False, answer="cardiomegaly")],
        add_generation_prompt=False,
    )
    for ids, mask in zip(inputs["input_ids"], inputs["prompt_mask"], strict=True):
        text = processor.tokenizer.decode(ids[mask])
        assert text.endswith(f"{PROMPT}<|end|>\n<|assistant|>\n")
        assert "<image>" not in text and "<|endoftext|>" not in text
    assert inputs["slice_mask"].tolist() == [[True] * 6, [False] * 6]


ASK = conversation()[0]
ALONE = f"<|user|>\n\n{PROMPT}<|end|>\n<|assistant|>\n"  # of the fusion's text, without the placeholders


def fused(processor: SamfProcessor, chat: list, **options) -> str:
    """The text that the fusion reads."""
    inputs = encode(processor, chat, **options)
    return processor.tokenizer.decode(inputs["input_ids"][0][inputs["prompt_mask"][0]])


def said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_the_fusion_reads_the_turns_of_user_and_system_up_to_the_first_answer_behind_the_volume():
    processor = tiny_processor()
    system = {"role": "system", "content": "Be brief."}
    head = "<|system|>\nBe brief.<|end|>\n"
    first = [system, ASK]
    late = [system, said("user", "Hello"), said("assistant", "Send the CT."), ASK]
    before = f"{head}<|user|>\nHello<|end|>\n<|assistant|>\n"
    for chat, expected in ((first, head + ALONE), (late, f"{before}\n{ALONE}")):
        assert fused(processor, chat) == expected
        later = [said("assistant", "emphysema"), said("user", "Sure?")]
        for more in ([later[0]], later, [*later, said("assistant", "Yes.")]):
            assert fused(processor, [*chat, *more], add_generation_prompt=False) == expected


@pytest.mark.parametrize("begun", ["The finding is emphysema", "The finding is ", "\nemphysema", "e"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_continued_answer_is_no_text_of_the_fusion(begun, padding_side):
    """It reads what it reads in training on the whole answer, and the conversation ends where the model goes on."""
    processor = tiny_processor()
    earlier = [said("user", "Hello"), said("assistant", "Send the CT.")]
    chats = [[*earlier, ASK, said("assistant", begun)], [ASK, said("assistant", begun)]]
    options = {"processor_kwargs": {"padding": True, "padding_side": padding_side}, "add_generation_prompt": False}
    inputs = encode(processor, chats, continue_final_message=True, **options)
    training = [chat[:-1] + [said("assistant", begun + " and more")] for chat in chats]
    trained = encode(processor, training, **options)
    for row in range(2):
        masks = [found["prompt_mask"][row][found["attention_mask"][row] == 1] for found in (inputs, trained)]
        assert masks[0].tolist() == masks[1][: len(masks[0])].tolist()
        assert processor.tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True).endswith(begun)
    # Where the answer begins is where the model would begin it, unless its first token takes a line break along.
    if not begun.startswith("\n"):
        assert fused(processor, chats[1], continue_final_message=True, add_generation_prompt=False) == ALONE


def test_the_prompt_mask_has_the_form_of_the_ids():
    for form, kind in (("pt", torch.Tensor), ("np", np.ndarray)):
        inputs = encode(tiny_processor(), [conversation()], return_tensors=form)
        assert type(inputs["prompt_mask"]) is type(inputs["input_ids"]) is kind
        assert inputs["prompt_mask"].shape == inputs["input_ids"].shape


def test_without_an_answer_a_template_needs_no_marks_for_the_prompt_mask():
    processor = tiny_processor()
    plain = processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert fused(processor, conversation(), chat_template=plain) == ALONE


def test_a_template_without_generation_marks_gives_no_prompt_mask():
    processor = tiny_processor()
    block = "{{ block['text'] if block['type'] == 'text' else '<image>' }}"
    template = f"{{% for m in messages %}}{{% for block in m['content'] %}}{block}{{% endfor %}}{{% endfor %}}"
    assert "prompt_mask" not in encode(
        processor, conversation(answer="emphysema"), chat_template=template, add_generation_prompt=False
    )


def test_paths_arrays_volumes_and_extracted_stacks_are_one_input(tmp_path):
    import nibabel

    from samf import read_ct

    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume(), np.eye(4)), path)
    processor = tiny_processor()
    forms = [str(path), path, read_ct(path), volume(), processor.image_processor.extract(read_ct(path))]
    expected = processor(volumes=volume(), text="<image>", return_tensors="pt")["pixel_values"]
    for form in forms:
        assert torch.equal(processor(volumes=form, text="<image>", return_tensors="pt")["pixel_values"], expected)
        chat = [{"role": "user", "content": [{"type": "volume", "volume": form}, {"type": "text", "text": PROMPT}]}]
        assert torch.equal(encode(processor, chat)["pixel_values"], expected)
    chat = [{"role": "user", "content": [{"type": "volume", "path": str(path)}, {"type": "text", "text": PROMPT}]}]
    assert torch.equal(encode(processor, chat)["pixel_values"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image><image>", "volumes": [volume(), volume()]}, "holds 2 <image> placeholders"),
        ({"text": "no placeholder", "volumes": volume()}, "0 <image> placeholders, but 1 volumes"),
        ({"text": "<image> alone"}, "1 <image> placeholders, but 0 volumes"),
        ({"text": "<image>", "volumes": volume(), "images": volume()}, "two names of one argument"),
        ({}, "at least one input"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(**arguments)


def test_an_image_token_is_never_truncated():
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        tiny_processor()(text="<image> text", volumes=volume(), truncation=True, max_length=2)


def test_a_saved_processor_is_the_same_processor(tmp_path):
    for count in (3, None):
        processor = tiny_processor(count, slab="mip")
        processor.save_pretrained(tmp_path)
        again = SamfProcessor.from_pretrained(tmp_path)
        assert (again.num_image_tokens, again.image_processor.slab) == (count, "mip")
        assert again.chat_template == processor.chat_template
        before, after = encode(processor, conversation()), encode(again, conversation())
        assert set(before) == set(after)
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_phi3s_tokenizer_takes_the_image_token_into_its_spare_row(test_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / "phi3")
    processor = SamfProcessor(tiny_processor().image_processor, tokenizer)
    assert processor.image_token_id == 32011
    inputs = encode(processor, conversation())
    assert (inputs["input_ids"] == 32011).sum() == 256
    assert inputs["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("<|user|>")


def record(number: int, *, volume: str | None = "scan", answer: str = "(b) emphysema", **values) -> dict:
    choices = ["consolidation", "emphysema"]
    return {"id": str(number), "question": PROMPT, "choices": choices, "answer": answer, "volume": volume, **values}


class Store:
    """Every path holds the same slices."""

    def __init__(self, processor: SamfProcessor):
        self.slices = processor.image_processor.extract(volume())

    def get(self, volume: VolumeLike) -> dict:
        return self.slices


def test_collator_puts_the_loss_on_the_answer_and_its_end_token():
    processor = tiny_processor()
    records = [record(0, finding_labels=[1, 0]), record(1, volume=None, answer="emphysema", finding_labels=[])]
    batch = SamfCollator(processor, volume_store=Store(processor))(records)
    answers = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert answers == ["(b) emphysema<|end|>", "emphysema<|end|>"]
    assert not (batch["prompt_mask"] & (batch["labels"] != IGNORE_INDEX)).any()
    assert batch["finding_targets"].tolist() == [[1, 0], [IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["attention_mask"][:, 0].tolist() == [1, 1]  # right padding
    assert f"{PROMPT} (a) consolidation (b) emphysema" in processor.tokenizer.decode(batch["input_ids"][0])
    assert model_for(processor, finding_names=["x", "y"])(**batch).loss.isfinite()


def test_a_long_answer_loses_its_end_but_never_its_end_token():
    processor = tiny_processor()
    whole = SamfCollator(processor)([record(0, volume=None, answer="emphysema " * 20)])
    length = whole["input_ids"].shape[1] - 9
    collator = SamfCollator(processor, max_length=length)
    cut = collator([record(0, volume=None, answer="emphysema " * 20)])
    assert cut["input_ids"].shape[1] == length
    assert collator.truncated == 1
    kept, end = cut["labels"][cut["labels"] != IGNORE_INDEX], processor.tokenizer.convert_tokens_to_ids("<|end|>")
    full = whole["labels"][whole["labels"] != IGNORE_INDEX]
    assert kept[-1] == end
    assert torch.equal(kept[:-1], full[: len(kept) - 1])
    with pytest.raises(ValueError, match="Record '0' is .* can't be cut"):
        SamfCollator(processor, max_length=5)([record(0, volume=None)])


def test_collator_for_generation_pads_left_and_holds_no_answer():
    processor = tiny_processor()
    batch = SamfCollator(processor, generation=True, volume_store=Store(processor))(
        [record(0), record(1, volume=None, answer="nothing of this")]
    )
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert "labels" not in batch and "finding_targets" not in batch
    texts = processor.batch_decode(batch["input_ids"])
    assert all(text.endswith("<|assistant|>\n") for text in texts)


def test_a_record_without_choices_or_question():
    assert record_prompt(record(0) | {"choices": None}) == PROMPT
    assert record_prompt({"question": "", "choices": None}) == "Write the radiology report of this chest CT."
    with pytest.raises(ValueError, match="11 choices"):
        record_prompt({"id": 1, "question": "?", "choices": list("abcdefghijk")})


can_sanitize = pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    reason="this transformers can't sanitize control tokens",
)


@can_sanitize
def test_tokens_that_a_user_wrote_are_text_when_sanitized():
    processor = tiny_processor()
    content = [{"type": "volume", "volume": volume()}, {"type": "text", "text": "Is <image> a token? <|end|>"}]
    inputs = encode(processor, [[{"role": "user", "content": content}]], sanitize_control_tokens=True)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == IMAGE_TOKENS
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|end|>")).sum() == 1
    assert "Is <image> a token? <|end|>" in processor.tokenizer.decode(inputs["input_ids"][0])
    fused = processor.tokenizer.decode(inputs["input_ids"][0][inputs["prompt_mask"][0]])
    assert fused == "<|user|>\n\nIs <image> a token? <|end|><|end|>\n<|assistant|>\n"
    late = [said("user", "<|end|>"), said("assistant", "<image> first"), {"role": "user", "content": content}]
    chats = [[*late, said("assistant", "Yes. <|end|>")], [{"role": "user", "content": content}]]
    inputs = encode(processor, chats, sanitize_control_tokens=True, add_generation_prompt=False)
    texts = [
        processor.tokenizer.decode(ids[mask])
        for ids, mask in zip(inputs["input_ids"], inputs["prompt_mask"], strict=True)
    ]
    before = "<|user|>\n<|end|><|end|>\n<|assistant|>\n\n"
    assert texts == [before + fused, fused.removesuffix("<|assistant|>\n")]


def test_saving_changes_nothing_and_loading_loses_nothing(tmp_path):
    processor = tiny_processor()
    processor.image_processor.note = "not a setting"
    processor.save_pretrained(tmp_path)
    again = SamfProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert again.to_dict()["auto_map"] == {"AutoProcessor": "processing_samf.SamfProcessor"}
    assert tiny_processor().to_dict()["auto_map"] == again.to_dict()["auto_map"]


def chat_of(*blocks, role: str = "user") -> list:
    return [{"role": role, "content": list(blocks)}]


class Message:
    """As the messages of OpenAI's client."""

    def __init__(self, **values):
        self.values = values

    def model_dump(self) -> dict:
        return self.values


def test_blocks_of_other_apis_are_read(tmp_path):
    import nibabel

    path = str(tmp_path / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume(), np.eye(4)), path)
    processor = tiny_processor()
    text = {"type": "text", "text": PROMPT}
    expected = encode(processor, chat_of({"type": "volume", "path": path}, text))
    nothing = dict.fromkeys(("volume", "image", "url", "text", "path"))  # as a data set's rows have it
    for chat in [
        chat_of({"type": "image", "url": path}, text),
        chat_of({"type": "image_url", "image_url": {"url": path, "detail": "high"}}, text),
        chat_of({"type": "input_image", "image_url": path, "detail": "auto"}, {"type": "input_text", "text": PROMPT}),
        chat_of({**nothing, "type": "volume", "path": path}, {**nothing, **text}),
        chat_of({"type": "volume", "volume": [path]}, text),
        [Message(role="user", content=[{"type": "volume", "path": path}, text], tool_calls=None)],
        [chat_of({"type": "volume", "path": path}, text)],
    ]:
        inputs = encode(processor, chat)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_a_template_may_write_where_a_volume_lies(tmp_path):
    """As with the library's processors, under the key that the block has; what isn't a file shows its type alone."""
    processor = tiny_processor()
    template = (
        "{% for m in messages %}{{ m.role }}:{% for b in m.content %} "
        "{{ b.type }}={{ b.url or b.path or b.image or b.text }}{% endfor %}{% endfor %}"
    )
    text = {"type": "text", "text": PROMPT}
    address = "https://example.com/scan.nii.gz"
    for block, shown in [
        ({"type": "image_url", "image_url": {"url": address}}, address),
        ({"type": "input_image", "image_url": address}, address),
        ({"type": "image", "url": address}, address),
        ({"type": "volume", "path": tmp_path}, str(tmp_path)),
        ({"type": "volume", "volume": "scan.nii.gz"}, "scan.nii.gz"),
        ({"type": "volume", "volume": volume()}, "<ndarray>"),
    ]:
        written = processor.apply_chat_template(chat_of(block, text), chat_template=template)
        assert written == f"user: image={shown} text={PROMPT}"


@can_sanitize
def test_what_a_template_writes_of_a_path_is_no_control_token(tmp_path):
    """A file's name is the user's text, so that sanitizing covers it, and the file is read all the same."""
    import nibabel

    processor = tiny_processor()
    path = tmp_path / "a<|end|>b.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume(), np.eye(4)), path)
    template = (
        "{% for m in messages %}{% for b in m.content %}{{ '<image>' + b.path + '<|end|>' }}{% endfor %}{% endfor %}"
    )
    inputs = encode(
        processor, chat_of({"type": "volume", "path": path}), chat_template=template, sanitize_control_tokens=True
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert (inputs["input_ids"] == end).sum() == 1
    assert inputs["slice_mask"].any()


def test_the_files_of_one_series_are_one_volume(tmp_path):
    from dicom_series import write_series

    files = sorted(map(str, write_series(tmp_path).iterdir()))
    chat = chat_of({"type": "volume", "volume": files}, {"type": "text", "text": PROMPT})
    inputs, folder = (
        encode(tiny_processor(), chat),
        encode(tiny_processor(), chat_of({"type": "volume", "path": tmp_path})),
    )
    assert len(files) > 1 and torch.equal(inputs["pixel_values"], folder["pixel_values"])


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([{"type": "ct", "path": "x"}], "message 0, block 0 is of type 'ct'.*input_image.*input_text"),
        ([{"type": "video", "video": "x"}], "'video'"),
        ([{"text": "What?"}], r"block 0 has no type \(keys \['text'\]\)"),
        (["What?"], "block 0 is a str"),
        ([[{"type": "text", "text": "What?"}]], "block 0 is a list"),
        ([{"type": "text", "text": None}], "as its text None"),
        ([{"type": "text", "text": ["What?"]}], "as its text list"),
        ([{"type": "text", "text": "What?", "path": "x"}], "a volume under 'path'"),
        ([{"type": "volume", "path": "x", "text": "What?"}], "'path', 'text'"),
        ([{"type": "volume", "path": "x", "volume": volume()}], "'volume', 'path'"),
        ([{"type": "volume", "file": "x"}], "'file'"),
        ([{"type": "input_image", "file_id": "x"}], "'file_id'"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "data: URL"),
        ([{"type": "volume", "volume": [volume(), volume()]}], "a list of 2 volumes"),
        ([{"type": "volume", "volume": []}], "a list of 0 volumes"),
        ([{"type": "volume", "volume": volume()}] * 2, "2 <image> placeholders"),
    ],
)
def test_blocks_that_no_template_renders_are_errors(blocks, words):
    with pytest.raises(ValueError, match=words):
        encode(tiny_processor(), chat_of(*blocks))


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "user", "content": None}], "message 0 .user. has no content"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": {"type": "text", "text": "What?"}}], "a dict as content"),
        ([{"content": "What?"}], "role None"),
        ([{"role": "user", "content": "Q"}, {"role": "tool", "content": "T"}], "role tool; expected system, user"),
        ([{"role": "User", "content": "Q"}], "role User"),
        (chat_of({"type": "volume", "volume": volume()}, role="assistant"), "the assistant's and holds a volume"),
        ([], "conversation is empty"),
        ([conversation(), [{"role": "user"}]], "Conversation 1: message 0"),
    ],
)
def test_messages_that_no_template_renders_are_errors(chat, words):
    with pytest.raises(ValueError, match=words):
        encode(tiny_processor(), chat)


def test_what_a_template_leaves_out_is_an_error():
    """Whatever the template: a role that it passes over, tools and documents that it doesn't render."""
    processor = tiny_processor()
    users = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}{{ tools if x else '' }}"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    with pytest.raises(ValueError, match="Message 0 has the role 'system'"):
        processor.apply_chat_template(chat, chat_template=users)
    texts = "{% for m in messages %}{{ 'U: ' + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="can't render this conversation"):
        encode(processor, conversation(), chat_template=texts)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for template in (None, users):
        with pytest.raises(ValueError, match="doesn't render tools"):
            processor.apply_chat_template(chat[1:], chat_template=template, tools=[tool])
    with pytest.raises(ValueError, match="doesn't render documents"):
        processor.apply_chat_template(chat, documents=[{"title": "a", "text": "b"}])
    assert "'f'" in processor.apply_chat_template(chat[1:], chat_template=users, tools=[tool], x=True)


def test_a_volume_never_goes_to_another_conversations_placeholder():
    """One placeholder and one volume in all, but not in one conversation."""
    template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][1]['text'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"\[0, 1\] placeholders, \[1, 0\] volumes"):
        encode(tiny_processor(), [conversation(), [{"role": "user", "content": "<image>"}]], chat_template=template)


def test_no_prompts_are_an_error():
    with pytest.raises(ValueError, match="empty list"):
        tiny_processor()(text=[])


def test_what_it_does_not_read_is_no_argument_and_an_error():
    processor = tiny_processor()
    assert not {"videos", "audio"} & set(inspect.signature(processor.__call__).parameters)
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match="has no videos or audio"):
            processor(text="<image>", volumes=volume(), **{name: volume()})


def test_a_mixed_batch_gives_each_prompt_its_own_volume():
    """Also where the first prompt has none: rows stay with their prompts, as pixels and as embeddings."""
    processor = tiny_processor()
    texts = ["none", "<image> one", "none", "<image> two"]
    for kind in (volume, embeddings):
        alone = [processor(volumes=kind(seed), text="<image>", return_tensors="pt") for seed in (1, 2)]
        together = processor(volumes=[kind(1), kind(2)], text=texts, padding=True, return_tensors="pt")
        assert together["slice_mask"].any(dim=1).tolist() == [False, True, False, True]
        for name in set(alone[0]) - {"input_ids", "attention_mask"}:
            empty, first, other, second = together[name]
            assert not empty.any() and not other.any(), name
            for found, single in zip((first, second), alone, strict=True):
                length = single[name].shape[1]
                assert torch.equal(found[:length], single[name][0]), name
                assert not found[length:].any(), name
        assert (together["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [0, IMAGE_TOKENS] * 2


def embeddings(slices: int) -> dict:
    """A cached record of so many slices."""
    rng = np.random.default_rng(slices)
    return {
        "slice_embeddings": rng.normal(size=(slices, 4)).astype(np.float32),
        "slice_planes": rng.integers(1, 3, slices),
        "slice_positions": rng.uniform(0.1, 1, slices).astype(np.float32),
    }


def test_padding_of_cached_embeddings_is_no_slice():
    """Neither in the mask nor, with a token a slice, in the prompt."""
    processor = tiny_processor(None)
    inputs = processor(volumes=[embeddings(2), embeddings(5)], text=["<image>"] * 2, padding=True, return_tensors="pt")
    assert inputs["slice_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [2, 5]
    assert inputs["slice_embeddings"].shape == (2, 5, 4) and not inputs["slice_embeddings"][0, 2:].any()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("answer", [None, "emphysema"])
def test_padding_is_no_text_of_the_fusion(answer, padding_side):
    processor = tiny_processor()
    chats = [conversation(answer=answer), [said("system", "Be brief."), *conversation(answer=answer)]]
    options = {"processor_kwargs": {"padding": True, "padding_side": padding_side}, "add_generation_prompt": not answer}
    inputs = encode(processor, chats, **options)
    attended = inputs["attention_mask"].bool()
    assert not attended[0].all() and attended[1].all()
    assert not (inputs["prompt_mask"] & ~attended).any()
    alone = encode(processor, chats[0], **options)
    assert torch.equal(inputs["prompt_mask"][0][attended[0]], alone["prompt_mask"][0])


def test_a_continued_answer_that_cannot_be_found_again_gives_no_prompt_mask():
    """This template writes the last message's length in front: cut off within it, the text is no part of the whole one."""
    processor = tiny_processor()
    template = "{{ messages[-1]['content'][-1]['text'] | length }}" + processor.chat_template
    chat = conversation(answer="emphysema")
    options = {"chat_template": template, "add_generation_prompt": False}
    assert fused(processor, chat, **options) == f"9{ALONE}"
    assert "prompt_mask" not in encode(processor, chat, continue_final_message=True, **options)
