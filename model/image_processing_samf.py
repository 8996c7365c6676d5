"""Image processor: CT volume to a stack of slices in three planes, the input of SAMF's slice encoder.

Each plane is sampled evenly over the whole field of view. A slice becomes a square image of `size` x `size` pixels: the
longer side of the field of view, in mm, fills it, pixels are isotropic, and the rest is air. Each HU window is one
channel. Images have the radiological orientation: axial ones with anterior at the top, coronal and sagittal ones with
superior at the top; the patient's right at the left of the image, and anterior at the left of sagittal ones.

The preset "published" reproduces the preprocessing of the paper's published code, with its faults, for the checkpoints
that were trained on it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TensorType

from .ct_inputs import is_dataset, is_image, is_kind, is_row
from .ct_threads import run_parallel
from .ct_volume import CTVolume, to_ct_volume
from .hub_samf import PushToHubWithCard
from .published_slices import PUBLISHED_CHANNELS, extract_published
from .slice_geometry import (
    FIELDS,
    PLANE_AXES,
    PLANES,
    Box,
    FieldOfView,
    Plane,
    body_box,
    centre_indices,
    slice_coordinates,
    whole_volume,
)
from .slice_resampling import SLABS, Slab, SquareResampler, apply_windows, reduce_slabs
from .slice_settings import (
    DESCRIPTIONS,
    PRESETS,
    Preset,
    Window,
    check_choice,
    check_descriptions,
    checked_channel_values,
    checked_counts,
    checked_planes,
    checked_size,
    checked_slab,
    checked_windows,
)

__all__ = [
    "EXTRACT_VERSION",
    "FIELDS",
    "PIXEL_SETTINGS",
    "PLANES",
    "PRESETS",
    "SLABS",
    "SamfImageProcessor",
    "SliceFeatures",
    "body_box",
]

logger = logging.getLogger(__name__)

# Increased whenever `extract` gives other pixels for the same volume and settings.
EXTRACT_VERSION = 1

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_EXTRACT_SETTINGS = ("planes", "slices_per_plane", "hu_windows", "field", "slab", "size")
# Settings that change `pixel_values`, but not the output of `extract`.
PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
# Keys of saved files that transformers writes.
_LIBRARY_KEYS = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
_SLICE_KEYS = ("slice_planes", "slice_positions", "slice_indices", "slice_mm")


class SliceFeatures(BatchFeature):
    """Model inputs whose slice positions keep their precision under `.to(device, dtype)`.

    bfloat16 would round them by up to a tenth of the distance between neighbouring slices.
    """

    def to(self, *args: Any, **kwargs: Any) -> "SliceFeatures":
        """Move and cast the tensors as `torch.Tensor.to` does; `slice_positions` are moved only."""
        positions = self.data.get("slice_positions")
        super().to(*args, **kwargs)
        if isinstance(positions, torch.Tensor):
            self.data["slice_positions"] = positions.to(self.data["slice_positions"].device)
        return self


class SamfImagesKwargs(ImagesKwargs, total=False):
    """Settings that a call may override, in addition to those of transformers' image processors.

    Of the latter `size`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std` and `return_tensors` are
    supported.
    """

    planes: list[str] | tuple[str, ...]
    slices_per_plane: int | list[int] | tuple[int, ...]
    hu_windows: list | tuple
    field: str
    slab: str | list[str] | tuple[str, ...]


class SamfImageProcessor(PushToHubWithCard, BaseImageProcessor):
    """Image processor of CT volumes. Its output depends on the volume and on these settings only.

    Args:
        planes: of "axial", "coronal", "sagittal", in the order of their slices in the output.
        slices_per_plane: one number for all planes, or one for each. Slice i of n is at (i + 0.5) / n of the field of view.
            If a volume has fewer than n voxels along a plane's normal, some of its slices are repeated.
        hu_windows: (low, high) in HU for each channel: low and below becomes 0, high and above 255.
        field: field of view of the slices. "full" is the whole volume; "body" the bounding box of the body (see `body_box`),
            without the surrounding air and the table. The default is "full", because "body" gains little: an axial pixel
            of 224 shrinks from 1.44 to 1.37 mm on phantoms (median of 12), and by 0 to 5 % on six real scans, whose field
            of view had been fitted to the body. Sagittal pixels shrink by up to 18 %, or 48 % over a wide table, and
            coronal slices are closer together by the same factor.
        slab: "none" takes the slice at each position; "mean" and "mip" (maximum) reduce all voxels that are nearer to it
            than to its neighbours, so that each voxel contributes to exactly one slice. One for all channels, or one for
            each: `("mip", "mean", "mean")` shows small nodules in the lung window at full contrast, and leaves what is
            darker than its surroundings to the other two.
        size: width and height of the images in pixels.
        do_rescale: whether to multiply the grey values 0 to 255 by `rescale_factor`.
        rescale_factor: the factor.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`, after rescaling.
        image_mean: one value per channel, or one for all. Default: ImageNet's for three channels, and their average for
            any other number.
        image_std: as `image_mean`.
        preset: chooses `planes`, `hu_windows` and `do_normalize` where they are not given.

            - "triplanar": three planes.
            - "paper": the axial plane only, as for the paper's model; field of view and windows are those of "triplanar".
            - "published": the preprocessing of the paper's published code, for its checkpoints only. Slices are taken along
              the third axis of the stored array, whatever its orientation, evenly from 72 slices below the middle one to
              72 above it, with the first axis as rows. HU are cast to uint8, which wraps (-1000 becomes 24), unless
              `hu_windows` is given. The shorter side is scaled to `size` (bicubic) and the longer one cropped to its
              middle. There are three equal channels and no normalisation. `planes`, `field` and `slab` can't be chosen.
        version: version of the code that saved the settings. Settings of newer code are refused; settings of older code
            give a warning.
        kwargs: what transformers adds to saved settings, and the properties that saved files describe although they can't
            be set: `orientation`, the patient direction at each image's left, right, top and bottom edge, and
            `pixel_spacing`.

    Raises:
        ValueError: an invalid setting; the message names it and the accepted values.
        TypeError: an unknown setting.
    """

    model_input_names = ["pixel_values", "slice_mask", "slice_planes", "slice_positions"]
    valid_kwargs = SamfImagesKwargs

    def __init__(
        self,
        planes: Sequence[str] | None = None,
        slices_per_plane: int | Sequence[int] = 24,
        hu_windows: Sequence[Sequence[float]] | None = None,
        field: FieldOfView = "full",
        slab: Slab | Sequence[Slab] = "none",
        size: int | Mapping[str, int] = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        preset: Preset = "triplanar",
        version: int = EXTRACT_VERSION,
        **kwargs: Any,
    ):
        described = {key: kwargs.pop(key) for key in DESCRIPTIONS if key in kwargs}
        unknown = [key for key in kwargs if key not in _LIBRARY_KEYS and not key.startswith("_")]
        if unknown:
            known = ", ".join((*_EXTRACT_SETTINGS, *PIXEL_SETTINGS, "preset"))
            raise TypeError(f"SamfImageProcessor has no setting {', '.join(unknown)}; its settings are {known}")
        super().__init__(**kwargs)
        check_choice("preset", preset, tuple(PRESETS))
        self.preset = preset
        defaults = PRESETS[preset]
        self.planes = checked_planes(defaults["planes"] if planes is None else planes)
        self.slices_per_plane = checked_counts(slices_per_plane, len(self.planes))
        self.hu_windows = checked_windows(defaults["hu_windows"] if hu_windows is None else hu_windows)
        check_choice("field", field, FIELDS)
        self.field, self.slab = field, checked_slab(slab, self.num_channels)
        if preset == "published" and (self.planes, field, self.slab) != (defaults["planes"], "full", "none"):
            raise ValueError(f"{self.planes=}, {field=} and {slab=} can't be chosen with preset='published'")
        self.size = checked_size(size)
        self.do_rescale = bool(do_rescale)
        self.rescale_factor = rescale_factor
        self.do_normalize = bool(defaults["do_normalize"] if do_normalize is None else do_normalize)
        self.image_mean = checked_channel_values("image_mean", image_mean, _IMAGENET_MEAN, self.num_channels)
        self.image_std = checked_channel_values("image_std", image_std, _IMAGENET_STD, self.num_channels)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std}; expected positive numbers")
        _check_version(version)
        check_descriptions(described)

    @property
    def num_slices(self) -> int:
        """Return the number of slices per volume, over all planes."""
        return sum(self._counts())

    @property
    def num_channels(self) -> int:
        """Return the channels per image: one per HU window, or three equal ones without windows (preset "published")."""
        return PUBLISHED_CHANNELS if self.hu_windows is None else len(self.hu_windows)

    def settings_hash(self) -> str:
        """Return a name for the output of `extract`: equal exactly when all settings that change it are equal."""
        settings = {name: getattr(self, name) for name in _EXTRACT_SETTINGS}
        settings["slices_per_plane"] = self._counts()  # 24 and (24, 24, 24) are the same setting
        if self.field == "full":  # caches that were made before this setting existed stay valid
            del settings["field"]
        if self.preset == "published":  # the other presets are defaults of the settings above
            settings["preset"] = self.preset
        text = json.dumps({"version": EXTRACT_VERSION, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, image: Any) -> CTVolume:
        """Return a volume in any of the accepted forms (see `to_ct_volume`) as a `CTVolume`.

        A pipeline of remote code has classes of its own, and this processor reads what its own classes describe.
        """
        return to_ct_volume(image)

    def extract(self, volume: Any) -> dict[str, np.ndarray]:
        """Return the slice stack of a volume before rescaling and normalisation: the part worth caching.

        Args:
            volume: CTVolume, or anything else that `to_ct_volume` takes.

        Returns:
            slices: uint8 (S, C, size, size), the windowed images.
            slice_planes: int64 (S,), 0 axial, 1 coronal, 2 sagittal.
            slice_positions: float32 (S,), position along the plane's normal in [0, 1] (inferior to superior, posterior to
                anterior, left to right).
            slice_indices: int64 (S,), index of the slice in the RAS+ array along the plane's normal.
            slice_mm: float32 (S,), RAS coordinate of the slice's centre along the plane's normal.
        """
        volume = to_ct_volume(volume)
        if self.preset == "published" or self.hu_windows is None:
            return extract_published(volume, self.num_slices, self.size, self.hu_windows)
        box = body_box(volume) if self.field == "body" else whole_volume(volume)
        stacks = [
            self._extract_plane(volume, box, plane, count, self.hu_windows)
            for plane, count in zip(self.planes, self._counts(), strict=True)
        ]
        return {key: np.concatenate([stack[key] for stack in stacks]) for key in stacks[0]}

    def preprocess(self, images: Any, **kwargs: Unpack[SamfImagesKwargs]) -> BatchFeature:
        """Return model inputs for one volume or B volumes; stacks are padded to the largest slice count S.

        Args:
            images: one volume or a list. A volume is whatever `to_ct_volume` takes (the path of a file or DICOM folder, an
                open file, a CTVolume, an array (X, Y, Z) in HU, an image of nibabel, SimpleITK, MONAI, TorchIO or highdicom,
                a row of an undecoded column), or the output of `extract`. A list, or a column of `datasets`, is always
                several volumes: for the DICOM files or pydicom datasets of one volume, pass `read_ct(files)`.
            kwargs: settings for this call only, and `return_tensors` ("pt" by default, or "np").

        Returns:
            `pixel_values` float32 (B, S, C, size, size), `slice_mask` bool (B, S), True for slices and False for padding;
            `slice_planes`, `slice_positions`, `slice_indices` and `slice_mm` (B, S) as in `extract`, 0 for padding.

        Raises:
            CTReadError: a volume can't be read.
            TypeError: an unknown setting.
        """
        return_tensors = kwargs.pop("return_tensors", None) or TensorType.PYTORCH
        if kwargs:
            return self._with(kwargs).preprocess(images, return_tensors=return_tensors)
        volumes = list(images) if is_kind(images, "datasets", "Column") else _as_list(images)
        _refuse_single_slices(volumes)
        stacks = [self._stack(volume) for volume in volumes]
        if not stacks:
            raise ValueError("no volume given; expected one or a list of volumes")
        batch, longest = len(stacks), max(len(stack["slices"]) for stack in stacks)
        data = {
            "pixel_values": np.zeros((batch, longest, self.num_channels, self.size, self.size), dtype=np.float32),
            "slice_mask": np.zeros((batch, longest), dtype=bool),
            **{key: np.zeros((batch, longest), dtype=stacks[0][key].dtype) for key in _SLICE_KEYS},
        }
        for row, stack in enumerate(stacks):
            count = len(stack["slices"])
            pixels = data["pixel_values"][row, :count]
            pixels[...] = stack["slices"]
            self.normalize_(torch.from_numpy(pixels))
            data["slice_mask"][row, :count] = True
            for key in _SLICE_KEYS:
                data[key][row, :count] = stack[key]
        return SliceFeatures(data, tensor_type=return_tensors)

    def normalize_(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescale and normalise grey values in place, as `do_rescale` and `do_normalize` say.

        Args:
            pixels: float32 (…, C, H, W), grey values from 0 to 255, on any device.

        Returns:
            The same tensor, now as `pixel_values`.
        """
        if self.do_rescale:
            pixels.mul_(self.rescale_factor)
        if self.do_normalize:
            pixels.sub_(pixels.new_tensor(self.image_mean)[:, None, None])
            pixels.div_(pixels.new_tensor(self.image_std)[:, None, None])
        return pixels

    def to_dict(self) -> dict[str, Any]:
        """Return the settings and transformers' keys; other attributes of the object would be refused on loading."""
        known = {*_EXTRACT_SETTINGS, *PIXEL_SETTINGS, "preset", *_LIBRARY_KEYS}
        settings = {key: value for key, value in super().to_dict().items() if key in known}
        described = {key: texts.get(self.preset, texts["default"]) for key, texts in DESCRIPTIONS.items()}
        return {**settings, "version": EXTRACT_VERSION, **described}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Return paths as they are; the base class would open them as photographs."""
        return image_url_or_urls

    def _counts(self) -> tuple[int, ...]:
        counts = self.slices_per_plane
        return (counts,) * len(self.planes) if isinstance(counts, int) else counts

    def _channels_by_slab(self) -> dict[Slab, list[int]]:
        """Return the channels that share a projection, so that each is computed once."""
        slabs = (self.slab,) * self.num_channels if isinstance(self.slab, str) else self.slab
        groups: dict[Slab, list[int]] = {}
        for channel, slab in enumerate(slabs):
            groups.setdefault(slab, []).append(channel)
        return groups

    def _with(self, overrides: Mapping[str, object]) -> "SamfImageProcessor":
        """Return a copy with some settings changed; None leaves a setting as it is, as elsewhere in transformers."""
        settings = {name: getattr(self, name) for name in (*_EXTRACT_SETTINGS, *PIXEL_SETTINGS, "preset")}
        settings |= {key: value for key, value in overrides.items() if value is not None}
        return type(self)(**settings)

    def _stack(self, image: Any) -> Mapping[str, np.ndarray]:
        """Return the slice stack of a volume, or check one that `extract` gave."""
        if not isinstance(image, Mapping) or is_row(image) or is_image(image):
            return self.extract(image)
        shape, slices = (self.num_channels, self.size, self.size), image.get("slices")
        if slices is None or slices.shape[1:] != shape or slices.dtype != np.uint8:
            found = f"keys {sorted(map(str, image))[:8]}" if slices is None else f"{slices.shape} {slices.dtype}"
            raise ValueError(f"an extracted volume with {found}; expected `slices` of shape (S, {shape}), uint8")
        return image

    def _extract_plane(
        self, volume: CTVolume, box: Box, plane: Plane, count: int, windows: Sequence[Window]
    ) -> dict[str, np.ndarray]:
        normal, row_axis, column_axis = PLANE_AXES[plane]
        images = volume.hu[box].transpose(normal, row_axis, column_axis)[:, ::-1, ::-1]  # (N, rows, columns), a view
        depth, rows, columns = images.shape
        indices = centre_indices(depth, count)
        # Slabs and resizing work on HU, and windows come last: the result is what a scanner with larger voxels would have
        # measured, dense specks survive in narrow windows, and one resize serves all channels.
        spacing = (volume.spacing[row_axis], volume.spacing[column_axis])
        resampler = SquareResampler.for_spacing((rows, columns), spacing, self.size)
        slices = np.empty((count, len(windows), self.size, self.size), dtype=np.uint8)
        for slab, channels in self._channels_by_slab().items():
            canvas = resampler.canvas(count)
            reduce_slabs(images, indices, slab, out=resampler.interior(canvas))
            _fill_channels(slices, resampler.resize(canvas), windows, channels)
        positions = (np.arange(count) + 0.5) / count
        return {"slices": slices, **slice_coordinates(volume, box, plane, indices + box[normal].start, positions)}


def _fill_channels(slices: np.ndarray, hu: np.ndarray, windows: Sequence[Window], channels: Sequence[int]) -> None:
    """Write the grey values of some channels.

    Args:
        slices: uint8 (N, C, size, size), of which `channels` are written.
        hu: float32 (N, size, size).
        windows: (low, high) of all channels.
        channels: indices of the channels.
    """
    chosen = [windows[channel] for channel in channels]
    run_parallel(
        lambda i: apply_windows(hu[i], chosen, out=[slices[i, channel] for channel in channels]), range(len(hu))
    )


def _as_list(images: Any) -> list[Any]:
    """Return one volume or nested lists of them as a flat list; arrays and mappings are volumes, not lists."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [volume for image in images for volume in _as_list(image)]


def _refuse_single_slices(images: Sequence[Any]) -> None:
    """Raise ValueError for pydicom datasets of single slices: each would be taken as a volume of one slice."""
    slices = [image for image in images if is_dataset(image) and "PerFrameFunctionalGroupsSequence" not in image]
    if len(slices) > 1:
        raise ValueError(
            f"{len(slices)} pydicom datasets of one slice each; each would be a volume of its own. Pass read_ct(datasets) to "
            f"make one volume of them."
        )


def _check_version(version: int) -> None:
    """Raise ValueError for settings that newer code saved; warn about older ones."""
    if not isinstance(version, int) or version > EXTRACT_VERSION:
        raise ValueError(
            f"version={version}: these settings were saved by newer code, which extracts other pixels than this code "
            f"(version {EXTRACT_VERSION}). Update samf, or load the folder with trust_remote_code=True."
        )
    if version < EXTRACT_VERSION:
        logger.warning(
            "settings saved by version %s of the slice extraction; this is version %s, whose pixels differ slightly.",
            version,
            EXTRACT_VERSION,
        )
