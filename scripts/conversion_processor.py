"""The processor of a converted model: the reference implementation's preprocessing, prompt and tokenizer."""

import logging
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from samf.model.configuration_samf import SamfConfig
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.processing_samf import IMAGE_TOKEN, SamfProcessor
from samf.scripts.conversion_arguments import ConvertArguments
from samf.scripts.conversion_checks import ConversionError
from samf.scripts.conversion_sources import TOKENIZER_FILES, Checkpoint

logger = logging.getLogger("samf.convert")

_REFERENCE_IMAGE_TOKEN = "<im_patch>"
DEFAULT_IMAGE_TOKEN_ID = 32011  # Phi-3's first free row, which the reference implementation gives to its placeholder

# The reference implementation's prompt: placeholders and the question, without role markers; then a space and the answer.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ ' ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{{ eos_token }}
{%- endgeneration -%}
{%- elif message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] in ('volume', 'image') -%}{{ '<image>' }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def build_processor(
    checkpoint: Checkpoint, config: SamfConfig, args: ConvertArguments
) -> SamfProcessor | SamfImageProcessor:
    """Return the reference implementation's preprocessing; sets `config.image_token_id`.

    Args:
        checkpoint: may hold a tokenizer.
        config: of the converted model; modified.
        args: options of the user.

    Returns:
        A processor; without a tokenizer only the image processor.

    Raises:
        ConversionError: the placeholder's id contradicts the tokenizer or the embeddings.
    """
    image_processor = SamfImageProcessor(preset="published", size=config.vision_config.image_size)
    tokenizer = load_tokenizer(checkpoint, args)
    config.image_token_id = DEFAULT_IMAGE_TOKEN_ID if args.image_token_id is None else args.image_token_id
    processor: SamfProcessor | SamfImageProcessor = image_processor
    if tokenizer is None:
        logger.warning(
            "%s: has no tokenizer, so the folder gets only an image processor. Give --tokenizer, e.g. "
            "microsoft/Phi-3-mini-4k-instruct.",
            checkpoint.name,
        )
    else:
        processor = SamfProcessor(image_processor, tokenizer, CHAT_TEMPLATE, num_image_tokens=args.num_image_tokens)
        if args.image_token_id not in (None, processor.image_token_id):
            raise ConversionError(
                f"The tokenizer's placeholder has id {processor.image_token_id}, but image_token_id is "
                f"{args.image_token_id}. Give the tokenizer that the checkpoint was trained with."
            )
        config.image_token_id = processor.image_token_id
    rows = config.text_config.vocab_size
    if config.image_token_id >= rows:
        raise ConversionError(
            f"{checkpoint.name}: the placeholder's id is {config.image_token_id}, but the language model embeds {rows} "
            f"tokens. Give the right --image_token_id or --tokenizer."
        )
    return processor


def load_tokenizer(checkpoint: Checkpoint, args: ConvertArguments) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that `args` names, else the checkpoint's own, else None; its placeholder gets our name.

    Raises:
        ConversionError: the source of --tokenizer has none, or reading it needs a missing library.
    """
    folder = checkpoint.folder
    if args.tokenizer is not None:
        folder = Path(args.tokenizer)
        if not folder.is_dir():
            folder = Path(snapshot_download(args.tokenizer, allow_patterns=list(TOKENIZER_FILES)))
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else []
    if folder is None or not any(path.name in ("tokenizer.json", "tokenizer.model") for path in found):
        if args.tokenizer is not None:
            raise ConversionError(f"{args.tokenizer}: holds neither tokenizer.json nor tokenizer.model.")
        return None
    if not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ConversionError(
            f"{folder}: reading tokenizer.model needs sentencepiece: pip install sentencepiece protobuf. Or give a "
            f"--tokenizer with a tokenizer.json, e.g. microsoft/Phi-3-mini-4k-instruct."
        )
    with tempfile.TemporaryDirectory() as copy:
        for path in found:
            if path.suffix == ".json":
                text = path.read_text(encoding="utf-8").replace(_REFERENCE_IMAGE_TOKEN, IMAGE_TOKEN)
                (Path(copy) / path.name).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, Path(copy) / path.name)
        tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
    tokenizer.name_or_path = ""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
