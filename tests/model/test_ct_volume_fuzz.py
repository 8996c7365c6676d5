"""Damaged and invented files: `read_ct` gives a volume or a CTReadError, soon, and never takes much memory.

Two kinds of input: files of every format with bytes changed at random (real ones too, where they are at hand), read by a
process of their own, so that a crash inside a library is seen; and headers that hypothesis invents. The slow form runs
12,500 inputs.
"""

import base64
import gzip
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import FIRST, slice_dataset, slice_hu, stack_positions, write_enhanced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samf.model.ct_volume import CTReadError, CTVolume, read_ct, to_ct_volume

SECONDS = 30  # an input; most take a few milliseconds
MEMORY = 4 << 30  # bytes, of address space beyond what the process has when it starts, and of resident memory
JPEG_LS = (  # see test_dicom_volume.py
    "|JeWc01FHN5C9MX0TBTI+5iXv0RR9100{JF+g&r(wXEkk%rH`+b(K+TQk0~nNS>;ys;a7}h@ehHL`fu)NpUqKl1U_zSWHPIl2uhmwN+JBP>NM"
    "mRdz(b|5*_Ke?&X~eGt$8bV9%XQ3(HkBpd&HkWc?~|Je"
)
REAL = (
    "ct/cip_ct-64.nrrd",
    "ct/elastix_3DCT_lung_small.mha",
    "ct/totalseg_abdomen_small_3mm.nii.gz",
    "dicom/cip_ct-64_79sl/IMG0001.dcm",
    "dicom/dicom2nifti_gantrytilting/001/IM-0001-0001.dcm",
    "dicom/totalseg_abdomen_20sl_j2k",  # its first slice
    "odd/CT_small.dcm",
    "odd/functional.nii",
    "odd/niivue_complex64.nii.gz",
    "odd/niivue_low_res_7x5x3.nii.gz",
    "odd/niivue_minimal_bigendian_noxform.nii.gz",
    "orient/PRS.nii.gz",
)


# ------------------------------------------------------------------------------------------------- files with bytes changed


HU = np.random.default_rng(0).integers(-1000, 1000, (24, 20, 22)).astype(np.int16)
AFFINE = np.diag([-1.0, -1.2, 2.0, 1.0])


def nifti_seeds() -> dict[str, bytes]:
    image = nib.Nifti1Image(HU, AFFINE)
    image.header["descrip"] = b"SECRET NAME"
    second = nib.Nifti2Image(HU.astype(">f4"), AFFINE)
    return {"nii": image.to_bytes(), "nii.gz": gzip.compress(image.to_bytes()), "nii2": second.to_bytes()}


def seeds(folder: Path) -> dict[str, bytes]:
    """A small whole file of every format."""
    found, hu = nifti_seeds(), HU
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 24 20 22\nendian: little\n"
    header += "patient:=SECRET NAME\ncontent: SECRET NAME\n"
    header += "space directions: (1,0,0) (0,1.2,0) (0,0,2)\nspace origin: (0,0,0)\nencoding: {}\n\n"
    data = hu.tobytes(order="F")
    found["raw.nrrd"] = header.format("raw").encode() + data
    found["gzip.nrrd"] = header.format("gzip").encode() + gzip.compress(data)
    found["ascii.nrrd"] = header.format("ascii").encode() + " ".join(map(str, hu.ravel())).encode()
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = {}\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    )
    meta += (
        "Comment = SECRET NAME\nOffset = 0 0 0\nElementSpacing = 1 1.2 2\nDimSize = 24 20 22\nElementType = MET_SHORT\n"
    )
    meta += "ElementDataFile = LOCAL\n"
    found["raw.mha"] = meta.format("False").encode() + data
    found["zlib.mha"] = meta.format("True").encode() + zlib.compress(data)
    for name, save in (("npz", np.savez), ("packed.npz", np.savez_compressed), ("npy", None)):
        stream = io.BytesIO()
        np.save(stream, hu) if save is None else save(stream, hu=hu, affine=AFFINE)
        found[name] = stream.getvalue()
    return {**found, **dicom_seeds(folder)}


def dicom_seeds(folder: Path) -> dict[str, bytes]:
    found = {}
    write_enhanced(folder / "enhanced", stack_positions(4), [1, 2, 1, 2])
    found["enhanced.dcm"] = (folder / "enhanced").read_bytes()
    for name, syntax in (
        ("explicit.dcm", "ExplicitVRLittleEndian"),
        ("implicit.dcm", "ImplicitVRLittleEndian"),
        ("deflated.dcm", "DeflatedExplicitVRLittleEndian"),
    ):
        dataset = slice_dataset(slice_hu(FIRST), FIRST)
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        found[name] = saved(dataset)
    dataset = slice_dataset(slice_hu(FIRST), FIRST)
    dataset.compress(pydicom.uid.RLELossless)
    found["rle.dcm"] = saved(dataset)
    packed = {"JPEGLSLossless": base64.b85decode(JPEG_LS), **packed_by_gdcm(folder)}
    for name, stream in packed.items():
        dataset = slice_dataset(np.zeros((16, 16)), FIRST, PixelRepresentation=0)
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, name)
        dataset.PixelData = pydicom.encaps.encapsulate([stream])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        found[f"{name}.dcm"] = saved(dataset)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for k, position in enumerate(stack_positions(4)):
            archive.writestr(f"{k}", saved(slice_dataset(slice_hu(position), position)))
    return {**found, "zip": stream.getvalue()}


def saved(dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def packed_by_gdcm(folder: Path) -> dict[str, bytes]:
    import SimpleITK as sitk

    found = {}
    for name, compressor in (("JPEGLosslessSV1", "JPEG"), ("JPEG2000Lossless", "JPEG2000")):
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / "packed.dcm"))
        writer.Execute(sitk.GetImageFromArray((np.arange(256).reshape(1, 16, 16) * 9 % 1999).astype(np.uint16)))
        data = pydicom.dcmread(folder / "packed.dcm").PixelData
        found[name] = next(pydicom.encaps.generate_frames(data, number_of_frames=1))
    return found


def real_seeds(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in REAL:
        path = folder / name
        path = sorted(path.iterdir())[0] if path.is_dir() else path
        found[f"real {name}"] = path.read_bytes()
    return found


PACKED = ("rle.dcm", "JPEGLSLossless.dcm", "JPEGLosslessSV1.dcm", "JPEG2000Lossless.dcm", "_j2k")
ODD_NUMBERS = [
    b"\0\0",
    b"\xff\xff",
    b"\xff\x7f",
    b"\0\x80",
    b"\xff\xff\xff\x7f",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\1",
]
ODD_TEXTS = [b"0", b"-1", b"nan", b"inf", b"1e308", b"99999999999", b"65536", b"", b"(", b"\xff", b"../../x", b"\\\\"]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to eight changes, most of them near its beginning, where headers are."""
    inner = data[:2] == b"\x1f\x8b" and rng.random() < 0.7  # behind the checksum
    data = bytearray(gzip.decompress(data) if inner else data)
    for _ in range(rng.integers(1, 9)):
        if not data:
            break
        limit = len(data) if rng.random() < 0.3 else min(len(data), int(rng.choice([64, 400, 2000])))
        place = int(rng.integers(limit))
        kind = rng.integers(8)
        if kind <= 1:
            data[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            data[place] = rng.integers(256)
        elif kind == 3:
            odd = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
            data[place : place + len(odd)] = odd
        elif kind == 4:  # a number of a text
            digits = [i for i in range(place, min(place + 200, len(data))) if 48 <= data[i] < 58]
            if digits:
                data[digits[0] : digits[0] + int(rng.integers(1, 4))] = ODD_TEXTS[rng.integers(len(ODD_TEXTS))]
        elif kind == 5:
            del data[place : place + int(rng.integers(1, 40))]
        elif kind == 6:
            part = data[place : place + int(rng.integers(1, 40))]
            data[place:place] = part * int(rng.integers(1, 4))
        elif rng.random() < 0.3:
            del data[int(rng.integers(len(data))) :]
    return gzip.compress(bytes(data), 1) if inner else bytes(data)


def campaign(folder: Path, real: Path | None, start: int, count: int) -> dict:
    """Reads `count` changed files; what came of them."""
    files = list({**seeds(folder), **(real_seeds(real) if real is not None else {})}.items())
    files += 4 * [file for file in files if not file[0].endswith(PACKED)]  # unpacking starts a process each time
    outcome, kinds, failures, slowest = Counter(), Counter(), [], (0.0, "")
    for seed in range(start, start + count):
        rng = np.random.default_rng(seed)
        name, data = files[rng.integers(len(files))]
        path = folder / "input"
        path.write_bytes(mutated(data, rng))
        (folder / "current").write_text(f"seed {seed}, {name}", encoding="utf-8")
        begun = time.monotonic()
        signal.alarm(SECONDS)
        try:
            result = check(read_ct, path, allow_non_ct=bool(rng.integers(2)))
        except TimeoutError:
            failures.append(f"seed {seed}, {name}: more than {SECONDS} s")
            continue
        finally:
            signal.alarm(0)
        slowest = max(slowest, (time.monotonic() - begun, f"seed {seed}, {name}"))
        kinds[name.removeprefix("real ").rpartition(".")[2]] += 1
        outcome["read" if result is None else "refused" if result == "" else "failed"] += 1
        if result:
            failures.append(f"seed {seed}, {name}: {result}")
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "outcome": outcome,
        "kinds": kinds,
        "failures": failures,
        "slowest": slowest,
        "peak": max(peaks),
        "peaks": peaks,
    }


def check(read, *args, **options) -> str | None:
    """None where a sound volume was read, "" where it was refused, else what was wrong."""
    try:
        volume = read(*args, **options)
    except CTReadError as error:
        words = str(error)
        named = read is not read_ct or str(args[0]) in words
        if len(words) > 2000 or "SECRET" in words or not named:
            return f"an error of {len(words)} characters: {words[:300]}"
        return ""
    except Exception as error:  # noqa: BLE001  any other error is what this test is after
        return f"{type(error).__name__}: {error}"
    return sound(volume)


def sound(volume: CTVolume) -> str | None:
    if volume.hu.dtype != np.int16 or volume.hu.ndim != 3 or not np.isfinite(volume.affine).all():
        return f"{volume.hu.dtype} {volume.hu.shape} {volume.affine}"
    if not (np.diag(volume.affine)[:3] > 0).all() or not min(volume.spacing) > 0 or volume.hu.min() < -1500:
        return f"spacing {volume.spacing}, lowest {volume.hu.min()}, affine {volume.affine.tolist()}"
    return None


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("start", "count"), [(0, 300), pytest.param(1_000, 6_000, marks=pytest.mark.slow, id="six thousand")]
)
def test_changed_files_are_read_or_refused(tmp_path, request, start, count):
    real = request.getfixturevalue("test_data") if count > 300 else None
    command = [sys.executable, __file__, str(tmp_path), str(real or ""), str(start), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # for dicom_series
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=2900, env=environment)
    where = (tmp_path / "current").read_text(encoding="utf-8") if (tmp_path / "current").exists() else ""
    assert done.returncode == 0, f"{where}: {done.returncode} {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == [] and "SECRET" not in done.stderr
    assert result["peak"] < MEMORY and result["slowest"][0] < SECONDS, result
    logging.getLogger(__name__).warning("%d changed files: %s", count, result)
    assert sum(result["outcome"].values()) == count and min(result["outcome"].values()) > count / 20, result


# -------------------------------------------------------------------------------------------------- headers made from nothing


def runs(normal: int, many: int):
    return pytest.mark.parametrize("examples", [normal, pytest.param(many, marks=pytest.mark.slow)])


def each(examples: int, strategy, body) -> None:
    """Runs `body` on `examples` values of `strategy`."""
    options = settings(
        max_examples=examples,
        deadline=SECONDS * 1000,
        derandomize=examples < 200,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options(given(strategy)(body))()


def refused_or_sound(read, *args, **options) -> None:
    result = check(read, *args, **options)
    assert not result, result


@runs(150, 1500)
def test_nibabel_images_of_changed_files(tmp_path, examples):
    """nibabel reads voxels only when it is asked for them: damage shows in our hands."""
    whole = list(nifti_seeds().items())
    outcome = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(examples):
            name, data = whole[seed % len(whole)]
            path = tmp_path / ("scan.nii.gz" if name == "nii.gz" else "scan.nii")
            path.write_bytes(mutated(data, np.random.default_rng(seed)))
            try:
                image = nib.load(path)
            except Exception:  # noqa: BLE001  nibabel's own affair
                continue
            result = check(to_ct_volume, image)
            assert not result, f"seed {seed}, {name}: {result}"
            outcome["refused" if result == "" else "read"] += 1
    assert min(outcome["read"], outcome["refused"]) > examples / 20, outcome


any_float = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30]))
small = st.integers(-2, 9)
sixteen_bits = st.integers(-(1 << 15), (1 << 15) - 1)


@runs(60, 1000)
def test_nifti_headers(tmp_path, examples):
    path = tmp_path / "scan.nii"
    fields = st.fixed_dictionaries(
        {
            "dim": st.lists(st.one_of(small, sixteen_bits), min_size=8, max_size=8),
            "datatype": st.one_of(
                st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2304]), sixteen_bits
            ),
            "pixdim": st.lists(any_float, min_size=8, max_size=8),
            "vox_offset": any_float,
            "scl_slope": any_float,
            "scl_inter": any_float,
            "qform_code": sixteen_bits,
            "sform_code": sixteen_bits,
            "srow_x": st.lists(any_float, min_size=4, max_size=4),
            "srow_y": st.lists(any_float, min_size=4, max_size=4),
            "quatern_b": any_float,
            "quatern_c": any_float,
            "xyzt_units": st.integers(0, 255),
        }
    )
    kept = st.sets(st.sampled_from(["dim", "datatype", "pixdim", "vox_offset", "scl_slope", "srow_x", "quatern_b"]))

    def body(drawn):
        values, sane, packed = drawn
        header = nib.Nifti1Header()
        header.set_data_shape((6, 5, 4))
        header.set_data_dtype(np.int16)
        header.set_sform(np.diag([1, 1.5, 2, 1]), code=1)
        for name, value in values.items():
            if name not in sane:
                header[name] = value
        header["magic"] = b"n+1"
        data = header.binaryblock + bytes(4) + np.arange(400, dtype=np.int16).tobytes()
        path.write_bytes(gzip.compress(data) if packed else data)
        refused_or_sound(read_ct, path, allow_non_ct=True)

    each(examples, st.tuples(fields, kept, st.booleans()), body)


numbers = st.one_of(
    st.integers(-3, 12).map(str), any_float.map(str), st.sampled_from(["", "none", "1e400", "9" * 30, "-"])
)


@runs(60, 1000)
def test_text_headers(tmp_path, examples):
    path = tmp_path / "scan"
    vectors = st.lists(
        st.lists(numbers, min_size=2, max_size=4).map(lambda v: f"({','.join(v)})"), min_size=2, max_size=4
    )
    nrrd = st.fixed_dictionaries(
        {
            "type": st.sampled_from(["short", "float", "block", "uint8", "double", "x"]),
            "dimension": st.one_of(st.just("3"), numbers),
            "sizes": st.lists(numbers, min_size=1, max_size=5).map(" ".join),
            "encoding": st.sampled_from(["raw", "gzip", "bzip2", "ascii", "hex", ""]),
            "endian": st.sampled_from(["little", "big", ""]),
        },
        optional={
            "space": st.sampled_from(["RAS", "LPS", "scanner-xyz", "3D-right-handed-time", ""]),
            "space directions": vectors.map(" ".join),
            "space origin": vectors.map(lambda v: v[0]),
            "spacings": st.lists(numbers, max_size=4).map(" ".join),
            "byte skip": numbers,
            "line skip": numbers,
            "data file": st.one_of(
                st.sampled_from(["scan", "../scan", "/etc/passwd", "LIST", "a%03d 1 2 1"]), st.text(max_size=9)
            ),
        },
    ).map(lambda fields: "NRRD0005\n" + "".join(f"{key}: {value}\n" for key, value in fields.items()) + "\n")
    meta = st.fixed_dictionaries(
        {"NDims": st.one_of(st.just("3"), numbers), "DimSize": st.lists(numbers, min_size=1, max_size=4).map(" ".join)},
        optional={
            "ElementType": st.sampled_from(["MET_SHORT", "MET_FLOAT", "MET_UCHAR", "MET_FLOAT_ARRAY", "x"]),
            "ElementNumberOfChannels": numbers,
            "BinaryData": st.sampled_from(["True", "False"]),
            "CompressedData": st.sampled_from(["True", "False"]),
            "HeaderSize": numbers,
            "ElementSpacing": st.lists(numbers, max_size=4).map(" ".join),
            "TransformMatrix": st.lists(numbers, min_size=8, max_size=9).map(" ".join),
            "Offset": st.lists(numbers, max_size=3).map(" ".join),
            "ElementByteOrderMSB": numbers,
        },
    ).map(lambda fields: "".join(f"{key} = {value}\n" for key, value in fields.items()) + "ElementDataFile = LOCAL\n")
    voxels = st.sampled_from([bytes(600), gzip.compress(bytes(600)), zlib.compress(bytes(600)), b"1 2 3 " * 100, b""])

    def body(drawn):
        header, data = drawn
        path.write_bytes(header.encode() + data)
        refused_or_sound(read_ct, path, allow_non_ct=True)

    each(examples, st.tuples(st.one_of(nrrd, meta), voxels), body)


@runs(40, 1000)
def test_dicom_headers(tmp_path, examples):
    folder = tmp_path / "series"
    folder.mkdir()
    decimals = st.one_of(st.integers(-40, 40).map(float), st.floats(-1e6, 1e6), st.floats(allow_nan=False))
    short = st.one_of(st.integers(0, 40), st.integers(0, 65535))
    tags = st.fixed_dictionaries(
        {},
        optional={
            "Rows": short,
            "Columns": short,
            "BitsAllocated": st.one_of(st.sampled_from([8, 16, 32]), short),
            "BitsStored": st.one_of(st.integers(1, 32), short),
            "HighBit": short,
            "PixelRepresentation": st.integers(0, 2),
            "SamplesPerPixel": st.integers(0, 4),
            "NumberOfFrames": st.integers(-3, 1 << 31),
            "RescaleSlope": decimals,
            "RescaleIntercept": decimals,
            "PixelSpacing": st.lists(decimals, max_size=3),
            "SliceThickness": decimals,
            "ImagePositionPatient": st.lists(decimals, max_size=4),
            "ImageOrientationPatient": st.lists(decimals, min_size=5, max_size=6),
            "PixelPaddingRangeLimit": st.integers(0, 32767),
            "Modality": st.sampled_from(["CT", "MR", "", "SR"]),
            "ImageType": st.lists(st.sampled_from(["ORIGINAL", "LOCALIZER", "AXIAL"]), max_size=3),
            "SeriesInstanceUID": st.sampled_from(["1.2", "1.3", ""]),
            "AcquisitionNumber": st.integers(-5, 1 << 31),
            "PerFrameFunctionalGroupsSequence": st.just([]),
        },
    )

    def body(slices):
        for path in folder.iterdir():
            path.unlink()
        for k, values in enumerate(slices):
            dataset = slice_dataset(slice_hu(FIRST), stack_positions(8)[k])
            for keyword, value in values.items():
                try:
                    setattr(dataset, keyword, value)
                except (ValueError, OverflowError, TypeError):
                    continue
            try:
                data = saved(dataset)
            except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError):
                continue  # pydicom won't write it
            (folder / str(k)).write_bytes(data)
        refused_or_sound(read_ct, folder, allow_non_ct=True)
        refused_or_sound(read_ct, folder)

    each(examples, st.lists(tags, min_size=1, max_size=6), body)


@runs(100, 1000)
def test_bytes_behind_every_signature(tmp_path, examples):
    path = tmp_path / "anything"
    heads = [
        b"",
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"NRRD0004\n",
        b"NDims = 3\n",
        bytes(128) + b"DICM",
        b"\x93NUMPY\x01\x00",
    ]
    heads += [b"\x5c\x01\0\0", b"\x1c\x02\0\0", b"\0\0\x01\x5c", b"\x08\0\x05\0CS\x0a\0ISO_IR 100"]

    def body(drawn):
        path.write_bytes(b"".join(drawn))
        refused_or_sound(read_ct, path, allow_non_ct=True)

    each(examples, st.tuples(st.sampled_from(heads), st.binary(max_size=600)), body)


@runs(60, 1000)
def test_arrays_in_memory(examples):
    shapes = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(tuple)
    kinds = st.sampled_from(["i2", ">i2", "u1", "f2", "f4", ">f8", "u8", "i8", "?", "c8", "U3", "O", "M8[s]"])

    def body(drawn):
        shape, kind, seed = drawn
        raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * 12, dtype=np.uint8)
        dtype = np.dtype(kind)
        if dtype.hasobject:
            array = np.full(shape, None, dtype=object)
        else:
            array = np.frombuffer(raw.tobytes(), dtype=dtype, count=int(np.prod(shape))).reshape(shape)
        refused_or_sound(to_ct_volume, array)

    each(examples, st.tuples(shapes, kinds, st.integers(0, 99)), body)


def main() -> None:
    """What `test_changed_files_are_read_or_refused` starts: folder, folder of real files or nothing, start, count."""
    folder, real, start, count = sys.argv[1:]

    def hung(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, hung)
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = campaign(Path(folder), Path(real) if real else None, int(start), int(count))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
