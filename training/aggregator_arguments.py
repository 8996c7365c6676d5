"""What stages 2 and 3 are told alike: the slice encoder, the aggregator, and how slices are cut."""

from dataclasses import dataclass, field


@dataclass
class AggregatorArguments:
    """The slice encoder and the aggregator over it. Equal values in both stages let one take up the other's weights."""

    slice_encoder: str = field(
        default="facebook/dino-vitb16", metadata={"help": "folder or Hub id of the slice encoder"}
    )
    slice_position_scope: str = field(default="aggregator", metadata={"help": "none, aggregator or all"})
    volume_dim: int = field(default=256, metadata={"help": "width of the volume embedding"})
    aggregator_num_heads: int = field(default=8)
    aggregator_ffn_dim: int = field(default=1024)
    aggregator_dropout: float = field(default=0.1)
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    vision_chunk_size: int | None = field(default=None, metadata={"help": "most slices the encoder reads in one call"})
    slices_per_plane: int | None = field(default=None, metadata={"help": "the image processor's; its default is 24"})
    slab: str | None = field(default=None, metadata={"help": "none, mean or mip over the voxels between two slices"})
    image_size: int | None = field(
        default=None, metadata={"help": "pixels a side; the image processor's default is 224"}
    )

    def slice_settings(self) -> dict[str, int | str | None]:
        """As SamfImageProcessor names them; None = its own."""
        return {"slices_per_plane": self.slices_per_plane, "slab": self.slab, "size": self.image_size}
