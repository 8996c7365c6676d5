"""Whose slice settings count: a model's or slice encoder's own, where it has some."""

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from samf.model.image_processing_samf import SamfImageProcessor
from samf.utils.text_files import read_json

FILES = ("preprocessor_config.json", "processor_config.json")  # the second holds the first's under "image_processor"


def load_image_processor(source: str | None, **settings: Any) -> SamfImageProcessor:
    """The image processor of a model or slice encoder, or a new one where it has none, with what `settings` set.

    Args:
        source: folder or Hub id of a SAMF model or of a slice encoder; None = a new one.
        settings: of SamfImageProcessor; None leaves one as it is.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if source is not None and has_slice_settings(source):
        return SamfImageProcessor.from_pretrained(source, **given)
    return SamfImageProcessor(**given)


def has_slice_settings(source: str) -> bool:
    """Whether this folder, or this repository on the Hub, says how slices are cut.

    The settings that other encoders bring along, such as ViT's own, are about photographs.
    """
    if not Path(source).is_dir():
        cached_file(source, "config.json")  # raises where there is no such repository, or no network to ask
    files = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in FILES]
    saved = [read_json(file) for file in files if file is not None]
    kinds = [settings.get("image_processor", settings).get("image_processor_type") for settings in saved]
    return SamfImageProcessor.__name__ in kinds
