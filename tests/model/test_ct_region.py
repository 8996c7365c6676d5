"""Whether a volume shows a chest, on phantoms whose lungs are known, and on what has none."""

import numpy as np
import pytest

from samf.model.ct_common import NotCTError
from samf.model.ct_region import check_region, judge_region, lung_share
from samf.model.ct_volume import CTVolume
from samf.phantoms.findings import FINDING_NAMES, sample_findings
from samf.phantoms.volume import make_phantom


def volume(hu: np.ndarray, mm: float = 4.0) -> CTVolume:
    return CTVolume(np.ascontiguousarray(hu, dtype=np.int16), (mm, mm, mm), np.diag([mm, mm, mm, 1.0]), "scan")


def body(lung_radius: float, lung_hu: float = -850.0) -> np.ndarray:
    """An elliptic cylinder of water with two spheres of lung in it, in air; 4 mm."""
    x, y, z = np.meshgrid(*(np.arange(-n, n, 4.0) for n in (180, 140, 140)), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[(x / 150) ** 2 + (y / 110) ** 2 < 1] = 0
    for side in (-70, 70):
        hu[np.sqrt((x - side) ** 2 + y**2 + z**2) < lung_radius] = lung_hu
    return hu


def test_the_share_is_the_volume_of_the_spheres_without_their_shell():
    """Two spheres of 60 mm in a cylinder: what an opening by 4 mm leaves of a sphere is nearly all of it."""
    spheres = 2 * 4 / 3 * np.pi * 60**3
    tissue = np.pi * 150 * 110 * 280 - spheres
    assert lung_share(volume(body(60))) == pytest.approx(spheres / tissue, rel=0.05)


@pytest.mark.parametrize(("radius", "verdict"), [(60, "chest"), (40, "little lung"), (20, "no chest"), (0, "no chest")])
def test_verdicts(radius, verdict):
    assert judge_region(volume(body(radius)))[0] == verdict


def test_lungs_that_the_field_of_view_cuts_count_and_foam_outside_does_not():
    cut = body(60)[10:45, :, :]  # the right half of one lung is outside of the field of view
    assert judge_region(volume(cut))[0] == "chest"
    foam = body(0)
    foam[:, :12] = -930  # next to the air around the body
    assert judge_region(volume(foam))[0] == "no chest"


@pytest.mark.parametrize("seed", range(4))
def test_phantoms_with_every_finding_are_chests(seed):
    rng = np.random.default_rng(seed)
    findings = sample_findings(rng, prevalence=1.0)
    assert len(findings) == len(FINDING_NAMES)
    made = make_phantom(rng, findings=findings)
    assert judge_region(CTVolume(made.hu, made.spacing, made.affine, "phantom"))[0] == "chest"


def test_few_slices_and_small_extents_are_no_chest_and_few_voxels_are_not_judged():
    chest = body(60)
    assert judge_region(volume(chest[:, :, 30:33]))[0] == "no chest"
    assert judge_region(volume(chest[:, :, ::8], mm=4.0))[0] == "no chest"  # nine slices
    assert judge_region(volume(chest[::6, ::6, ::6], mm=24.0))[0] == "not judged"


def test_refusal_and_warning(caplog):
    with pytest.raises(NotCTError, match="^name: .*expected a chest CT"):
        check_region(volume(body(0)), "name", refuse=True)
    check_region(volume(body(0)), "name", refuse=False)
    check_region(volume(body(40)), "name", refuse=True)
    check_region(volume(body(60)), "name", refuse=True)
    assert [record.getMessage().count("may mean nothing") for record in caplog.records] == [1, 1]
