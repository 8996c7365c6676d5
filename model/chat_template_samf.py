"""Chat templates: Phi-3's format with volumes, and adaptation of a tokenizer's own template.

A template that SAMF can use renders content blocks of type "text", "volume" and "image", writes `<image>` for a volume,
and marks the assistant's answers, end token included, with `{% generation %}`: the training loss covers the marked part,
and the model's fusion reads the unmarked part.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from .conversation_samf import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

try:  # transformers needs it for every chat template
    from jinja2 import TemplateError
except ImportError:
    TemplateError = ValueError  # type: ignore[assignment,misc]

IMAGE_TOKEN = "<image>"
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Phi-3's format with content lists. The marked part, `<|end|>` included, is what the training loss covers.
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

# `samf.messages`: the messages with content lists joined to strings, which language models' templates expect.
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
# The output of the tokenizer's own template (the macro `samf_own`), with each answer marked from the end of the prompt
# before it to the first end token after its text.
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
_PROBE: list[Message] = [
    {"role": role, "content": text}
    for pair in zip(_QUESTIONS, _ANSWERS, strict=True)
    for role, text in zip(("user", "assistant"), pair, strict=True)
]
_REMEDY = (
    "Pass chat_template: a template that writes <image> for content blocks of type 'image' and has {% generation %} around "
    "the assistant's content and its end token."
)


def choose_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template for a tokenizer: Phi-3's format if it is the tokenizer's, else its own, adapted.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: the tokenizer has neither Phi-3's control tokens nor a chat template that can be adapted.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    missing = missing_phi3_tokens(tokenizer)
    if not missing and (own is None or _is_phi3_format(tokenizer, own)):
        return CHAT_TEMPLATE
    if own is None:
        raise ValueError(
            "The tokenizer has no chat template, and Phi-3's format doesn't fit it: its vocabulary lacks "
            f"{', '.join(missing)}, which it would read as plain text. {_REMEDY}"
        )
    try:
        return adapt_chat_template(tokenizer, own)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(f"The tokenizer's chat template can't be used with volumes: {error}. {_REMEDY}") from error


def missing_phi3_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the control tokens of Phi-3's format that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in PHI3_TOKENS if token not in vocabulary]


def adapt_chat_template(tokenizer: "PreTrainedTokenizerBase", own: str) -> str:
    """Return a tokenizer's own template extended by volumes and answer marks, after checking it on conversations.

    Content lists are joined to strings, with `<image>` and a line break for a volume, and passed to the template, which is
    not changed. If it has no `{% generation %}`, the marks are added around it. Text that such a template puts between its
    generation prompt and an answer becomes part of the generation prompt; that is the whole header of an answer if the
    template ignores `add_generation_prompt`.

    Args:
        tokenizer: provides the special tokens that the template names and the control token that ends an answer.
        own: the template of the language model, for contents that are strings.

    Raises:
        ValueError: the template can't be adapted; the message says what it renders.
    """
    end = _end_token(tokenizer, own)
    header = _missing_header(tokenizer, own)
    if has_generation_marks(own):
        adapted = f"{_JOIN_BLOCKS}{{%- set messages = samf.messages %}}\n{own}"
    else:
        constants = f"{{%- set samf_header = {_quoted(header)} -%}}{{%- set samf_end = {_quoted(end)} -%}}\n"
        # Jinja drops a line break after a block tag, and the last one of a template.
        macro = f"{{% macro samf_own(messages, add_generation_prompt) %}}\n{own.removesuffix(chr(10))}{{% endmacro %}}"
        adapted = f"{macro}\n{_JOIN_BLOCKS}{constants}{_MARK_ANSWERS}"
    _check_adapted(tokenizer, own, adapted, header, end)
    return adapted


def has_generation_marks(template: str) -> bool:
    """Return whether a template marks answers with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def render(
    tokenizer: "PreTrainedTokenizerBase", template: str, conversation: Sequence[Message], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text and the (start, end) of each marked answer in it.

    Args:
        tokenizer: provides the special tokens that the template names.
        template: the Jinja chat template.
        conversation: the messages.
        options: further variables of the template, such as `add_generation_prompt` and `tools`.

    Raises:
        ValueError: the template can't render the conversation, as text-only templates can't content lists, or raises an
            exception itself, as many do for unknown roles.
    """
    marked = has_generation_marks(template)
    messages: Any = list(conversation)  # transformers annotates messages as dict[str, str]
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **{**tokenizer.special_tokens_map, **options},
        )
    except (TemplateError, TypeError) as error:  # TypeError: such as a list that the template joins to a string
        raise ValueError(f"The chat template can't render this conversation: {error}") from error
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def _is_phi3_format(tokenizer: "PreTrainedTokenizerBase", own: str) -> bool:
    """Return whether a template writes the same as CHAT_TEMPLATE, except for a leading bos token."""
    try:
        text = render(tokenizer, own, _PROBE[:3], add_generation_prompt=True)[0]
    except (ValueError, TypeError):
        return False
    expected = render(tokenizer, CHAT_TEMPLATE, _PROBE[:3], add_generation_prompt=True)[0]
    return text.removeprefix(str(tokenizer.bos_token or "")) == expected


def _end_token(tokenizer: "PreTrainedTokenizerBase", own: str) -> str:
    """Return the control token that the template writes after each answer."""
    text = render(tokenizer, own, _PROBE)[0]
    first, last = (text.partition(answer)[2] for answer in _ANSWERS)
    # Some tokenizers have line breaks among their added tokens.
    control = {id: token for id, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    ids = tokenizer(last, add_special_tokens=False)["input_ids"]
    end = next((control[token].content for token in ids if token in control), None)
    if end is None or end not in first.partition(_QUESTIONS[1])[0]:
        raise ValueError(
            f"it ends an answer with {last!r} (and one before the last with {first.partition(_QUESTIONS[1])[0]!r}), and no "
            "control token of the tokenizer ends both: a model couldn't learn from it where to stop"
        )
    return end


def _quoted(text: str) -> str:
    """Return a Jinja string literal; Jinja knows JSON's escapes, but no surrogates."""
    return json.dumps(text, ensure_ascii=False)


def _missing_header(tokenizer: "PreTrainedTokenizerBase", own: str) -> str:
    """Return the text between the template's generation prompt and an answer, such as a turn header or an empty thought.

    A space at its end is left to the answer, whose first word forms one token with it.
    """
    asked = render(tokenizer, own, _PROBE[:1], add_generation_prompt=True)[0]
    answered = render(tokenizer, own, _PROBE[:2])[0]
    header = answered.removeprefix(asked).partition(_ANSWERS[0])[0] if answered.startswith(asked) else ""
    return header.rstrip(" ") if header.strip() else ""


def _check_adapted(tokenizer: "PreTrainedTokenizerBase", own: str, adapted: str, header: str, end: str) -> None:
    """Raise ValueError unless `adapted` writes the same as `own` and marks the answers with their end token."""
    user: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTIONS[0]}]}
    with_volume: list[Message] = [user, *_PROBE[1:]]
    as_text: list[Message] = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{_QUESTIONS[0]}"}, *_PROBE[1:]]
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
