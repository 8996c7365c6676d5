#!/usr/bin/env bash
# SimpleITK's resampling of a CT of whole HU cuts the fraction off: lung becomes half a HU denser, bone half a HU less.
#
# Guessed: an image of 16-bit integers comes back with the nearest integers, so that errors are at most 0.5 and cancel out.
# Seen: interpolated values are cut towards zero. Below 0 HU everything rises by 0.5 HU on average, above it everything falls by
# as much, with each interpolator but the nearest neighbour; a voxel between -1000 and -999 is never -1000. DiscreteGaussian,
# which also keeps the type, cuts after each of three axes: +1.5 HU in lung. SmoothingRecursiveGaussian gives floats. A cast to
# float32 before, and rounding after it, cure it. TorchIO 1.2.1, which resamples by SimpleITK, turns voxels of -1000 and -999 in
# turn into -999 throughout (tried, not run here).
# Here: the project resamples in floating point, and scipy rounds where it writes integers (model/ct_geometry.py).
#
# Versions: SimpleITK 2.5.7, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "SimpleITK==2.5.7" "numpy==2.4.6"
cd "$folder"

cat > resample.py <<'PYTHON'
import numpy as np
import SimpleITK as sitk


def resampled(image, interpolator):
    grid = sitk.Image([15, 15, 15], sitk.sitkUInt8)
    grid.SetSpacing([1.1] * 3)
    grid.SetOrigin([0.3] * 3)
    return sitk.Resample(image, grid, sitk.Transform(), interpolator, 0, image.GetPixelID())


def smoothed(image, _):
    return sitk.DiscreteGaussian(image, 1.0)


random = np.random.default_rng(0)
for tissue, low, high in (("lung", -1000, -700), ("bone", 300, 600)):
    whole = sitk.GetImageFromArray(random.integers(low, high, (20, 20, 20)).astype(np.int16))
    for name, change, interpolator in (
        ("nearest", resampled, sitk.sitkNearestNeighbor),
        ("linear", resampled, sitk.sitkLinear),
        ("B-spline", resampled, sitk.sitkBSpline),
        ("DiscreteGaussian", smoothed, None),
    ):
        change_of = [
            sitk.GetArrayFromImage(change(image, interpolator)).astype(np.float64)
            for image in (whole, sitk.Cast(whole, sitk.sitkFloat32))
        ]
        print(f"{tissue}, {name}: int16 minus float32, mean {np.mean(change_of[0] - change_of[1]):+.1f} HU")
PYTHON
"$folder/venv/bin/python" resample.py | tee seen.txt
diff seen.txt - <<'SEEN'
lung, nearest: int16 minus float32, mean +0.0 HU
lung, linear: int16 minus float32, mean +0.5 HU
lung, B-spline: int16 minus float32, mean +0.5 HU
lung, DiscreteGaussian: int16 minus float32, mean +1.5 HU
bone, nearest: int16 minus float32, mean +0.0 HU
bone, linear: int16 minus float32, mean -0.5 HU
bone, B-spline: int16 minus float32, mean -0.5 HU
bone, DiscreteGaussian: int16 minus float32, mean -1.5 HU
SEEN
echo "as seen"
