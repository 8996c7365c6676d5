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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .ct_inputs import is_dataset, is_image, is_kind, is_row
from .ct_volume import AIR_HU, CTVolume, to_ct_volume
from .hub_samf import PushToHubWithCard

try:
    from PIL import Image
except ImportError:
    Image = None

try:  # for field="body"
    from scipy import ndimage
except ImportError:
    ndimage = None

logger = logging.getLogger(__name__)

PLANES = ("axial", "coronal", "sagittal")  # a plane's place here is its number in slice_planes
FIELDS = ("full", "body")
SLABS = ("none", "mean", "mip")
EXTRACT_VERSION = 1  # counts up whenever `extract` gives other pixels for the same volume and settings

# Array axes of (the plane's normal, picture rows, picture columns) in a RAS+ volume. Rows and columns then run
# backwards: Superior or Anterior is on top, the patient's Right (axial, coronal) or Anterior (sagittal) on the left.
_PLANE_AXES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
# Which way the patient lies at a picture's left, right, top and bottom: Right, Left, Anterior, Posterior, Superior, Inferior.
SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
# Below air there is only padding (-3024 or the like), above this only metal: limited, they spoil no neighbours.
_MAX_HU = 3071
_BODY_HU = -300
_BODY_GRID_MM = 4.0
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
_EXTRACT_SETTINGS = ("planes", "slices_per_plane", "hu_windows", "field", "slab", "size")
_PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
# What can't be set, by preset: saved for those who read the file.
_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "orientation": {"default": SIDES, "published": "as stored"},
    "pixel_spacing": {
        "default": "square: the longer side of the field in mm, over size",
        "published": "as stored: the shorter side over size",
    },
}
_SLICE_KEYS = ("slice_planes", "slice_positions", "slice_indices", "slice_mm")


class SliceFeatures(BatchFeature):
    """Model inputs whose slice positions stay as exact as they were under `.to(device, dtype)`.

    In bfloat16 they would be rounded by up to a tenth of the distance between neighbouring slices.
    """

    def to(self, *args: Any, **kwargs: Any) -> "SliceFeatures":
        exact = self.data.get("slice_positions")
        super().to(*args, **kwargs)
        if isinstance(exact, torch.Tensor):
            self.data["slice_positions"] = exact.to(self.data["slice_positions"].device)
        return self


class SamfImagesKwargs(ImagesKwargs, total=False):
    """Settings that a call may override: those below, and of the library's `size`, `do_rescale`, `rescale_factor`,
    `do_normalize`, `image_mean`, `image_std` and `return_tensors`."""

    planes: list[str] | tuple[str, ...]
    slices_per_plane: int | list[int] | tuple[int, ...]
    hu_windows: list | tuple
    field: str
    slab: str


class SamfImageProcessor(PushToHubWithCard, BaseImageProcessor):
    """Makes model inputs from CT volumes. The result depends on the volume and these settings alone.

    Args:
        planes: of "axial", "coronal", "sagittal", in the order in which their slices shall come.
        slices_per_plane: one number for all planes, or one for each. Slice i of n stands at (i + 0.5) / n of the field.
            A volume with fewer voxels along a plane's normal than n gives some of its slices more than once.
        hu_windows: (low, high) in HU for each channel: low and below becomes 0, high and above 255.
        field: what the slices share out and the pictures show. "full" is the whole volume; "body" the box around the body
            (see `body_box`), without the air around it and the table. "full" is the default, for "body" gains little: an
            axial pixel of 224 shrinks from 1.44 to 1.37 mm on phantoms (median of 12), and by 0 to 5 % on six real
            scans, whose field was fitted to the body already. Their sagittal ones shrink by up to 18 %, or 48 % over a
            wide table; coronal slices then lie that much closer too.
        slab: "none" takes the slice at each position; "mean" and "mip" (maximum) reduce all the voxels that are nearer
            to it than to its neighbours, so that each voxel counts in exactly one slice and nothing falls between two.
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
              side to `size`, and the middle of the longer is kept. Three equal channels, no normalisation. `planes`,
              `field` and `slab` can't be chosen then.
        version: of the code that saved the settings. Newer code's are refused, older code's warned of. Beside it, saved
            files describe what can't be set: `orientation`, the patient's side at each picture's left, right, top and
            bottom, and `pixel_spacing`.

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
        field: str = "full",
        slab: str = "none",
        size: int | Mapping[str, int] = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        preset: str = "triplanar",
        version: int = EXTRACT_VERSION,
        **kwargs,
    ):
        described = {key: kwargs.pop(key) for key in _DESCRIPTIONS if key in kwargs}
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
        for name, value, choices in (("field", field, FIELDS), ("slab", slab, SLABS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r}; expected one of {', '.join(choices)}")
        self.field, self.slab = field, slab
        if preset == "published" and (self.planes, field, slab) != (defaults["planes"], "full", "none"):
            raise ValueError(f"{self.planes=}, {field=} and {slab=} can't be chosen with preset='published'")
        self.size = _checked_size(size)
        self.do_rescale = bool(do_rescale)
        self.rescale_factor = rescale_factor
        self.do_normalize = bool(defaults["do_normalize"] if do_normalize is None else do_normalize)
        channels = self.num_channels
        self.image_mean = _checked_channel_values("image_mean", image_mean, _IMAGENET_MEAN, channels)
        self.image_std = _checked_channel_values("image_std", image_std, _IMAGENET_STD, channels)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std}; expected positive numbers")
        _check_version(version)
        for key, found in described.items():
            if found not in _DESCRIPTIONS[key].values():
                known = " or ".join(repr(text) for text in _DESCRIPTIONS[key].values())
                raise ValueError(f"{key}={found!r}; this code gives {known} alone. Leave it out: it can't be set.")

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
        if self.field == "full":  # the name of what was made before there was a choice
            del settings["field"]
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
        box = body_box(volume) if self.field == "body" else _whole(volume)
        parts = [
            self._extract_plane(volume, box, plane, count)
            for plane, count in zip(self.planes, self._counts(), strict=True)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def preprocess(self, images: Any, **kwargs: Unpack[SamfImagesKwargs]) -> BatchFeature:
        """Model inputs of one volume or a list of B volumes. S is the largest slice count; shorter stacks are padded.

        Args:
            images: each whatever `to_ct_volume` takes (a path of a file or DICOM folder, an open file, a CTVolume, an
                array (X, Y, Z) in HU, an image of nibabel, SimpleITK, MONAI, TorchIO or highdicom, a row of an undecoded
                column), or what `extract` gave. A list, or a column of `datasets`, is always several volumes: the DICOM
                files or pydicom datasets of one go through `read_ct(files)` first.
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
        images = list(images) if is_kind(images, "datasets", "Column") else _as_list(images)
        _check_slices_of_one(images)
        stacks = [self._stack(image) for image in images]
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
        return SliceFeatures(data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The settings and the library's keys: what else was set on the object, loading would refuse."""
        known = {*_EXTRACT_SETTINGS, *_PIXEL_SETTINGS, "preset", *_SERVICE_KEYS}
        settings = {key: value for key, value in super().to_dict().items() if key in known}
        return {**settings, "version": EXTRACT_VERSION, **self._descriptions()}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths stay paths: the library's method would open them as photographs."""
        return image_url_or_urls

    def _descriptions(self) -> dict[str, Any]:
        return {key: texts.get(self.preset, texts["default"]) for key, texts in _DESCRIPTIONS.items()}

    def _counts(self) -> tuple[int, ...]:
        counts = self.slices_per_plane
        return (counts,) * len(self.planes) if isinstance(counts, int) else counts

    def _with(self, overrides: Mapping[str, Any]) -> "SamfImageProcessor":
        """A copy with some settings changed. None means no change, as elsewhere in the library."""
        settings = {name: getattr(self, name) for name in (*_EXTRACT_SETTINGS, *_PIXEL_SETTINGS, "preset")}
        return type(self)(**{**settings, **{key: value for key, value in overrides.items() if value is not None}})

    def _stack(self, image: Any) -> Mapping[str, np.ndarray]:
        if not isinstance(image, Mapping) or is_row(image) or is_image(image):
            return self.extract(image)
        shape, slices = (self.num_channels, self.size, self.size), image.get("slices")
        if slices is None or slices.shape[1:] != shape or slices.dtype != np.uint8:
            found = f"keys {sorted(map(str, image))[:8]}" if slices is None else f"{slices.shape} {slices.dtype}"
            raise ValueError(f"an extracted volume with {found}; expected `slices` of shape (S, {shape}), uint8")
        return image

    def _to_float(self, slices: np.ndarray, out: np.ndarray) -> None:
        """Rescales and normalises uint8 (S, C, H, W) into `out`, float32."""
        for channel in range(slices.shape[1]):
            grey = np.arange(256, dtype=np.float32)  # what becomes of each value that a pixel can have
            if self.do_rescale:
                grey *= np.float32(self.rescale_factor)
            if self.do_normalize:
                grey -= np.float32(self.image_mean[channel])
                grey /= np.float32(self.image_std[channel])
            for picture, floats in zip(slices[:, channel], out[:, channel], strict=True):
                np.take(grey, picture, out=floats, mode="clip")  # "raise" would buffer the output

    def _extract_plane(self, volume: CTVolume, box: "Box", plane: str, count: int) -> dict[str, np.ndarray]:
        normal, row_axis, column_axis = _PLANE_AXES[plane]
        pictures = volume.hu[box].transpose(normal, row_axis, column_axis)[:, ::-1, ::-1]  # (N, rows, columns), a view
        depth = pictures.shape[0]
        indices = np.array([(2 * i + 1) * depth // (2 * count) for i in range(count)])
        # Averaging and resizing work on HU, and the windows come last: it is what a scanner with larger voxels would
        # have measured, dense specks survive in narrow windows, and one resize serves all channels.
        square = _Square.of(pictures.shape[1:], volume.spacing[row_axis], volume.spacing[column_axis], self.size)
        padded = square.canvas(count)
        _gather(pictures, indices, self.slab, out=square.inside(padded))
        hu = square.resize(padded)  # (count, size, size)
        slices = np.empty((count, self.num_channels, self.size, self.size), dtype=np.uint8)
        _in_parallel(lambda i: _window(hu[i], self.hu_windows, out=slices[i]), range(count))
        positions = (np.arange(count) + 0.5) / count
        return {"slices": slices, **_slice_places(volume, box, plane, indices + box[normal].start, positions)}

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
            pictures = np.empty((self.num_channels, *hu.shape), dtype=np.uint8)
            _window(hu.astype(np.float32), self.hu_windows, out=pictures)
            for channel, picture in enumerate(pictures):
                slices[i, channel] = _bicubic_middle(picture, self.size)
        # The places are the patient's all the same, so that a slice can be found again.
        normal, sign = volume.stored_axes[2]
        plane = next(plane for plane, axes in _PLANE_AXES.items() if axes[0] == normal)
        indices = indices if sign > 0 else depth - 1 - indices
        return {"slices": slices, **_slice_places(volume, _whole(volume), plane, indices, (indices + 0.5) / depth)}


Box = tuple[slice, slice, slice]  # a part of an (X, Y, Z) array, with whole numbers as limits


def _whole(volume: CTVolume) -> Box:
    return tuple(slice(0, count) for count in volume.hu.shape)


def body_box(volume: CTVolume) -> Box:
    """The box around the body: what `field="body"` shows. The whole volume where there is no body.

    On a grid of some 4 mm, what is denser than -300 HU is tissue. A brush of three grid points sweeps away what is thinner,
    such as the shells of a table; the largest connected part, and any other that is at least a quarter as large, such
    as a second leg, is the body.

    Raises:
        ImportError: scipy is missing.
    """
    if ndimage is None:
        raise ImportError("field='body' finds the body with scipy: pip install scipy")
    # 1e-3: two files of one scan whose spacing differs in its last digits have one grid.
    steps = [max(1, int(_BODY_GRID_MM / mm + 1e-3)) for mm in volume.spacing]
    tissue = volume.hu[tuple(slice(None, None, step) for step in steps)] > _BODY_HU
    core = ndimage.binary_erosion(tissue, border_value=1)  # a body that the field cuts goes on beyond it
    parts, _ = ndimage.label(ndimage.binary_dilation(core))
    sizes = np.bincount(parts.ravel())[1:]
    if not len(sizes):
        return _whole(volume)
    kept = np.isin(parts, 1 + np.flatnonzero(sizes * 4 >= sizes.max()))
    box = []
    for axis, step in enumerate(steps):
        places = np.flatnonzero(kept.any(axis=tuple(other for other in range(3) if other != axis)))
        # The body's border lies less than one step beyond its last grid point.
        box.append(slice(max(int(places[0] - 1) * step, 0), min(int(places[-1] + 1) * step, volume.hu.shape[axis])))
    return tuple(box)


def _gather(pictures: np.ndarray, indices: np.ndarray, slab: str, out: np.ndarray) -> None:
    """Slices of one plane, limited to what air and metal measure.

    Args:
        pictures: int16 (N, rows, columns), all the pictures along the plane's normal; a view of the volume.
        indices: (n,), each slice's picture.
        slab: "none" takes that picture; "mean" and "mip" reduce the pictures that are nearer to it than to others.
        out: float32 (n, rows, columns), written.
    """
    depth, count = len(pictures), len(indices)
    edges = np.array([-((count - 2 * i * depth) // (2 * count)) for i in range(count + 1)])  # centres within the slab
    strides = np.abs(pictures.strides)
    if slab == "none":
        _in_parallel(lambda i: np.clip(pictures[indices[i]], AIR_HU, _MAX_HU, out=out[i]), range(count))
    elif depth < count or strides[0] > min(strides):
        _in_parallel(
            lambda i: _reduce(pictures[slice(*edges[i : i + 2])], pictures[indices[i]], slab, out[i]), range(count)
        )
    else:  # the pictures' neighbours are neighbours in memory: sums along that are many times faster
        along = 1 if strides[1] > strides[2] else 2
        pictures, out = pictures.swapaxes(1, along), out.swapaxes(1, along)
        _in_parallel(lambda i: _reduce_line(pictures[:, i].T, edges, slab, out[:, i].T), range(pictures.shape[1]))


def _reduce(block: np.ndarray, nearest: np.ndarray, slab: str, out: np.ndarray) -> None:
    """The mean or maximum over the first axis of a block (n, rows, columns); `nearest` where n is 0."""
    if not len(block):  # fewer voxels than slices
        block = nearest[None]
    if slab == "mip":
        np.clip(block.max(axis=0), AIR_HU, _MAX_HU, out=out)
        return
    limited = np.empty_like(block[0])
    out[...] = 0
    for picture in block:
        out += np.clip(picture, AIR_HU, _MAX_HU, out=limited)  # whole numbers: exact in float32, in any order
    out /= np.float32(len(block))


def _reduce_line(pictures: np.ndarray, edges: np.ndarray, slab: str, out: np.ndarray) -> None:
    """The same for one line of all pictures, (width, N), in slabs from edge to edge: `out` (width, n)."""
    limited = np.clip(pictures, AIR_HU, _MAX_HU)
    if slab == "mip":
        out[...] = np.maximum.reduceat(limited, edges[:-1], axis=1)
    else:
        out[...] = np.add.reduceat(limited, edges[:-1], axis=1, dtype=np.int32)
        out /= np.diff(edges).astype(np.float32)


def _in_parallel(task: Callable[[int], Any], items: Iterable[int]) -> None:
    """Calls the task for each item on as many threads as torch uses; NumPy lets the interpreter go meanwhile."""
    threads = torch.get_num_threads()
    if threads == 1:  # a DataLoader's worker among others
        for item in items:
            task(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(task, items):
            pass  # raises what a task raised


def _slice_places(
    volume: CTVolume, box: Box, plane: str, indices: np.ndarray, positions: np.ndarray
) -> dict[str, np.ndarray]:
    """Where slices of one plane lie: `indices` along its normal in the RAS+ array, `positions` in 0..1, both (n,)."""
    normal = _PLANE_AXES[plane][0]
    centres = np.tile([(side.start + side.stop - 1) / 2 for side in box], (len(indices), 1))
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


@dataclass(frozen=True)
class _Square:
    """How pictures of rows x columns oblong pixels become size x size square ones.

    The longer side fills the picture; the shorter is centred (within half a pixel) in air. The sides' ratio is rounded
    to 1e-4, a fiftieth of a pixel in 224, so that two files of one scan whose spacing differs in its last digits give
    the same pixels.

    Attributes:
        counts: rows and columns.
        scales: what each is multiplied by.
        margins: pixels of air before and after each.
        size: of the square.
    """

    counts: tuple[int, int]
    scales: tuple[float, float]
    margins: tuple[int, int]
    size: int

    @classmethod
    def of(cls, counts: tuple[int, int], row_mm: float, column_mm: float, size: int) -> "_Square":
        sides = (counts[0] * row_mm, counts[1] * column_mm)
        shares = [max(round(side / max(sides), 4), 1e-4) for side in sides]
        scales = tuple(size * share / count for share, count in zip(shares, counts, strict=True))
        # Air beyond the shorter side: its border pixels hold their due of it, and the whole number of pixels that comes
        # out moves the border a little instead of stretching the picture.
        margins = tuple(0 if share == 1 else math.ceil(1 / scale) for share, scale in zip(shares, scales, strict=True))
        return cls(counts, scales, margins, size)

    def canvas(self, pictures: int) -> np.ndarray:
        """Room for pictures with their margins, which are air: float32 (n, rows + margins, columns + margins)."""
        (rows, columns), (above, beside) = self.counts, self.margins
        canvas = np.empty((pictures, rows + 2 * above, columns + 2 * beside), dtype=np.float32)
        canvas[:, :above] = canvas[:, above + rows :] = AIR_HU
        canvas[:, :, :beside] = canvas[:, :, beside + columns :] = AIR_HU
        return canvas

    def inside(self, canvas: np.ndarray) -> np.ndarray:
        """The pictures of a canvas: a view (n, rows, columns)."""
        (rows, columns), (above, beside) = self.counts, self.margins
        return canvas[:, above : above + rows, beside : beside + columns]

    def resize(self, canvas: np.ndarray) -> np.ndarray:
        """A canvas → the square pictures, float32 (n, size, size)."""
        resized = F.interpolate(  # all at once: starting and ending torch's threads costs more than one picture does
            torch.from_numpy(canvas)[None],
            scale_factor=[scale * (1 + 1e-9) for scale in self.scales],  # or the longer side may come out a pixel short
            mode="bilinear",
            antialias=True,
            recompute_scale_factor=False,
        )[0].numpy()
        (to_rows, from_rows), (to_columns, from_columns) = (
            _overlap((count / 2 + margin) * scale, have, self.size)
            for count, margin, scale, have in zip(
                self.counts, self.margins, self.scales, resized.shape[1:], strict=True
            )
        )
        squares = np.full((len(canvas), self.size, self.size), AIR_HU, dtype=np.float32)
        squares[:, to_rows, to_columns] = resized[:, from_rows, from_columns]
        return squares


def _overlap(centre: float, have: int, size: int) -> tuple[slice, slice]:
    """Where `have` pixels go in `size`, and which of them, when their point `centre` shall come to the middle."""
    shift = math.floor(size / 2 - centre + 0.5)
    start, stop = max(shift, 0), min(shift + have, size)
    return slice(start, stop), slice(start - shift, stop - shift)


def _window(hu: np.ndarray, windows: Sequence[tuple[float, float]], out: np.ndarray) -> None:
    """HU, float32 (H, W), → uint8 (C, H, W), written to `out`: low and below 0, high and above 255, rounded between."""
    for (low, high), grey in zip(windows, out, strict=True):
        values = hu - np.float32(low)
        values /= np.float32(high - low)
        values *= np.float32(255)
        np.rint(values, out=values)
        grey[...] = values.clip(0, 255, out=values)


def _as_list(images: Any) -> list[Any]:
    """One volume or lists of them → a flat list. Arrays and mappings are volumes, not lists."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [volume for image in images for volume in _as_list(image)]


def _check_slices_of_one(images: Sequence[Any]) -> None:
    """Refuses pydicom datasets of single slices: as volumes of their own they would be as many, of one slice each."""
    slices = [image for image in images if is_dataset(image) and "PerFrameFunctionalGroupsSequence" not in image]
    if len(slices) > 1:
        raise ValueError(
            f"{len(slices)} pydicom datasets of one slice each; here each would be a volume. Pass read_ct(datasets): one "
            f"volume of them."
        )


def _check_version(version: int) -> None:
    """Whether a saved file is of the code that reads it."""
    if not isinstance(version, int) or version > EXTRACT_VERSION:
        raise ValueError(
            f"version={version}: settings saved by newer code, whose pixels are others than those of this code "
            f"(version {EXTRACT_VERSION}). Update samf, or load the folder with trust_remote_code=True."
        )
    if version < EXTRACT_VERSION:
        logger.warning(
            "settings saved by version %s of the slice extraction; this is version %s, whose pixels differ a little.",
            version,
            EXTRACT_VERSION,
        )


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
