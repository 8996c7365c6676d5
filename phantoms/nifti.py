"""Phantoms as NIfTI files."""

from pathlib import Path

import nibabel as nib
from isal import igzip

from samf.phantoms.volume import Phantom
from samf.utils.files import atomic_write


def write_nifti(phantom: Phantom, path: Path, axis_codes: str = "RAS") -> nib.Nifti1Image:
    """Write a phantom to a .nii.gz file, whole or not at all.

    Equal phantoms give equal bytes: the gzip header has neither a time nor a name.

    Args:
        phantom: the phantom.
        path: the file.
        axis_codes: directions of the stored array's axes, such as "LPS" or "PIR".

    Returns:
        The image as written.
    """
    stored = nib.Nifti1Image(phantom.hu, phantom.affine)
    before = nib.orientations.io_orientation(stored.affine)
    after = nib.orientations.axcodes2ornt(axis_codes)
    stored = stored.as_reoriented(nib.orientations.ornt_transform(before, after))
    stored.header.set_xyzt_units("mm")
    stored.set_sform(stored.affine, code=1)
    stored.set_qform(stored.affine, code=1)
    atomic_write(path, igzip.compress(stored.to_bytes(), 1, mtime=0))
    return stored
