"""Image processors with the slice settings of a saved model or slice encoder."""

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from samf.model.image_processing_samf import SamfImageProcessor
from samf.utils.text_files import read_json

_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
)  # the second has the first's content as "image_processor"


def load_image_processor(source: str | None, **settings: Any) -> SamfImageProcessor:
    """Return the image processor of a model or slice encoder, or one with default settings if it has none.

    Args:
        source: folder or Hub id of a SAMF model or of a slice encoder; None = default settings.
        settings: settings of SamfImageProcessor that replace those of `source`; None keeps one as it is.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if source is not None and has_slice_settings(source):
        return SamfImageProcessor.from_pretrained(source, **given)
    return SamfImageProcessor(**given)


def has_slice_settings(source: str) -> bool:
    """Return whether a folder, or a repository on the Hub, has settings of SamfImageProcessor.

    The image processors of other encoders, such as ViT's, are for photographs.

    Raises:
        OSError: there is no such repository, or no network to look it up.
    """
    if not Path(source).is_dir():
        cached_file(source, "config.json")
    files = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _FILES]
    saved = [read_json(file) for file in files if file is not None]
    kinds = [settings.get("image_processor", settings).get("image_processor_type") for settings in saved]
    return SamfImageProcessor.__name__ in kinds
