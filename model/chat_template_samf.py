"""Chat templates: Phi-3's format with volumes, and a tokenizer's own template made to take volumes and mark answers.

A template that SAMF can use renders content blocks of type "text", "volume" and "image", writes `<image>` for a volume,
and marks what the assistant says, end token included, with `{% generation %}`: training puts its loss on the marked
part, and the model's fusion reads what is not marked.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

try:  # transformers itself needs it for any chat template
    from jinja2 import TemplateError
except ImportError:
    TemplateError = ValueError

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Phi-3's format, walking content lists; the marked part is what training puts its loss on, `<|end|>` included.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{ raise_exception('role ' ~ message['role'] ~ '; expected system, user or assistant') }}
{%- endif -%}
{{ '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{{ '<|end|>' }}
{%- endgeneration -%}
{{ '\n' }}
{%- else -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] in ('volume', 'image') -%}{{ '<image>\n' }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- else -%}{{ raise_exception('content block of type ' ~ block['type'] ~ '; expected text, volume or image') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""

# `samf.messages`: the messages with content lists joined to strings, as language models' templates expect them.
_JOIN_BLOCKS = """\
{%- set samf = namespace(messages=[], printed=0) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is undefined or message['content'] is none -%}
{%- set samf.messages = samf.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for block in message['content'] -%}
{%- if block['type'] in ('volume', 'image') -%}{%- set joined.text = joined.text ~ '<image>\\n' -%}
{%- elif block['type'] == 'text' -%}{%- set joined.text = joined.text ~ block['text'] -%}
{%- else -%}{{ raise_exception('content block of type ' ~ block['type'] ~ '; expected text, volume or image') }}
{%- endif -%}
{%- endfor -%}
{%- set samf.messages = samf.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
"""
# What the tokenizer's own template (the macro `samf_own`) renders, with each answer marked from the end of the prompt
# before it to the first end token behind its text.
_MARK_ANSWERS = """\
{%- set samf_whole = samf_own(samf.messages, add_generation_prompt) ~ (samf_header if add_generation_prompt else '') -%}
{%- for message in samf.messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set before = samf_own(samf.messages[:loop.index0], true) -%}
{%- if samf_whole[:before|length] != before -%}
{{ raise_exception('the text before message ' ~ loop.index0 ~ ' depends on later messages: answers cannot be marked') }}
{%- endif -%}
{%- if samf_whole[before|length:].startswith(samf_header) -%}{%- set before = before ~ samf_header -%}{%- endif -%}
{%- set rest = samf_whole[before|length:] -%}
{%- set text = (message['content'] or '') | trim -%}
{%- set said = (rest.split(text)[0] ~ text) | length if text and text in rest else 0 -%}
{%- set marked = rest -%}
{%- if samf_end in rest[said:] -%}
{%- set marked = rest[:said] ~ rest[said:].split(samf_end)[0] ~ samf_end -%}
{%- endif -%}
{{- samf_whole[samf.printed:before|length] -}}
{%- generation -%}{{- marked -}}{%- endgeneration -%}
{%- set samf.printed = before|length + marked|length -%}
{%- endif -%}
{%- endfor -%}
{{- samf_whole[samf.printed:] -}}
"""

_QUESTIONS, _ANSWERS = ("Question one", "Question two"), ("Answer one", "Answer two")
_PROBE = [
    {"role": role, "content": text}
    for pair in zip(_QUESTIONS, _ANSWERS, strict=True)
    for role, text in zip(("user", "assistant"), pair, strict=True)
]
_REMEDY = (
    "Pass chat_template: a template that writes <image> for content blocks of type 'image' and has {% generation %} around "
    "the assistant's content and its end token."
)


def choose_chat_template(tokenizer: Any) -> str:
    """Return the template for a tokenizer: Phi-3's format where it has that, else its own, adapted.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: it has neither Phi-3's control tokens nor a chat template that can be adapted.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    missing = missing_phi3_tokens(tokenizer)
    if not missing and (own is None or _is_phi3_format(tokenizer, own)):
        return CHAT_TEMPLATE
    if own is None:
        raise ValueError(
            "The tokenizer has no chat template, and Phi-3's format isn't for it: its vocabulary lacks "
            f"{', '.join(missing)}, which it would read as plain text. {_REMEDY}"
        )
    try:
        return adapt_chat_template(tokenizer, own)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(f"The tokenizer's chat template can't be used with volumes: {error}. {_REMEDY}") from error


def missing_phi3_tokens(tokenizer: Any) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return [token for token in PHI3_TOKENS if token not in vocabulary]


def adapt_chat_template(tokenizer: Any, own: str) -> str:
    """Return a tokenizer's own template with volumes and with answer marks, checked on conversations.

    Content lists are joined to strings, `<image>` and a line break for a volume, and given to the template as it is. If
    it has no `{% generation %}`, the marks are added around it. What such a template puts between its generation prompt
    and an answer joins the generation prompt: all of the header where it ignores `add_generation_prompt`.

    Args:
        tokenizer: gives the special tokens that the template names, and tells which token ends an answer.
        own: the template of the language model, for contents that are strings.

    Raises:
        ValueError: the template can't be adapted; says what it renders.
    """
    end = _end_token(tokenizer, own)
    header = _missing_header(tokenizer, own)
    if has_generation_marks(own):
        adapted = f"{_JOIN_BLOCKS}{{%- set messages = samf.messages %}}\n{own}"
    else:
        constants = f"{{%- set samf_header = {_quoted(header)} -%}}{{%- set samf_end = {_quoted(end)} -%}}\n"
        # A line break behind the block tag is left out, as is the last one of a template.
        macro = f"{{% macro samf_own(messages, add_generation_prompt) %}}\n{own.removesuffix(chr(10))}{{% endmacro %}}"
        adapted = f"{macro}\n{_JOIN_BLOCKS}{constants}{_MARK_ANSWERS}"
    _check_adapted(tokenizer, own, adapted, header, end)
    return adapted


def has_generation_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def render(
    tokenizer: Any, template: str, conversation: Sequence[dict[str, Any]], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text, and the (start, end) of each marked answer in it.

    Raises:
        ValueError: the template can't render it, as those of text alone can't content lists; or it raises an exception
            itself, as many do for roles that they don't know.
    """
    marked = has_generation_marks(template)
    try:
        texts, spans = render_jinja_template(
            conversations=[list(conversation)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **{**tokenizer.special_tokens_map, **options},
        )
    except (TemplateError, TypeError) as error:  # such as a list that shall be joined to a string
        raise ValueError(f"The chat template can't render this conversation: {error}") from error
    return texts[0], [tuple(span) for span in spans[0]] if marked else []


def _is_phi3_format(tokenizer: Any, own: str) -> bool:
    """Whether a template writes what CHAT_TEMPLATE writes, a leading bos token aside."""
    try:
        text = render(tokenizer, own, _PROBE[:3], add_generation_prompt=True)[0]
    except (ValueError, TypeError):
        return False
    return (
        text.removeprefix(tokenizer.bos_token or "")
        == render(tokenizer, CHAT_TEMPLATE, _PROBE[:3], add_generation_prompt=True)[0]
    )


def _end_token(tokenizer: Any, own: str) -> str:
    """The control token that the template puts behind each answer."""
    text = render(tokenizer, own, _PROBE)[0]
    first, last = (text.partition(answer)[2] for answer in _ANSWERS)
    # Some tokenizers have line breaks among their added tokens.
    control = {id: token for id, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    ids = tokenizer(last, add_special_tokens=False)["input_ids"]
    end = next((control[token].content for token in ids if token in control), None)
    if end is None or end not in first.partition(_QUESTIONS[1])[0]:
        raise ValueError(
            f"it ends an answer with {last!r} (and one before the last with {first.partition(_QUESTIONS[1])[0]!r}), in "
            "which no control token of the tokenizer ends both: a model couldn't learn from it where to stop"
        )
    return end


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Jinja's literals know JSON's escapes, but no surrogates


def _missing_header(tokenizer: Any, own: str) -> str:
    """What the template puts between its generation prompt and an answer, such as the header of its turn or an empty thought.

    A blank at its end is left to the answer, with whose first word it makes one token.
    """
    asked = render(tokenizer, own, _PROBE[:1], add_generation_prompt=True)[0]
    answered = render(tokenizer, own, _PROBE[:2])[0]
    header = answered.removeprefix(asked).partition(_ANSWERS[0])[0] if answered.startswith(asked) else ""
    return header.rstrip(" ") if header.strip() else ""


def _check_adapted(tokenizer: Any, own: str, adapted: str, header: str, end: str) -> None:
    """Whether `adapted` writes what the tokenizer's own template writes, and marks the answers with their end."""
    seen = [{"type": "image"}, {"type": "text", "text": _QUESTIONS[0]}]
    with_volume = [{"role": "user", "content": seen}, *_PROBE[1:]]
    as_text = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{_QUESTIONS[0]}"}, *_PROBE[1:]]
    for turns, prompt in ((4, False), (2, False), (1, True), (3, True)):
        expected = render(tokenizer, own, as_text[:turns], add_generation_prompt=prompt)[0] + header * prompt
        text, spans = render(tokenizer, adapted, with_volume[:turns], add_generation_prompt=prompt)
        marked = [text[start:stop].strip() for start, stop in spans]
        answers = _ANSWERS[: turns // 2]
        if text != expected or f"{IMAGE_TOKEN}\n{_QUESTIONS[0]}" not in text:
            raise ValueError(
                f"a question about a volume becomes {text!r}, where the template itself writes {expected!r}"
            )
        if len(marked) != len(answers) or not all(
            answer in found and found.endswith(end) for answer, found in zip(answers, marked, strict=True)
        ):
            raise ValueError(
                f"of {text!r} it marks {marked} as answers; expected {list(answers)}, each up to its {end}"
            )
