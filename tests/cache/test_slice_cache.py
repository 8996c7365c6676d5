"""The slice cache gives what `extract` gives, once for each volume and setting."""

import errno
import multiprocessing
import os
import pickle

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from samf.cache import entries, slice_cache, volume_list
from samf.cache.slice_cache import SliceCache, check_entry, read_entry, volume_identity, write_entry
from samf.cache.volume_list import inspect_volumes
from samf.model import ct_download
from samf.model.ct_dicom_files import dicom_files
from samf.model.ct_volume import CTReadError, VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor


@pytest.fixture
def processor() -> SamfImageProcessor:
    return SamfImageProcessor(slices_per_plane=2, size=16)


@pytest.fixture
def scan(tmp_path):
    return save_scan(tmp_path / "scan.nii.gz", seed=0)


def save_scan(path, seed):
    hu = np.random.default_rng(seed).integers(-1000, 1000, (8, 9, 10), dtype=np.int16)
    nib.save(nib.Nifti1Image(hu, np.eye(4)), path)
    return path


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_first_and_later_reads_equal_extract(tmp_path, processor, scan):
    cache = SliceCache(tmp_path / "cache", processor)
    expected = processor.extract(read_ct(scan))
    assert not cache.has(scan)
    for _ in range(2):
        entry = cache.get(scan)
        assert set(entry) == set(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(entry[key], array)
            assert entry[key].dtype == array.dtype
    assert cache.has(scan) and len(files_in(tmp_path / "cache")) == 1


def test_arrays_are_read_only_maps_of_one_plain_safetensors_file(tmp_path, processor, scan):
    entry = SliceCache(tmp_path / "cache", processor).get(scan)
    assert isinstance(entry["slices"], np.memmap) and not entry["slices"].flags.writeable
    (path,) = files_in(tmp_path / "cache")
    np.testing.assert_array_equal(load_file(path)["slices"], entry["slices"])


def test_processor_takes_an_entry_without_copying_it_first(tmp_path, processor, scan):
    entry = SliceCache(tmp_path / "cache", processor).get(scan)
    from_cache, direct = processor(entry), processor(scan)
    assert set(from_cache) == set(direct)
    for key in direct:
        assert (from_cache[key] == direct[key]).all(), key


def test_second_read_does_not_open_the_volume(tmp_path, processor, scan, monkeypatch):
    cache = SliceCache(tmp_path / "cache", processor)
    cache.get(scan)
    monkeypatch.setattr("samf.cache.slice_cache.read_ct", lambda *_, **__: pytest.fail("the volume was read again"))
    cache.get(scan)
    cache.get(os.path.relpath(scan))  # the same file by another name of its path


def test_changed_volume_settings_and_rescale_are_other_entries(tmp_path, processor, scan):
    cache = SliceCache(tmp_path / "cache", processor)
    first = cache.get(scan)["slices"].copy()
    assert not cache.has(VolumeRef.of(scan, (1, 500)))
    rescaled = cache.get(scan, rescale=(1, 500))["slices"]
    assert cache.has(VolumeRef.of(scan, [1.0, 500.0]))  # the same rescale as in a record of a data set
    np.testing.assert_array_equal(cache.get(VolumeRef.of(scan, (1, 500)))["slices"], rescaled)
    mip = SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16, slab="mip")).get(scan)[
        "slices"
    ]
    save_scan(scan, seed=1)
    changed = cache.get(scan)["slices"]
    for other in (rescaled, mip, changed):
        assert not np.array_equal(first, other)
    assert len(files_in(tmp_path / "cache")) == 4
    # Settings that don't change the slices share the entry.
    SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16, do_normalize=False)).get(scan)
    assert len(files_in(tmp_path / "cache")) == 4


def test_folder_of_slices_is_one_volume(tmp_path, processor, test_data):
    cache = SliceCache(tmp_path / "cache", processor)
    folder = test_data / "dicom/cip_ct-64_79sl"
    np.testing.assert_array_equal(cache.get(folder)["slices"], cache.get(test_data / "ct/cip_ct-64.nrrd")["slices"])
    assert len(files_in(tmp_path / "cache")) == 2


def test_a_version_of_the_code_makes_other_entries(tmp_path, processor, scan, monkeypatch):
    before = SliceCache(tmp_path, processor).entry_path(scan)
    monkeypatch.setattr(slice_cache, "ENTRY_VERSION", slice_cache.ENTRY_VERSION + 1)
    assert SliceCache(tmp_path, processor).entry_path(scan) != before
    monkeypatch.undo()
    monkeypatch.setattr("samf.model.image_processing_samf.EXTRACT_VERSION", 99)
    assert SliceCache(tmp_path, processor).entry_path(scan) != before


def test_identity_follows_every_file_of_a_volume(tmp_path):
    """Slices in sub-folders, and the voxels next to a header that names them."""
    (tmp_path / "study/series").mkdir(parents=True)
    inner = tmp_path / "study/series/1.dcm"
    header, voxels = tmp_path / "scan.mhd", tmp_path / "scan.raw"
    nrrd = tmp_path / "scan.nhdr"
    inner.write_bytes(b"1")
    header.write_text("NDims = 3\nElementDataFile = scan.raw\n", encoding="utf-8")
    nrrd.write_text("NRRD0004\ntype: short\ndata file: scan.raw\n", encoding="utf-8")
    voxels.write_bytes(b"22")
    for volume, file, size in ((tmp_path / "study", inner, 1), (header, voxels, 2), (nrrd, voxels, 2)):
        before = volume_identity(volume)
        assert size in [row[1] for row in before[1]]
        os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1))
        assert volume_identity(volume) != before, volume


@pytest.mark.parametrize("waits", [False, True])
def test_a_list_has_the_names_of_single_volumes(tmp_path, processor, monkeypatch, waits):
    """Files, folders, pairs, detached headers and an address, looked up in this thread or, where that waits, in others."""
    names = [
        "scan.nii.gz",
        "half.hdr",
        "half.img",
        "packed.img.gz",
        "a.mhd",
        "b.nhdr",
        "c.npz",
        "folder/1.dcm",
        "v.raw",
    ]
    for size, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "a.mhd").write_bytes(b"ElementDataFile = v.raw\n")
    paths = [*(str(tmp_path / name) for name in names[:7]), str(tmp_path / "folder"), "https://host/scan.nii.gz"]
    volumes = [VolumeRef(path, rescale) for path in paths for rescale in (None, (1.0, -1024.0))]
    cache = SliceCache(tmp_path / "cache", processor, min_coverage=50)
    if waits:
        monkeypatch.setattr(volume_list, "_MOST_WAITED", -1)
    listed = inspect_volumes([*volumes, VolumeRef(str(tmp_path / "absent.nii"))], cache, paths[:1])
    assert [volume.ref for volume in listed[:-1]] == volumes
    assert [volume.key for volume in listed[:-1]] == [cache.entry_path(volume).stem for volume in volumes]
    assert len({volume.key for volume in listed[:-1]}) == len(volumes)
    assert [volume.searched for volume in listed[:3]] == [True, True, False]
    assert listed[-1].key is None and "No such file" in listed[-1].problem


def test_entry_of_an_address_is_found_without_the_network(tmp_path, processor, scan, monkeypatch):
    address, cache = "hf://datasets/owner/name@revision/scan.nii.gz", SliceCache(tmp_path / "cache", processor)
    assert not cache.has(address)

    def fetch(volume, **_):
        assert ct_download._download_folder.get() is not None  # a download wouldn't be kept
        return read_ct({address: scan}[volume.path])

    monkeypatch.setattr(slice_cache, "read_ct", fetch)
    expected = processor.extract(read_ct(scan))["slices"]
    np.testing.assert_array_equal(cache.get(address)["slices"], expected)
    monkeypatch.setattr(slice_cache, "read_ct", lambda *_, **__: pytest.fail("it was fetched again"))
    np.testing.assert_array_equal(cache.get(address)["slices"], expected)


def test_check_entry_reads_what_opening_one_does_not(tmp_path):
    path = tmp_path / "entry.safetensors"
    arrays = {"slices": np.arange(200, dtype=np.uint8), "slice_mm": np.ones(3, np.float32)}
    write_entry(path, arrays)
    assert check_entry(path) is None
    whole = path.read_bytes()
    for place in range(len(whole) - 212, len(whole), 53):  # anywhere in the arrays' 212 bytes
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert read_entry(path) is not None and "checksum" in check_entry(path)
    path.write_bytes(whole[:-1])
    assert check_entry(path)
    with pytest.raises(FileNotFoundError):
        check_entry(tmp_path / "none")


def test_an_entry_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch, caplog):
    path = tmp_path / "entry.safetensors"
    write_entry(path, {"slices": np.arange(9, dtype=np.uint8)})

    def no_open(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(entries, "open", no_open, raising=False)
    for read in (read_entry, check_entry):
        with pytest.raises(OSError, match="Stale"):
            read(path)
    assert "damaged" not in caplog.text


def test_identity_follows_links_as_reading_does(tmp_path):
    """A study whose series is a link: the slices count, once, also where a link leads back."""
    (tmp_path / "series").mkdir()
    (tmp_path / "study").mkdir()
    inner = tmp_path / "series/1.dcm"
    inner.write_bytes(bytes(128) + b"DICM")
    (tmp_path / "study/series").symlink_to(tmp_path / "series")
    (tmp_path / "study/again").symlink_to(tmp_path / "study")
    before = volume_identity(tmp_path / "study")
    assert [name for name, _, _ in before[1]] == ["series/1.dcm"]
    assert [file.relative_to(tmp_path / "study").as_posix() for file in dicom_files(tmp_path / "study")] == [
        "series/1.dcm"
    ]
    os.utime(inner, ns=(0, 1))
    assert volume_identity(tmp_path / "study") != before


def test_unreadable_volume_leaves_nothing(tmp_path, processor):
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    for name in ("bad.nii.gz", "missing.nii.gz"):
        with pytest.raises(CTReadError, match=name):
            SliceCache(tmp_path / "cache", processor).get(tmp_path / name)
    assert not (tmp_path / "cache").exists() or files_in(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["half", "empty", "header", "garbage"])
def test_damaged_entry_is_regenerated(tmp_path, processor, scan, caplog, damage):
    cache = SliceCache(tmp_path / "cache", processor)
    expected = cache.get(scan)["slices"].copy()
    (path,) = files_in(tmp_path / "cache")
    data = path.read_bytes()
    path.unlink()  # an entry may be mapped: never write into it
    path.write_bytes(
        {"half": data[: len(data) // 2], "empty": b"", "header": data[:30], "garbage": b"\xff" * 500}[damage]
    )
    np.testing.assert_array_equal(cache.get(scan)["slices"], expected)
    assert "regenerated" in caplog.text and path.read_bytes() == data


def test_failed_write_leaves_neither_entry_nor_temporary_file(tmp_path, monkeypatch):
    def no_rename(*_):
        raise OSError("disk full")

    monkeypatch.setattr("samf.cache.slice_cache.os.replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        write_entry(tmp_path / "cache" / "r.safetensors", {"slices": np.zeros(3, np.uint8)})
    assert files_in(tmp_path / "cache") == [] and read_entry(tmp_path / "cache" / "r.safetensors") is None


def _fill(job):
    cache, scans = job
    return [int(cache.get(scan)["slices"].astype(np.int64).sum()) for scan in scans]


def test_processes_share_a_cache(tmp_path, processor):
    scans = [save_scan(tmp_path / f"scan{seed}.nii.gz", seed) for seed in range(6)]
    cache = pickle.loads(pickle.dumps(SliceCache(tmp_path / "cache", processor)))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sums = pool.map(_fill, [(cache, scans), (cache, scans[::-1]), (cache, scans)], chunksize=1)
    expected = [int(processor.extract(read_ct(scan))["slices"].astype(np.int64).sum()) for scan in scans]
    assert sums == [expected, expected[::-1], expected]
    assert len(files_in(tmp_path / "cache")) == 6
