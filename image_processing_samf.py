"""CT volume → stack of slices in three planes, the input of SAMF's slice encoder.

Every plane is cut evenly over the whole field. A slice becomes a square picture of `size` x `size` pixels: the longer
side of the field, in millimetres, fills it, pixels are square in millimetres, and air fills the rest. Each HU window is
one channel. Pictures stand as radiologists see them: axial ones with the front on top, coronal and sagittal ones with
the head on top; the patient's right on the picture's left; in sagittal ones the patient's front on the left.

The preset "published" is another way, and not a good one: what the paper's published code does, for running the
checkpoints that were trained on it.
"""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .ct_volume import AIR_HU, CTVolume, to_ct_volume
from .hub_samf import PushToHubWithCard

try:
    from PIL import Image
except ImportError:
    Image = None

logger = logging.getLogger(__name__)

PLANES = ("axial", "coronal", "sagittal")  # a plane's place here is its number in slice_planes
SLABS = ("none", "mean", "mip")
EXTRACT_VERSION = 1  # counts up whenever `extract` gives other pixels for the same volume and settings

# Array axes of (the plane's normal, picture rows, picture columns) in a RAS+ volume. Rows and columns then run
# backwards: Superior or Anterior is on top, the patient's Right (axial, coronal) or Anterior (sagittal) on the left.
_PLANE_AXES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
# Below air there is only padding (-3024 or the like), above this only metal: limited, they spoil no neighbours.
_MAX_HU = 3071
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Keys of saved files that belong to the library, not to us.
_SERVICE_KEYS = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
_WINDOWS = ((-1350, 150), (-160, 240), (-1000, 1000))  # lung, mediastinum, everything
# What a preset sets where the caller sets nothing.
PRESETS: dict[str, dict[str, Any]] = {
    "triplanar": {"planes": PLANES, "hu_windows": _WINDOWS, "do_normalize": True},
    "paper": {"planes": ("axial",), "hu_windows": _WINDOWS, "do_normalize": True},
    "published": {"planes": ("axial",), "hu_windows": None, "do_normalize": False},
}
_PUBLISHED_REACH = 72  # slices from the middle one to the first and the last that the published code takes
_PUBLISHED_CHANNELS = 3
_EXTRACT_SETTINGS = ("planes", "slices_per_plane", "hu_windows", "slab", "size")
_PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_SLICE_KEYS = ("slice_planes", "slice_positions", "slice_indices", "slice_mm")


class SamfImagesKwargs(ImagesKwargs, total=False):
    """Settings that a call may override: those below, and of the library's `size`, `do_rescale`, `rescale_factor`,
    `do_normalize`, `image_mean`, `image_std` and `return_tensors`."""

    planes: list[str] | tuple[str, ...]
    slices_per_plane: int | list[int] | tuple[int, ...]
    hu_windows: list | tuple
    slab: str


class SamfImageProcessor(PushToHubWithCard, BaseImageProcessor):
    """Makes model inputs from CT volumes. The result depends on the volume and these settings alone.

    Args:
        planes: of "axial", "coronal", "sagittal", in the order in which their slices shall come.
        slices_per_plane: one number for all planes, or one for each. Slice i of n stands at (i + 0.5) / n of the field.
            A volume with fewer voxels along a plane's normal than n gives some of its slices more than once.
        hu_windows: (low, high) in HU for each channel: low and below becomes 0, high and above 255.
        slab: "none" takes the slice at each position; "mean" and "mip" (maximum) reduce all the voxels that are nearer
            to it than to its neighbours, so that each voxel counts in exactly one slice.
        size: width and height of the pictures in pixels.
        do_rescale, rescale_factor: multiply the pixels 0..255 by the factor.
        do_normalize, image_mean, image_std: then subtract the mean and divide by the deviation of each channel. By
            default ImageNet's for three windows, and the average of ImageNet's for any other number of windows.
        preset: what `planes`, `hu_windows` and `do_normalize` are where they are left out.

            - "triplanar": three planes.
            - "paper": the plane of the published model, the axial one, alone; field and windows are as in "triplanar".
            - "published": what the paper's published code does, for its checkpoints alone. The slices lie along the
              third axis of the file's own array, whatever that is, evenly from 72 slices below the middle one to 72
              above it. They stand as stored: rows are the first axis. Whole HU become uint8 by leaving all but their
              lowest eight bits out (-1000 gives 24), unless `hu_windows` is given. Bicubic scaling brings the shorter
              side to `size`, and the middle of the longer is kept. Three equal channels, no normalisation. `planes`
              and `slab` can't be chosen then.

    Raises:
        ValueError: a setting that makes no sense; says which.
        TypeError: a setting that does not exist.
    """

    model_input_names = ["pixel_values", "slice_mask", "slice_planes", "slice_positions"]
    valid_kwargs = SamfImagesKwargs

    def __init__(
        self,
        planes: Sequence[str] | None = None,
        slices_per_plane: int | Sequence[int] = 24,
        hu_windows: Sequence[Sequence[float]] | None = None,
        slab: str = "none",
        size: int | Mapping[str, int] = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        preset: str = "triplanar",
        **kwargs,
    ):
        unknown = [key for key in kwargs if key not in _SERVICE_KEYS and not key.startswith("_")]
        if unknown:
            known = ", ".join((*_EXTRACT_SETTINGS, *_PIXEL_SETTINGS, "preset"))
            raise TypeError(f"SamfImageProcessor has no setting {', '.join(unknown)}; its settings are {known}")
        super().__init__(**kwargs)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}; expected one of {', '.join(PRESETS)}")
        self.preset = preset
        defaults = PRESETS[preset]
        self.planes = _checked_planes(defaults["planes"] if planes is None else planes)
        self.slices_per_plane = _checked_counts(slices_per_plane, len(self.planes))
        self.hu_windows = _checked_windows(defaults["hu_windows"] if hu_windows is None else hu_windows)
        if slab not in SLABS:
            raise ValueError(f"slab={slab!r}; expected one of {', '.join(SLABS)}")
        self.slab = slab
        if preset == "published" and (self.planes, slab) != (defaults["planes"], "none"):
            raise ValueError(f"planes={self.planes} and slab={slab!r} can't be chosen with preset='published'")
        self.size = _checked_size(size)
        self.do_rescale = bool(do_rescale)
        self.rescale_factor = rescale_factor
        self.do_normalize = bool(defaults["do_normalize"] if do_normalize is None else do_normalize)
        channels = self.num_channels
        self.image_mean = _checked_channel_values("image_mean", image_mean, _IMAGENET_MEAN, channels)
        self.image_std = _checked_channel_values("image_std", image_std, _IMAGENET_STD, channels)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std}; expected positive numbers")

    @property
    def num_slices(self) -> int:
        """Slices of one volume, all planes together."""
        return sum(self._counts())

    @property
    def num_channels(self) -> int:
        """Channels of a picture: one for each HU window; three equal ones without windows (preset "published")."""
        return _PUBLISHED_CHANNELS if self.hu_windows is None else len(self.hu_windows)

    def settings_hash(self) -> str:
        """Name of what `extract` makes of a volume: equal exactly when the settings that change it are equal."""
        settings = {name: getattr(self, name) for name in _EXTRACT_SETTINGS}
        settings["slices_per_plane"] = self._counts()  # 24 and (24, 24, 24) are one setting
        if self.preset == "published":  # the other presets are defaults of the settings above
            settings["preset"] = self.preset
        text = json.dumps({"version": EXTRACT_VERSION, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def extract(self, volume: CTVolume) -> dict[str, np.ndarray]:
        """The slice stack before rescaling and normalisation: the part worth keeping in a cache.

        Args:
            volume: CTVolume, or anything else that `to_ct_volume` takes.

        Returns:
            slices: uint8 (S, C, size, size), the windowed pictures.
            slice_planes: int64 (S,), 0 axial, 1 coronal, 2 sagittal.
            slice_positions: float32 (S,), place along the plane's normal in 0..1 (foot→head, back→front, left→right).
            slice_indices: int64 (S,), index of the slice in the RAS+ array along the plane's normal.
            slice_mm: float32 (S,), RAS coordinate of the slice's centre along the plane's normal.
        """
        volume = to_ct_volume(volume)
        if self.preset == "published":
            return self._extract_published(volume)
        parts = [
            self._extract_plane(volume, plane, count) for plane, count in zip(self.planes, self._counts(), strict=True)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def preprocess(self, images: Any, **kwargs: Unpack[SamfImagesKwargs]) -> BatchFeature:
        """Model inputs of one volume or a list of B volumes. S is the largest slice count; shorter stacks are padded.

        Args:
            images: each a path (file, or DICOM folder), a CTVolume, an array (X, Y, Z) in HU (RAS+, 1 mm), a nibabel or
                SimpleITK image, or what `extract` gave.
            kwargs: settings for this call alone, and return_tensors ("pt" by default, or "np").

        Returns:
            pixel_values float32 (B, S, C, size, size), slice_mask bool (B, S), True where there is a slice;
            slice_planes, slice_positions, slice_indices and slice_mm (B, S) as in `extract`, 0 where there is none.

        Raises:
            CTReadError: a volume that can't be read. TypeError: an unknown setting.
        """
        return_tensors = kwargs.pop("return_tensors", None) or TensorType.PYTORCH
        if kwargs:
            return self._with(kwargs).preprocess(images, return_tensors=return_tensors)
        stacks = [self._stack(image) for image in _as_list(images)]
        if not stacks:
            raise ValueError("no volume given; expected one or a list of volumes")
        batch, longest = len(stacks), max(len(stack["slices"]) for stack in stacks)
        channels = self.num_channels
        data = {
            "pixel_values": np.zeros((batch, longest, channels, self.size, self.size), dtype=np.float32),
            "slice_mask": np.zeros((batch, longest), dtype=bool),
            **{key: np.zeros((batch, longest), dtype=stacks[0][key].dtype) for key in _SLICE_KEYS},
        }
        for row, stack in enumerate(stacks):
            count = len(stack["slices"])
            self._to_float(stack["slices"], out=data["pixel_values"][row, :count])
            data["slice_mask"][row, :count] = True
            for key in _SLICE_KEYS:
                data[key][row, :count] = stack[key]
        return BatchFeature(data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The settings and the library's keys: what else was set on the object, loading would refuse."""
        known = {*_EXTRACT_SETTINGS, *_PIXEL_SETTINGS, "preset", *_SERVICE_KEYS}
        return {key: value for key, value in super().to_dict().items() if key in known}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths stay paths: the library's method would open them as photographs."""
        return image_url_or_urls

    def _counts(self) -> tuple[int, ...]:
        counts = self.slices_per_plane
        return (counts,) * len(self.planes) if isinstance(counts, int) else counts

    def _with(self, overrides: Mapping[str, Any]) -> "SamfImageProcessor":
        """A copy with some settings changed. None means no change, as elsewhere in the library."""
        settings = {name: getattr(self, name) for name in (*_EXTRACT_SETTINGS, *_PIXEL_SETTINGS, "preset")}
        return type(self)(**{**settings, **{key: value for key, value in overrides.items() if value is not None}})

    def _stack(self, image: Any) -> Mapping[str, np.ndarray]:
        if not isinstance(image, Mapping):
            return self.extract(image)
        shape = (self.num_channels, self.size, self.size)
        if "slices" not in image or image["slices"].shape[1:] != shape:
            found = image["slices"].shape if "slices" in image else f"keys {sorted(image)}"
            raise ValueError(f"an extracted volume with {found}; expected `slices` of shape (S, {shape})")
        return image

    def _to_float(self, slices: np.ndarray, out: np.ndarray) -> None:
        """Rescales and normalises uint8 (S, C, H, W) into `out`, float32."""
        out[...] = slices
        if self.do_rescale:
            out *= np.float32(self.rescale_factor)
        if self.do_normalize:
            out -= np.array(self.image_mean, dtype=np.float32)[:, None, None]
            out /= np.array(self.image_std, dtype=np.float32)[:, None, None]

    def _extract_plane(self, volume: CTVolume, plane: str, count: int) -> dict[str, np.ndarray]:
        normal, row_axis, column_axis = _PLANE_AXES[plane]
        pictures = volume.hu.transpose(normal, row_axis, column_axis)[:, ::-1, ::-1]  # (N, rows, columns), a view
        depth = pictures.shape[0]
        indices = np.array([(2 * i + 1) * depth // (2 * count) for i in range(count)])
        # Averaging and resizing work on HU, and the windows come last: it is what a scanner with larger voxels would
        # have measured, dense specks survive in narrow windows, and one resize serves all channels.
        slices = np.empty((count, *pictures.shape[1:]), dtype=np.float32)
        for i, index in enumerate(indices):
            slices[i] = self._reduce(pictures, i, index, count)
        hu = _fit_square(torch.from_numpy(slices), volume.spacing[row_axis], volume.spacing[column_axis], self.size)
        return {
            "slices": np.stack([_window(hu, low, high) for low, high in self.hu_windows], axis=1),
            **_slice_places(volume, plane, indices, (np.arange(count) + 0.5) / count),
        }

    def _extract_published(self, volume: CTVolume) -> dict[str, np.ndarray]:
        """`extract` as the published code does it: see the preset."""
        _warn_of_published()
        stored = volume.stored_hu()  # (rows, columns, N), a view
        depth, middle = stored.shape[2], stored.shape[2] // 2
        first, last = max(0, middle - _PUBLISHED_REACH), min(depth - 1, middle + _PUBLISHED_REACH)
        indices = np.linspace(first, last, self.num_slices, dtype=np.int64)
        slices = np.empty((len(indices), self.num_channels, self.size, self.size), dtype=np.uint8)
        for i, index in enumerate(indices):
            hu = stored[:, :, index]
            if self.hu_windows is None:
                slices[i] = _bicubic_middle(hu.astype(np.uint8), self.size)  # wraps; all channels are equal
                continue
            for channel, (low, high) in enumerate(self.hu_windows):
                picture = _window(torch.from_numpy(hu.astype(np.float32)), low, high)
                slices[i, channel] = _bicubic_middle(picture, self.size)
        # The places are the patient's all the same, so that a slice can be found again.
        normal, sign = volume.stored_axes[2]
        plane = next(plane for plane, axes in _PLANE_AXES.items() if axes[0] == normal)
        indices = indices if sign > 0 else depth - 1 - indices
        return {"slices": slices, **_slice_places(volume, plane, indices, (indices + 0.5) / depth)}

    def _reduce(self, pictures: np.ndarray, i: int, index: int, count: int) -> np.ndarray:
        """Slice i of `count`: the picture at `index`, or the mean or maximum over the slab that is nearest to it."""
        if self.slab == "none":
            return pictures[index].clip(AIR_HU, _MAX_HU)
        depth = pictures.shape[0]
        start, stop = (-((count - 2 * j * depth) // (2 * count)) for j in (i, i + 1))  # voxel centres within the slab
        if start >= stop:  # fewer voxels than slices
            start, stop = index, index + 1
        block = pictures[start:stop]
        if self.slab == "mip":
            return block.max(axis=0).clip(AIR_HU, _MAX_HU)
        return block.clip(AIR_HU, _MAX_HU).mean(axis=0, dtype=np.float32)


def _slice_places(volume: CTVolume, plane: str, indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Where slices of one plane lie: `indices` along its normal in the RAS+ array, `positions` in 0..1, both (n,)."""
    normal = _PLANE_AXES[plane][0]
    centres = np.tile((np.array(volume.hu.shape) - 1) / 2, (len(indices), 1))
    centres[:, normal] = indices
    return {
        "slice_planes": np.full(len(indices), PLANES.index(plane), dtype=np.int64),
        "slice_positions": positions.astype(np.float32),
        "slice_indices": indices.astype(np.int64),
        "slice_mm": (centres @ volume.affine[normal, :3] + volume.affine[normal, 3]).astype(np.float32),
    }


@functools.cache  # once in a process
def _warn_of_published() -> None:
    logger.warning(
        "preset 'published': HU are cast to uint8, which wraps: -1000 HU becomes 24, -1 becomes 255 and 0 becomes 0, so "
        "that neighbouring tissues can look as different as air and bone."
    )
    logger.warning(
        "preset 'published': one plane, and of it only the slices within %d of the middle one: what lies further up or "
        "down isn't seen.",
        _PUBLISHED_REACH,
    )
    logger.warning(
        "preset 'published': slices lie along the file's third axis and stand as stored, without regard to orientation "
        "or spacing: the same scan stored otherwise gives other pictures, mirrored or in another plane."
    )


def _bicubic_middle(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (rows, columns) → (size, size): the shorter side is scaled to `size`, of the longer the middle is kept."""
    if Image is None:
        raise ImportError("preset='published' scales pictures with Pillow: pip install Pillow")
    rows, columns = (int(size * side / min(picture.shape)) for side in picture.shape)
    scaled = Image.fromarray(np.ascontiguousarray(picture)).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return np.asarray(scaled)[top : top + size, left : left + size]


def _fit_square(slices: torch.Tensor, row_mm: float, column_mm: float, size: int) -> torch.Tensor:
    """HU pictures (n, rows, columns) with pixels of row_mm x column_mm → (n, size, size) with square pixels.

    The longer side fills the picture; the shorter is centred (within half a pixel) in air. The sides' ratio is rounded
    to 1e-4, a fiftieth of a pixel in 224, so that two files of one scan whose spacing differs in its last digits give
    the same pixels.
    """
    rows, columns = slices.shape[1:]
    counts, sides = (rows, columns), (rows * row_mm, columns * column_mm)
    shares = [max(round(side / max(sides), 4), 1e-4) for side in sides]
    scales = [size * share / count for share, count in zip(shares, counts, strict=True)]
    # Air beyond the shorter side: its border pixels hold their due of it, and the whole number of pixels that comes out
    # moves the border a little instead of stretching the picture.
    margins = [0 if share == 1 else math.ceil(1 / scale) for share, scale in zip(shares, scales, strict=True)]
    slices = F.pad(slices, (margins[1], margins[1], margins[0], margins[0]), value=AIR_HU)
    resized = F.interpolate(
        slices[None],
        scale_factor=[scale * (1 + 1e-9) for scale in scales],  # or the longer side may come out one pixel short
        mode="bilinear",
        antialias=True,
        recompute_scale_factor=False,
    )[0]
    canvas = slices.new_full((len(slices), size, size), AIR_HU)
    places = [
        _overlap((count / 2 + margin) * scale, have, size)
        for count, margin, scale, have in zip(counts, margins, scales, resized.shape[1:], strict=True)
    ]
    (to_rows, from_rows), (to_columns, from_columns) = places
    canvas[:, to_rows, to_columns] = resized[:, from_rows, from_columns]
    return canvas


def _overlap(centre: float, have: int, size: int) -> tuple[slice, slice]:
    """Where `have` pixels go in `size`, and which of them, when their point `centre` shall come to the middle."""
    shift = math.floor(size / 2 - centre + 0.5)
    start, stop = max(shift, 0), min(shift + have, size)
    return slice(start, stop), slice(start - shift, stop - shift)


def _window(hu: torch.Tensor, low: float, high: float) -> np.ndarray:
    """HU → uint8: low and below 0, high and above 255, rounded between."""
    return ((hu - low) / (high - low) * 255).round_().clamp_(0, 255).to(torch.uint8).numpy()


def _as_list(images: Any) -> list[Any]:
    """One volume or lists of them → a flat list. Arrays and mappings are volumes, not lists."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [volume for image in images for volume in _as_list(image)]


def _checked_planes(planes: Sequence[str]) -> tuple[str, ...]:
    planes = (planes,) if isinstance(planes, str) else tuple(planes)
    if not planes or len(set(planes)) != len(planes) or not set(planes) <= set(PLANES):
        raise ValueError(f"planes={planes}; expected some of {', '.join(PLANES)}, each at most once")
    return planes


def _checked_counts(counts: int | Sequence[int], planes: int) -> int | tuple[int, ...]:
    many = (counts,) if isinstance(counts, int) else tuple(counts)
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in many):
        raise ValueError(f"slices_per_plane={counts}; expected positive whole numbers")
    if isinstance(counts, int):
        return counts
    if len(many) != planes:
        raise ValueError(f"slices_per_plane={counts} for {planes} planes; expected one number, or one for each plane")
    return many


def _checked_windows(windows: Sequence[Sequence[float]] | None) -> tuple[tuple[float, float], ...] | None:
    if windows is None:  # of the preset "published" alone
        return None
    windows = tuple(tuple(window) for window in windows)
    if not windows:
        raise ValueError("hu_windows is empty; expected (low, high) in HU for each channel")
    for window in windows:
        if len(window) != 2 or not all(math.isfinite(limit) for limit in window) or window[0] >= window[1]:
            raise ValueError(f"hu_windows has {window}; expected (low, high) in HU with low below high")
    # 150 and 150.0 are one setting: they shall be saved, and named by settings_hash, alike.
    return tuple(tuple(int(v) if float(v).is_integer() else float(v) for v in window) for window in windows)


def _checked_size(size: int | Mapping[str, int]) -> int:
    if isinstance(size, Mapping):  # the library's way to write it
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"size={dict(size)}; expected one number, or height and width that are equal")
        size = size["height"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size={size!r}; expected a positive whole number of pixels")
    return size


def _checked_channel_values(
    name: str, values: float | Sequence[float] | None, imagenet: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    if values is None:
        return imagenet if channels == len(imagenet) else (sum(imagenet) / len(imagenet),) * channels
    if isinstance(values, (int, float)):
        return (float(values),) * channels
    if len(values) != channels:
        raise ValueError(
            f"{name} has {len(values)} values for {channels} HU windows; expected one for each window, or one number"
        )
    return tuple(float(value) for value in values)
