"""The index of packed shards: settings, counts, and where each volume's entry is."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal, TypedDict

from samf.cache.slice_cache import ENTRY_VERSION
from samf.data.schema import JsonObject
from samf.data.shards.storage import Storage
from samf.model.image_processing_samf import EXTRACT_VERSION, SamfImageProcessor

INDEX = "index.json"
FORMAT = 1  # bump when older code can't read the shards
_SETTINGS = ("preset", "planes", "slices_per_plane", "hu_windows", "field", "slab", "size")


class ShardsError(ValueError):
    """Shards that can't be used as asked; the message says what to do."""


@dataclass(frozen=True)
class Member:
    """A volume's entry in a shard: `size` bytes from `start`."""

    volume: str
    key: str
    start: int
    size: int


@dataclass(frozen=True)
class ShardFile:
    """A shard: a tar file of cache entries, all of one split."""

    name: str
    split: str
    size: int
    sha256: str
    members: list[Member]


@dataclass(frozen=True)
class TableFile:
    """The Parquet file of a split's records."""

    name: str
    size: int
    sha256: str
    records: dict[str, int]  # by task
    volumes: int
    left_out: int = 0  # records of volumes that have no entry


class SliceSettings(TypedDict):
    """What the entries depend on, next to the volumes."""

    slices: JsonObject
    settings_hash: str
    extract_version: int
    entry_version: int
    min_coverage: float


@dataclass(frozen=True)
class ShardIndex:
    """What is packed.

    Attributes:
        kind: "slices" or "embeddings".
        settings: of the slices.
        encoder: of embeddings, the fingerprint of the slice encoder.
        finding_names: the findings of the records' labels, in their order.
        tables: the records by split.
        shards: all shards, of all splits.
        format: of this file and the shards.
    """

    kind: Literal["slices", "embeddings"]
    settings: SliceSettings
    encoder: str | None
    finding_names: list[str]
    tables: dict[str, TableFile]
    shards: list[ShardFile] = field(repr=False)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the index file's content."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def read(cls, storage: Storage) -> "ShardIndex":
        """Read the index of shards.

        Args:
            storage: where they are.

        Raises:
            FileNotFoundError: there is no index.
            ShardsError: it was written by newer code, or isn't an index.
        """
        try:
            content = storage.read(INDEX)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{storage.shown}: no {INDEX}; expected shards that `samf data pack` wrote. If packing was interrupted, run "
                "the same command again."
            ) from error
        try:
            found = json.loads(content)
            if found["format"] > FORMAT:
                raise ShardsError(
                    f"{storage.shown}: shards of format {found['format']}; this code reads format {FORMAT}. Update samf."
                )
            found["tables"] = {split: TableFile(**table) for split, table in found["tables"].items()}
            found["shards"] = [
                ShardFile(**{**shard, "members": [Member(**member) for member in shard["members"]]})
                for shard in found["shards"]
            ]
            return cls(**found)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ShardsError(f"{storage.shown}/{INDEX}: not an index of shards ({error}). Pack them again.") from error

    def identity(self) -> str:
        """Return a name of the content: shards of the same prefix that were packed again have another one."""
        tables = [table.sha256 for _, table in sorted(self.tables.items())]
        return hashlib.sha256("".join([*tables, *(shard.sha256 for shard in self.shards)]).encode()).hexdigest()[:16]

    def check_settings(self, image_processor: SamfImageProcessor, shown: str) -> None:
        """Refuse shards whose slices differ from those that an image processor makes.

        Args:
            image_processor: of the model.
            shown: the shards' address, for the message.

        Raises:
            ShardsError: names what differs, on both sides.
        """
        packed, now = self.settings, slice_settings(image_processor, self.settings["min_coverage"])
        if packed["settings_hash"] == now["settings_hash"] and packed["entry_version"] == now["entry_version"]:
            return
        ours: JsonObject = {**packed["slices"], **{name: packed[name] for name in ("extract_version", "entry_version")}}
        theirs: JsonObject = {**now["slices"], **{name: now[name] for name in ("extract_version", "entry_version")}}
        differing = [
            f"{name} is {ours.get(name)} in the shards and {theirs.get(name)} in the model"
            for name in theirs
            if ours.get(name) != theirs.get(name)
        ]
        raise ShardsError(
            f"{shown}: packed with other slice settings than the model's image processor has: "
            f"{'; '.join(differing) or 'see index.json'}. Pack shards from a slice cache that was filled with "
            "the model's settings, or train a model with the shards' settings."
        )


def slice_settings(image_processor: SamfImageProcessor, min_coverage: float) -> SliceSettings:
    """Return what entries of a slice cache depend on.

    Args:
        image_processor: extracts the slices.
        min_coverage: of the slice cache, in mm.
    """
    slices = {name: getattr(image_processor, name) for name in _SETTINGS}
    return {
        "slices": json.loads(json.dumps(slices)),  # tuples as lists, as the index gives them back
        "settings_hash": image_processor.settings_hash(),
        "extract_version": EXTRACT_VERSION,
        "entry_version": ENTRY_VERSION,
        "min_coverage": min_coverage,
    }
