"""Small stand-ins for public data sets, in the folder layouts and with the column names of their releases."""

import csv
import shutil
from pathlib import Path

import nibabel
import numpy as np

from samf.phantoms.dicom import slice_dataset
from samf.phantoms.nifti import write_nifti
from samf.phantoms.volume import Phantom, make_phantom


def small_phantom(seed: int, voxel_mm: float = 16) -> Phantom:
    return make_phantom(np.random.default_rng(seed), voxel_mm=voxel_mm)


def write_scan(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(small_phantom(seed), path)
    return path


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def square(phantom: Phantom, at_least: int = 0) -> Phantom:
    """Return the phantom with air added to the right or the front, until its slices are squares."""
    x, y, _ = phantom.hu.shape
    side = max(x, y, at_least)
    hu = np.pad(phantom.hu, ((0, side - x), (0, side - y), (0, 0)), constant_values=-1024)
    return Phantom(hu, phantom.affine, phantom.findings)


def rad_chest_ct_array(phantom: Phantom) -> np.ndarray:
    """Return what the authors' preprocessing makes of a phantom's DICOM slices, without its resampling to 0.8 mm.

    `combine_slices` and `represent_volume_efficiently_and_transpose` of github.com/rachellea/ct-volume-preprocessing, in words:
    slices by falling position, each transposed to (columns, rows) and scaled; clipped to ±1000; axes turned around.
    """
    slices = [slice_dataset(phantom, number, "rad") for number in range(phantom.hu.shape[2])]
    slices.sort(key=lambda piece: float(piece.ImagePositionPatient[2]), reverse=True)
    planes = [piece.pixel_array.T.astype(np.float32) * piece.RescaleSlope + piece.RescaleIntercept for piece in slices]
    volume = np.stack(planes, axis=-1)  # (columns, rows, slices)
    return np.rint(np.transpose(np.clip(volume, -1000, 1000), (2, 1, 0))).astype(np.int16)


def rad_chest_ct(root: Path) -> Path:
    """Three splits; patient mrn1 has two scans, all in train. val00001 is listed in the labels and not released."""
    scans = {"trn00001": "mrn1", "trn00002": "mrn1", "val00001": "mrn2", "val00002": "mrn3", "tst00001": "mrn4"}
    truth = {
        "trn00001": {"nodule*left_upper": 1, "nodule*lung": 1},
        "trn00002": {"nodule*liver": 1, "pleural_effusion*right_lung": 1},
    }
    columns = ("nodule*left_upper", "nodule*lung", "nodule*liver", "pleural_effusion*right_lung", "cardiomegaly*heart")
    array = rad_chest_ct_array(square(small_phantom(0)))
    for name in scans:
        if name != "val00001":
            (root / "images").mkdir(parents=True, exist_ok=True)
            np.savez_compressed(root / "images" / f"{name}.npz", ct=array)
    for split, prefix in (("train", "trn"), ("valid", "val"), ("test", "tst")):
        rows = [
            {"NoteAcc_DEID": name, **{column: truth.get(name, {}).get(column, 0) for column in columns}}
            for name in scans
            if name.startswith(prefix)
        ]
        write_table(root / f"img{split}_Abnormality_and_Location_Labels.csv", rows)
    facts = [{"VolumeAcc_DEID": f"{name}.npz", "NoteAcc_DEID": name, "MRN_DEID": mrn} for name, mrn in scans.items()]
    write_table(root / "CT_Scan_Metadata_Complete_35747.csv", facts)
    write_table(root / "Summary_3630.csv", [row for row in facts if row["NoteAcc_DEID"] != "val00001"])
    return root


def merlin(root: Path) -> Path:
    from openpyxl import Workbook

    studies = [("AC1", "train"), ("AC2", "train"), ("AC3", "val"), ("AC4", "test")]
    for number, (study, _) in enumerate(studies):
        write_scan(root / "merlin_data" / f"{study}.nii.gz", number)
    book = Workbook()
    sheet = book.active
    sheet.append(["study id", "Findings", "Split", "Few Shot"])
    for study, split in studies:
        sheet.append([study, f"Liver of {study}: normal.\nIMPRESSION: normal.", split, None])
    book.save(root / "reports_final.xlsx")
    rows = [
        {"study id": study, "pleural_effusion": effusion, "hepatomegaly": 0}
        for (study, _), effusion in zip(studies, (1, -1, 0, 1), strict=True)
    ]
    write_table(root / "zero_shot_findings_disease_cls.csv", rows)
    return root


def inspect(root: Path) -> Path:
    """The 2025 release: five tables, tab-separated, one study listed twice."""
    rows = [("10", "p1", "PE1a", "train"), ("11", "p1", "PE2b", "train"), ("12", "p2", "PE3c", "valid")]
    for number, (_, _, image, _) in enumerate(rows):
        write_scan(root / "CTPA" / f"{image}.nii.gz", number)

    def table(name: str, own: list[dict]) -> None:
        write_table(root / f"{name}_20250611.tsv", own, "\t")

    table("impressions", [{"impression_id": i, "impressions": f"1. No embolism in {i}."} for i, *_ in rows])
    table("study_mapping", [{"impression_id": i, "person_id": p, "image_id": v} for i, p, v, _ in rows])
    splits = [{"impression_id": i, "person_id": p, "split": s} for i, p, _, s in rows]
    table("splits", [*splits, splits[0]])
    labels = [("10", "True", "False"), ("11", "False", "Censored"), ("12", "False", "True")]
    table(
        "labels",
        [
            {"impression_id": i, "pe_positive_nlp": pe, "12_month_mortality": dead, "tte_mortality": 12.5}
            for i, pe, dead in labels
        ],
    )
    return root


def abdomen_atlas(root: Path) -> Path:
    names = ["BDMAP_00000001", "BDMAP_00000002", "BDMAP_00000003"]
    for number, name in enumerate(names):
        write_scan(root / "image_only" / name / "ct.nii.gz", number)
    rows = [
        {
            "BDMAP ID": name,
            "sex": "F",
            "structured report": f"FINDINGS: {name}",
            "narrative report": f"The liver of {name} is normal.",
            "number of liver lesion instances": lesions,
        }
        for name, lesions in zip(names, ("0", "3", ""), strict=True)
    ]
    write_table(root / "AbdomenAtlas3.0MiniWithMeta.csv", rows)
    write_table(root / "TrainTestIDS" / "IID_train.csv", [{"BDMAP ID": name} for name in names[:2]])
    write_table(root / "TrainTestIDS" / "IID_test.csv", [{"BDMAP ID": names[2]}])
    return root


def write_dicom(folder: Path, phantom: Phantom, name: str, **tags) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(phantom.hu.shape[2]):
        slice_dataset(phantom, number, name, **tags).save_as(folder / f"1-{number:03d}.dcm", enforce_file_format=True)
    return folder


def lidc_idri(root: Path) -> Path:
    """Two patients; the first has a radiograph as a study of its own, and a CT of fewer images in the same study."""
    phantom = small_phantom(0)
    for number in (1, 2):
        name = f"LIDC-IDRI-{number:04d}"
        tags = {"PatientID": name, "StudyInstanceUID": f"1.2.{number}", "SeriesInstanceUID": f"1.2.{number}.1"}
        folder = write_dicom(root / name / "01-01-2000-NA-NA-30178" / "3000566-NA-03192", phantom, name, **tags)
        (folder / "069.xml").write_text("<LidcReadMessage/>", encoding="utf-8")
    radiograph = Phantom(phantom.hu[:, :, :1], phantom.affine, {})
    tags = {
        "PatientID": "LIDC-IDRI-0001",
        "Modality": "DX",
        "StudyInstanceUID": "1.2.9",
        "SeriesInstanceUID": "1.2.9.1",
    }
    write_dicom(root / "LIDC-IDRI-0001" / "01-01-2000-NA-NA-35511" / "3000923-NA-62357", radiograph, "dx", **tags)
    part = Phantom(phantom.hu[:, :, :11], phantom.affine, {})
    tags = {"PatientID": "LIDC-IDRI-0001", "StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.2.1.2"}
    write_dicom(root / "LIDC-IDRI-0001" / "01-01-2000-NA-NA-30178" / "5-part", part, "part", **tags)
    return root


NLST_SERIES = {  # folder: (coded description, images)
    "OPLSEVZOOMT20s": ("0,OPL,GE,LSPLUS,na,500,na,120,10,na,na", 1),
    "OPAGELUNG1.25": ("0,OPA,GE,LSPLUS,LUNG,360,1.25,120,80,0.1,1.5", 16),
    "OPAGESTANDARD2.5": ("0,OPA,GE,LSPLUS,STANDARD,360,2.5,120,80,0.1,1.5", 14),
    "OPAGESTANDARD5": ("0,OPA,GE,LSPLUS,STANDARD,360,5,120,80,0.1,1.5", 12),
}
NLST_BEST = "OPAGESTANDARD2.5"  # thin, and of a soft-tissue kernel


def nlst(root: Path, with_metadata: bool = False) -> Path:
    """One participant with two years, each with a localizer and three reconstructions."""
    phantom, listed = small_phantom(0), []
    for year in (1999, 2000):
        for number, (name, (description, images)) in enumerate(NLST_SERIES.items()):
            part = Phantom(phantom.hu[:, :, :images], phantom.affine, {})
            uid = f"1.3.{year}.{number}"
            tags = {
                "PatientID": "100002",
                "StudyInstanceUID": f"1.3.{year}",
                "SeriesInstanceUID": uid,
                "SeriesDescription": description,
                "SliceThickness": None,
            }
            folder = write_dicom(root / "100002" / f"01-02-{year}-NLST-LSS-16408" / name, part, uid, **tags)
            listed.append(
                {
                    "Series UID": uid,
                    "Collection": "NLST",
                    "Subject ID": "100002",
                    "Study UID": f"1.3.{year}",
                    "Series Description": description,
                    "Modality": "CT",
                    "Number of Images": images,
                    "File Location": ".\\" + str(folder.relative_to(root)).replace("/", "\\"),
                }
            )
    if with_metadata:
        write_table(root / "metadata.csv", listed)
    return root


def copy_scan(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))


def recompress(source: Path, target: Path) -> Path:
    """Write the same voxels as another file."""
    image = nibabel.load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine), target.with_suffix(""))
    return target.with_suffix("")
