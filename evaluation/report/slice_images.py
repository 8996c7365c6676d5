"""Slice images of the volumes of a report's cases."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from samf.data.schema import Record, volume_of
from samf.evaluation.schema import PredictionRow
from samf.model.ct_volume import VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.reporting.slice_view import WINDOWS, save_slice_image

logger = logging.getLogger(__name__)

_SLICES_PER_PLANE = 4

# Id of a row → the image's path, or the reason why there is none.
SliceImages = Mapping[str | int | None, Path | str]


def draw_slices(rows: Iterable[PredictionRow], records: Iterable[Record], folder: Path) -> SliceImages:
    """Draw the slices of each row's volume.

    Args:
        rows: predictions whose volumes are shown.
        records: records of the data set, which hold the paths of the volumes; matched by id.
        folder: where the PNG files are written.

    Returns:
        Id → path of the image, or the reason why there is none.
    """
    wanted = {row.get("id") for row in rows}
    volumes: dict[str | int | None, VolumeRef | None] = {
        record["id"]: volume_of(record) for record in records if record["id"] in wanted
    }
    processor = SamfImageProcessor(
        slices_per_plane=_SLICES_PER_PLANE, hu_windows=(WINDOWS["lung"],), image_mean=0.5, image_std=0.5
    )
    images: dict[str | int | None, Path | str] = {}
    for number, row_id in enumerate(wanted):
        volume = volumes.get(row_id)
        if volume is None:
            images[row_id] = "No volume of this id is in the data."
            continue
        try:
            path = folder / f"slices_{number}.png"
            images[row_id] = save_slice_image(read_ct(volume), path, image_processor=processor)
        except (OSError, ValueError) as error:
            logger.warning("%s: no slice image: %s", row_id, error)
            images[row_id] = f"The volume can't be shown: {type(error).__name__}."
    return images
