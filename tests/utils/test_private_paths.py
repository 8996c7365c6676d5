"""Paths that a message must not show."""

from pathlib import Path

import pytest

from samf.utils.private_paths import without_paths

NAMES = {Path("/data/scans/Doe Jane.nii"): "scan 1", Path("/tmp"): "the volume", Path("/tmp/own"): "never reached"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/data/scans/Doe Jane.nii: truncated", "scan 1: truncated"),
        ("no header in '/tmp/a.b/c.dcm', nor in /tmp/own/x.", "no header in 'the volume', nor in the volume."),
        ("/tmp", "the volume"),
        ("/tmpfs and /data/scans/Doe Jane.nii.gz", "/tmpfs and scan 1"),
        ("nothing here", "nothing here"),
    ],
)
def test_paths_have_other_names(message, expected):
    assert without_paths(message, NAMES) == expected
