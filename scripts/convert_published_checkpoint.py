"""Convert checkpoints of the paper's reference implementation, and DINO backbones, to folders that this project loads.

    python -m samf.scripts.convert_published_checkpoint --source serag-ai/SAMF --output_dir models/published
    python -m samf.scripts.convert_published_checkpoint --source runs/model_with_lora.bin --output_dir models/published \\
        --tokenizer microsoft/Phi-3-mini-4k-instruct
    python -m samf.scripts.convert_published_checkpoint --part slice_encoder --source dino_backbone.pth \\
        --output_dir encoders/dino

The first two write a complete Hub repository that reproduces the reference implementation: its weights, its preprocessing
(preset "published" of the image processor), its prompt format and its fusion, which reads every token. The third writes what
`train.py --slice_encoder` takes. Sizes come from the weights' shapes, everything else from a config.json in the same folder,
the options below, or the paper. Every tensor of the source is used, merged or left out by name; any other is an error.
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig, ViTModel

from samf.model.hub_samf import publish_weights
from samf.model.model_card import make_card, write_model_card
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.scripts.conversion_arguments import ConvertArguments
from samf.scripts.conversion_checks import ConversionError, check_adapter_config, check_tensors, read_json
from samf.scripts.conversion_config import model_config, vision_config
from samf.scripts.conversion_names import DINO_NAMES, MODEL_NAMES, VIT_NAMES
from samf.scripts.conversion_processor import build_processor
from samf.scripts.conversion_sources import find_checkpoint, read_checkpoint
from samf.scripts.conversion_weights import backbone_weights, empty_model, fill, merge_lora, plain_names, rename
from samf.utils.files import atomic_folder
from samf.utils.packaged import REQUIREMENTS
from samf.utils.recipe import parse_recipe

logger = logging.getLogger("samf.convert")

MAX_SHARD_SIZE = "2GB"  # a shard is copied once more while it is written


def convert_model(args: ConvertArguments) -> None:
    """Convert a checkpoint of the reference implementation to a complete Hub repository in `args.output_dir`.

    Raises:
        ConversionError: the source can't be converted, or the folder exists.
    """
    with _new_folder(args.output_dir) as folder:
        checkpoint = find_checkpoint(args)
        weights, settings = read_checkpoint(checkpoint, args.part)
        check_adapter_config(
            checkpoint.files[0].parent, weights, args.lora_alpha, single_file=checkpoint.folder is None
        )
        weights = merge_lora(plain_names(weights, checkpoint.name), args.lora_alpha, checkpoint.name, args.dtype)
        weights = rename(weights, MODEL_NAMES, checkpoint.name)
        config = model_config(weights, settings, args, checkpoint.name)
        processor = build_processor(checkpoint, config, args)
        model = empty_model(lambda: SamfForConditionalGeneration(config))
        fill(model, weights, MODEL_NAMES, checkpoint.name, args.dtype)
        del weights
        _copy_token_ids(model.generation_config, checkpoint.folder)
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        shutil.copyfile(REQUIREMENTS, folder / "requirements.txt")
        facts = {
            "Converted from": checkpoint.name + (f" at {args.revision}" if args.revision else ""),
            "Image processor": "preset `published`: 24 slices about the middle, HU cast to uint8",
            "Fusion's text": "every token, placeholders and padding included, as in the reference implementation",
        }
        write_model_card(folder, make_card(config, base_models=[args.source], facts=facts))
    logger.info(
        "%s: %s, %d parameters, in %s", checkpoint.name, config.fusion_type, model.num_parameters(), args.output_dir
    )
    logger.warning(
        "fusion_text_scope='sequence' reproduces the reference implementation's fusion, which reads every token: in "
        "training also the answer, which leaks into the image tokens and is absent at inference, and always the image "
        "placeholders and the padding, so that a prompt's result depends on its batch."
    )


def _copy_token_ids(generation_config: GenerationConfig, folder: Path | None) -> None:
    """Copy the special tokens' ids from the source's generation_config.json, but not its sampling options."""
    file = folder and folder / "generation_config.json"
    if file and file.is_file():
        theirs = read_json(file)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in theirs:
                setattr(generation_config, name, theirs[name])


def convert_slice_encoder(args: ConvertArguments) -> None:
    """Convert a DINO backbone, timm's or transformers' ViT, to `args.output_dir` for `train.py --slice_encoder`.

    Raises:
        ConversionError: the source can't be converted, or the folder exists.
    """
    with _new_folder(args.output_dir) as folder:
        checkpoint = find_checkpoint(args)
        loaded, settings = read_checkpoint(checkpoint, args.part)
        known = settings["text"]  # config.json, here the ViT's
        if known.get("model_type", "vit") != "vit":
            raise ConversionError(
                f"{checkpoint.name}: its config.json is of a {known['model_type']!r}; expected 'vit'."
            )
        weights = backbone_weights(loaded, args.branch, checkpoint.name)
        check_tensors(weights, checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.name)
        names = VIT_NAMES if "embeddings.cls_token" in weights else DINO_NAMES
        weights = rename(weights, names, checkpoint.name)
        config = vision_config(weights, known, args, names, checkpoint.name)
        model = empty_model(lambda: ViTModel(config, add_pooling_layer=False))
        fill(model, weights, names, checkpoint.name, args.dtype)
        model.save_pretrained(folder)
    logger.info(
        "%s: a ViT of %d layers, width %d, patches of %d pixels, images of %d, in %s",
        checkpoint.name,
        config.num_hidden_layers,
        config.hidden_size,
        config.patch_size,
        config.image_size,
        args.output_dir,
    )


@contextmanager
def _new_folder(path: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with its weights published, when the block ends without an error.

    Raises:
        ConversionError: `path` exists and isn't an empty folder.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target}: exists already. Give a new folder, or move it away.")
    with atomic_folder(target) as temporary:
        yield temporary
        publish_weights(temporary)


def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint as the command line asks."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        (args,) = parse_recipe(ConvertArguments, argv)
        {"model": convert_model, "slice_encoder": convert_slice_encoder}[args.part](args)
    except ValueError as error:
        sys.exit(f"convert_published_checkpoint.py: {error}")


if __name__ == "__main__":
    main()
