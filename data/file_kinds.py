"""What a file is, by its suffix or its first bytes."""

from pathlib import Path

from samf.model.ct_signatures import looks_like_dicom

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip")
HEAD_BYTES = 352  # enough to recognise DICOM with and without its preamble


def has_volume_suffix(path: str) -> bool:
    """Return whether a file's name ends like a volume's in a format other than DICOM."""
    return path.lower().endswith(VOLUME_SUFFIXES)


def is_dicom_file(path: Path) -> bool:
    """Return whether `path` is a DICOM file with an image.

    Only regular files are opened, so a broken link or a pipe is False, as is a DICOMDIR index. Raises OSError for a file
    that can't be read.
    """
    if not path.is_file() or path.name.upper().startswith("DICOMDIR"):
        return False
    with path.open("rb") as stream:
        return looks_like_dicom(stream.read(HEAD_BYTES))
