"""Arguments that stages 2 and 3 share: the slice encoder, the aggregator, and how slices are cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from samf.model.image_processing_samf import SLABS


class SliceSettings(TypedDict):
    """Settings of a SamfImageProcessor; None = its own."""

    slices_per_plane: int | None
    slab: str | Sequence[str] | None
    size: int | None


@dataclass
class AggregatorArguments:
    """The slice encoder and the aggregator over it. With equal values, stage 3 can load the weights of stage 2."""

    slice_encoder: str = field(
        default="facebook/dino-vitb16", metadata={"help": "folder or Hub id of the slice encoder"}
    )
    slice_position_scope: Literal["none", "aggregator", "all"] = field(
        default="aggregator", metadata={"help": "which modules get plane and depth embeddings"}
    )
    volume_dim: int = field(default=256, metadata={"help": "width of the volume embedding"})
    aggregator_num_heads: int = field(default=8)
    aggregator_ffn_dim: int = field(default=1024)
    aggregator_dropout: float = field(default=0.1)
    aggregator_pooling: Literal["cls", "cls_max"] = field(
        default="cls", metadata={"help": "z_3d from the CLS token, or also from the maximum over the slices"}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    vision_chunk_size: int | None = field(
        default=None, metadata={"help": "most slices that the encoder reads in one call"}
    )
    slices_per_plane: int | None = field(default=None, metadata={"help": "default: the image processor's, 24"})
    slab: list[str] | None = field(
        default=None,
        metadata={
            "help": "projection of the voxels between two slices, one or one for each HU window; default: the image "
            "processor's",
            "choices": SLABS,
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "pixels per side; default: the image processor's, 224"}
    )

    def slice_settings(self) -> SliceSettings:
        """Return the settings of the slices under SamfImageProcessor's names."""
        return {"slices_per_plane": self.slices_per_plane, "slab": self.slab, "size": self.image_size}
