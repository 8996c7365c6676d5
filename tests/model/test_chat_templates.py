"""Other models' chat templates: adapted to volumes, answers marked up to a token at which generation stops."""

import numpy as np
import pytest
import torch
from tiny import TEXTS, tiny_config, tiny_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from samf import SamfForConditionalGeneration, SamfImageProcessor, SamfProcessor
from samf.data.collator import SamfCollator
from samf.data.schema import IGNORE_INDEX
from samf.model.chat_template_samf import CHAT_TEMPLATE, render
from samf.training.factory import agree_on_stop_tokens

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are "
    "a helpful AI assistant.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content "
    "+ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: an empty thought before the last answer alone.
THINKING = """\
{%- set ns = namespace(last=messages|length) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set "
    "content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    + ALTERNATE
    + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
CHATML_PROMPT = "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n"
# Name: template, control tokens, the end and the first token of texts, then what a question about a volume becomes as a
# prompt, and what is learned as its answer.
FAMILIES = {
    "SmolLM": (SMOLLM, CHATML, "<|im_end|>", None, SYSTEM + CHATML_PROMPT, "{0}<|im_end|>"),
    "ChatML without a generation prompt": (NO_PROMPT, CHATML, "<|im_end|>", None, CHATML_PROMPT, "{0}<|im_end|>"),
    "ChatML with marks": (MARKED, CHATML, "<|im_end|>", None, CHATML_PROMPT, "{0}<|im_end|>"),
    "Qwen base model": (SMOLLM, CHATML, "<|endoftext|>", None, SYSTEM + CHATML_PROMPT, "{0}<|im_end|>"),
    "Qwen3": (THINKING, CHATML, "<|im_end|>", None, CHATML_PROMPT + "<think>\n\n</think>\n\n", "{0}<|im_end|>"),
    "Llama 3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{0}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{0}<|eot_id|>",
    ),
    "Gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "<bos>",
        "<bos><start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n",
        "{0}<end_of_turn>",
    ),
    "Mistral": (MISTRAL, ["<s>", "</s>", "[INST]"], "</s>", "<s>", "<s>[INST] {0} [/INST]", " {0}</s>"),
    "Phi-4-mini": (PHI4, PHI, "<|endoftext|>", None, "<|user|>{0}<|end|><|assistant|>", "{0}<|end|>"),
    "Phi-3": (PHI3, PHI, "<|endoftext|>", None, "<|user|>\n{0}<|end|>\n<|assistant|>\n", "{0}<|end|>"),
}
VOLUME = np.zeros((12, 14, 16), np.int16)
TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def make_tokenizer(template, special, eos, bos=None, texts=TEXTS):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def make_processor(template, special, eos, bos=None, **options):
    image_processor = SamfImageProcessor(slices_per_plane=2, size=32)
    return SamfProcessor(image_processor, make_tokenizer(template, special, eos, bos), num_image_tokens=4, **options)


def turn(role, text, *, volume=False):
    blocks = [{"type": "volume", "volume": VOLUME}] if volume else []
    return {"role": role, "content": [*blocks, {"type": "text", "text": text}]}


@pytest.fixture(params=FAMILIES)
def family(request):
    template, special, eos, bos, prompt, answer = FAMILIES[request.param]
    return make_processor(template, special, eos, bos), template, prompt, answer


def test_prompt_and_answer_are_the_models_own(family):
    """What generation is given is what training puts before the answer, and what is learned ends in a control token."""
    processor, template, prompt, answer = family
    asked = [turn("user", "Heart?", volume=True)]
    given = processor.apply_chat_template(asked, add_generation_prompt=True, **TENSORS)
    whole = processor.apply_chat_template(
        [*asked, turn("assistant", "Normal.")], return_assistant_tokens_mask=True, **TENSORS
    )
    decode = processor.tokenizer.decode
    question = "<image>" * 4 + "\nHeart?"
    assert decode(given["input_ids"][0]) == prompt.format(question)
    assert torch.equal(whole["input_ids"][0, : given["input_ids"].shape[1]], given["input_ids"][0])
    learned = whole["input_ids"][0][whole["assistant_masks"][0] == 1]
    assert decode(learned) == answer.format("Normal.")
    assert learned[-1] == processor.answer_end()
    for inputs in (given, whole):
        assert decode(inputs["input_ids"][0][inputs["prompt_mask"][0]]) == prompt.format("\nHeart?")
    if template is not NO_PROMPT and template is not THINKING:  # which have no such prompt of their own
        own, _ = render(processor.tokenizer, template, [{"role": "user", "content": "Q"}], add_generation_prompt=True)
        assert processor.apply_chat_template([turn("user", "Q")], add_generation_prompt=True) == own


def test_several_turns_are_the_models_own_and_each_answer_is_marked(family):
    processor, template, _, answer = family
    turns = [
        ("user", "Hi"),
        ("assistant", "Send the CT."),
        ("user", "Heart?"),
        ("assistant", "Normal."),
        ("user", "Sure?"),
    ]
    own, _ = render(processor.tokenizer, template, [{"role": role, "content": text} for role, text in turns])
    chat = [turn(role, text, volume=text == "Heart?") for role, text in turns]
    own = own.removesuffix("<|endoftext|>") if template is PHI3 else own
    assert processor.apply_chat_template(chat).replace("<image>\n", "") == own
    inputs = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **TENSORS)
    ids, decode = inputs["input_ids"][0], processor.tokenizer.decode
    assert decode(ids[inputs["assistant_masks"][0] == 1]) == answer.format("Send the CT.") + answer.format("Normal.")
    fused = decode(ids[inputs["prompt_mask"][0]])
    assert "Hi" in fused and "Heart?" in fused
    assert not any(word in fused for word in ("Send", "Normal", "Sure"))


def test_a_saved_template_is_the_same_template(family, tmp_path):
    processor, template, *_ = family
    processor.save_pretrained(tmp_path)
    again = SamfProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    assert (again.chat_template == CHAT_TEMPLATE) == (template is PHI3)
    renewed = SamfProcessor(
        again.image_processor, again.tokenizer, num_image_tokens=4
    )  # of a tokenizer that was adapted
    chat = [turn("user", "Heart?", volume=True), turn("assistant", "Normal.")]
    assert renewed.apply_chat_template(chat) == processor.apply_chat_template(chat)


def test_training_labels_end_where_generation_stops(family):
    processor, *_, answer = family
    record = {"id": "0", "question": "Heart?", "choices": None, "answer": "Normal.", "volume": None}
    batch = SamfCollator(processor)([record, {**record, "answer": "Normal. " * 9}])
    labels = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == answer.format("Normal.")
    model = SamfForConditionalGeneration(tiny_config())
    model.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    agree_on_stop_tokens(model, processor)
    stops = model.generation_config.eos_token_id
    assert labels[-1] in (stops if isinstance(stops, list) else [stops])


def test_a_token_across_the_answers_beginning_is_the_answers():
    """Continued or whole, the prompt's text ends before a token of which a part is the answer's."""
    tokenizer = make_tokenizer(PHI3, PHI, "<|endoftext|>", texts=["\n\n\nNormal."] * 9)
    processor = SamfProcessor(SamfImageProcessor(slices_per_plane=2, size=32), tokenizer, num_image_tokens=4)
    chats = [[turn("user", "Heart?", volume=True), turn("assistant", text)] for text in ("\n\nNormal", "\n\nNormal.")]
    continued = processor.apply_chat_template(chats[0], continue_final_message=True, **TENSORS)
    trained = processor.apply_chat_template(chats[1], **TENSORS)
    fused = [inputs["input_ids"][0][inputs["prompt_mask"][0]] for inputs in (continued, trained)]
    assert torch.equal(*fused)
    assert tokenizer.decode(fused[0]) == "<|user|>\n\nHeart?<|end|>\n<|assistant|>"  # the line break went along


def test_real_phi3(test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / "phi3")
    processor = SamfProcessor(tiny_processor().image_processor, tokenizer)
    assert processor.chat_template == CHAT_TEMPLATE and processor.answer_end() == 32007
    model = SamfForConditionalGeneration(tiny_config())
    model.generation_config = GenerationConfig(eos_token_id=[32000, 32001, 32007])  # as published
    agree_on_stop_tokens(model, processor)
    assert model.generation_config.eos_token_id == [32000, 32001, 32007]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template.*lacks <|system|>, <|user|>"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no control token"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}", "can't be used with volumes"),
        ("{{ messages|length }}" + NO_PROMPT, "depends on later messages"),
        ("{% for m in messages %}{{ m['content'] | lower }}<|im_end|>{% endfor %}", "can't be used with volumes"),
        ("{% for m in messages %", "can't be used with volumes"),
        (
            MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{ '<|im_end|>' }}"),
            "marks.*up to its",
        ),
    ],
)
def test_a_tokenizer_whose_template_cannot_be_adapted_is_refused(template, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|") + ".*Pass chat_template"):
        make_processor(template, CHATML, "<|im_end|>")
    given = make_processor(template, CHATML, "<|im_end|>", chat_template=MARKED)
    assert given.chat_template == MARKED


def test_a_template_that_teaches_no_end_is_refused_for_training():
    model = SamfForConditionalGeneration(tiny_config())
    unmarked = make_processor(None, CHATML, "<|im_end|>", chat_template=NO_PROMPT)
    with pytest.raises(ValueError, match="marks no answers"):
        agree_on_stop_tokens(model, unmarked)
    phi3 = make_processor(None, CHATML, "<|im_end|>", chat_template=CHAT_TEMPLATE)  # `<|end|>` is seven tokens here
    with pytest.raises(ValueError, match="plain text"):
        agree_on_stop_tokens(model, phi3)
