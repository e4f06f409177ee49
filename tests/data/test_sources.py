"""Every collection in every layout that data sets really come in: what is found, what is refused, who may not be split."""
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from covidsev.data import sources as datasources
from covidsev.core import (ChecksumError, ConfigError, DataMissingError, GeometryError, IntensityError,
                             LeakageError, MaskError, ReadError)
from covidsev.core import data_root as real_root
from covidsev.data.sources import (SOURCES, Remote, Sample, check_data, convert_lungs, describe_source, get_data,
                                  get_source, has_finding, join_groups, load_masks, medseg_labels, parse_value,
                                  read_figure, read_ictcf_table, read_rows, scan_name, scan_patient, separate_groups,
                                  sides_note, spine_at_bottom, split_by_group, stack_masks)
from covidsev.severity.lungs import split_lungs

SIDE = 32
LAS = np.diag([-1.0, 1.0, 2.0, 1.0])  # the first axis runs towards the patient's left


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = LAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def picture(path: Path, array: np.ndarray | None = None, mode: str = "L", kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((SIDE, SIDE), 90, np.uint8) if array is None else array
    Image.fromarray(array).convert(mode).save(path, format=kind)
    return path


def hu(slices: int = 2) -> np.ndarray:
    volume = np.full((SIDE, SIDE, slices), -1000, np.int16)
    volume[4:28, 4:28] = 40
    return volume


def two_lungs(slices: int = 2, first: int = 1, second: int = 2) -> np.ndarray:
    """In the order of a file with axes LAS: low indices are the patient's right."""
    lungs = np.zeros((SIDE, SIDE, slices), np.uint8)
    lungs[6:13, 8:24], lungs[18:26, 8:24] = first, second
    return lungs


def real(name: str) -> Path:
    root = real_root()
    if root is None or not (root / name).is_dir():
        pytest.skip(f"needs the real data: {name} in COVIDSEV_DATA")
    return root / name


# the 20-case set

def twenty_cases(root: Path, kaggle: bool = False) -> Path:
    """Two scans in the authors' folders, or in those of the re-pack; lungs 1 left, 2 right, infection in the right lung."""
    lungs = two_lungs(first=2, second=1)
    infection = np.zeros_like(lungs)
    infection[6:9, 8:12, 0] = 1
    joint = np.where(infection > 0, 3, lungs).astype(np.uint8)
    grey = (two_lungs() * 100).astype(np.uint8)
    images = {"coronacases_001": hu(), "radiopaedia_10_85902_1": grey}
    names = {"coronacases_001": "coronacases_org_001.nii",
             "radiopaedia_10_85902_1": "radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm.nii"}
    folders = (["ct_scans", "lung_mask", "infection_mask", "lung_and_infection_mask"] if kaggle
               else ["COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask"])
    for scan, image in images.items():
        nifti(root / folders[0] / (names[scan] if kaggle else f"{scan}.nii.gz"), image)
        for folder, mask in zip(folders[1:], (lungs, infection, joint), strict=True):
            nifti(root / folder / (f"{scan}.nii" if kaggle else f"{scan}.nii.gz"), mask)
    return root


@pytest.mark.parametrize("kaggle", [False, True])
def test_twenty_cases_in_both_namings(tmp_path, kaggle):
    samples = list(get_source("covid19-ct-seg").find(twenty_cases(tmp_path, kaggle)))
    assert [sample.case_id for sample in samples] == ["coronacases_001", "radiopaedia_10_85902_1"]
    assert [sample.source_group for sample in samples] == ["coronacases:001", "radiopaedia:10"]
    first, second = map(load_masks, samples)
    assert (first.unit, second.unit) == ("HU", "grey") and any("windowed" in note for note in second.notes)
    # 2 in the file is the right lung; here right is 1 and lies at larger X
    assert np.mean(np.nonzero(first.lungs == 1)[0]) > np.mean(np.nonzero(first.lungs == 2)[0])
    assert (first.lungs[first.infection] == 1).all() and first.infection.sum() == 12
    assert sides_note(first.lungs) == () and first.spacing_mm == (1.0, 1.0, 2.0)
    assert get_source("covid19-ct-seg").check(tmp_path).ok


def test_a_zip_unpacked_twice_is_found(tmp_path):
    root = twenty_cases(tmp_path / "a")
    inner = tmp_path / "b" / "Lung_Mask" / "Lung_Mask"
    (tmp_path / "b").mkdir()
    (root / "COVID-19-CT-Seg_20cases").rename(tmp_path / "b" / "COVID-19-CT-Seg_20cases")
    inner.parent.mkdir()
    (root / "Lung_Mask").rename(inner)
    (tmp_path / "b" / "__MACOSX").mkdir()
    samples = list(get_source("covid19-ct-seg").find(tmp_path / "b"))
    assert all(set(sample.masks) == {"lungs"} for sample in samples) and len(samples) == 2


def test_the_joint_mask_alone_does_not_tell_the_sides(tmp_path):
    root = twenty_cases(tmp_path)
    for name in ("Lung_Mask", "Infection_Mask"):
        (root / name).rename(tmp_path / f"away {name}")
    masks = load_masks(next(get_source("covid19-ct-seg").find(root)))
    assert masks.lungs.dtype == bool and masks.lungs[masks.infection].all() and masks.infection.sum() == 12
    split = load_masks(next(get_source("covid19-ct-seg").find(root)), split_lungs)
    assert set(np.unique(split.lungs)) == {0, 1, 2} and split.notes[-1].startswith("sides: told by")


def test_masks_of_another_shape_or_with_other_values_are_faults(tmp_path):
    root = twenty_cases(tmp_path)
    nifti(root / "Lung_Mask" / "coronacases_001.nii.gz", two_lungs(slices=3))
    nifti(root / "Lung_Mask" / "radiopaedia_10_85902_1.nii.gz", two_lungs(first=5))
    nifti(root / "Infection_Mask" / "coronacases_009.nii.gz", two_lungs())
    faults = "\n".join(get_source("covid19-ct-seg").check(root).faults)
    for words in ("does not have the shape of its scan", "label map", "infection mask without its scan"):
        assert words in faults
    with pytest.raises(MaskError, match="without its scan"):
        list(get_source("covid19-ct-seg").find(root))


def test_a_mask_with_another_affine_keeps_its_voxels_and_says_so(tmp_path):
    root = twenty_cases(tmp_path)
    lungs = two_lungs(first=2, second=1)
    nifti(root / "Lung_Mask" / "coronacases_001.nii.gz", lungs, np.diag([1.0, 1.0, 2.0, 1.0]))
    masks = load_masks(next(get_source("covid19-ct-seg").find(root)))
    assert any("affine" in note for note in masks.notes) and (masks.lungs[masks.infection] == 1).all()


@pytest.mark.parametrize("name, scan", [
    ("coronacases_org_010.nii", "coronacases_010"), ("radiopaedia_29_86491_1.nii.gz", "radiopaedia_29_86491_1"),
    ("radiopaedia_org_covid-19-pneumonia-7_85703_0-dcm.nii", "radiopaedia_7_85703_0")])
def test_scan_names(name, scan):
    assert scan_name(name) == scan_name(scan) == scan


def test_the_two_scans_of_number_10_are_one_patient():
    assert scan_patient("radiopaedia_10_85902_1") == scan_patient("radiopaedia_10_85902_3") == "radiopaedia:10"
    assert scan_patient("coronacases_010") == "coronacases:010"
    with pytest.raises(ConfigError):
        scan_patient("study_0255")


# the PNG slices

def slices_pack(root: Path) -> Path:
    rows, cases = ["file,case_inferred,index_in_case"], ["case_inferred,orientation,contiguous"]
    body = np.full((SIDE, SIDE), 60, np.uint8)
    body[20:30, 13:19] = 250  # the spine, at the bottom
    lungs = np.zeros((SIDE, SIDE), np.uint8)
    lungs[6:28, 3:12] = lungs[6:28, 20:29] = 255
    infection = np.zeros_like(lungs)
    infection[6:8, 3:6] = 255
    for scan, down, start in (("coronacases_002", 0, 0), ("radiopaedia_7_85703_0", 1, 3)):
        cases.append(f"{scan},{'anterior down' if down else 'anterior up'},1")
        for k in range(3):
            rows.append(f"{start + k:04d}.png,{scan},{k}")
            for folder, array in (("ct", body), ("lungs", lungs), ("covid", infection * (k == 0))):
                picture(root / folder / f"{start + k:04d}.png", array[::-1] if down else array)
    (root / "slices.csv").write_text("\n".join(rows))
    (root / "cases.csv").write_text("\n".join(cases))
    return root


def test_png_slices_are_turned_upright_and_never_mirrored(tmp_path):
    samples = list(get_source("covid19-ct-seg-slices").find(slices_pack(tmp_path)))
    loaded = [load_masks(sample, split_lungs) for sample in samples]
    for masks in loaded:
        assert spine_at_bottom(masks.image, masks.lungs)
        assert (masks.lungs[:, 3:12].max(), masks.lungs[:, 20:29].max()) == (1, 2)  # the patient's right is at the viewer's left
    assert np.argwhere(loaded[3].infection)[0].tolist() == np.argwhere(loaded[0].infection)[0].tolist() == [6, 3]
    assert get_source("covid19-ct-seg-slices").check(tmp_path).ok


def test_slabs_have_the_top_at_the_end(tmp_path):
    samples = list(get_source("covid19-ct-seg-slices").find(slices_pack(tmp_path)))
    bottom_first, top_first = (stack_masks(samples[k:k + 3], split_lungs) for k in (0, 3))
    assert bottom_first.lungs.shape == (SIDE, SIDE, 3) and sides_note(bottom_first.lungs) == ()
    assert bottom_first.infection.any(axis=(0, 1)).tolist() == [True, False, False]
    assert top_first.infection.any(axis=(0, 1)).tolist() == [False, False, True]
    for wrong in (samples[:4], samples[:3:2], [replace(samples[0], labels={**samples[0].labels, "contiguous": False})]):
        with pytest.raises(ConfigError, match="not neighbouring"):
            stack_masks(wrong)


def test_pictures_that_are_upside_down_are_found(tmp_path):
    root = slices_pack(tmp_path)
    text = (root / "cases.csv").read_text()
    (root / "cases.csv").write_text(text.replace("anterior down", "anterior up"))
    report = get_source("covid19-ct-seg-slices").check(root)
    assert report.faults == ["the pictures of a scan are upside down: 1 (radiopaedia_7_85703_0)"]


def test_a_file_that_is_not_the_one_in_the_manifest_is_a_fault(tmp_path):
    root = slices_pack(tmp_path)
    good = sha256((root / "lungs" / "0000.png").read_bytes()).hexdigest()
    (root / "MANIFEST.csv").write_text(f"path,sha256,bytes\nlungs/0000.png,{good},1\nlungs/0001.png,{'0' * 64},1\nlungs/9.png,{good},1\n")
    report = get_source("covid19-ct-seg-slices").check(root)
    assert report.faults == ["a file is missing or is not the one in MANIFEST.csv: 2 (lungs/0001.png, lungs/9.png)"]


# MosMed

def mosmed(root: Path, registry: str | None = None) -> Path:
    top = root / "COVID19_1110"
    for study, name in ((1, "CT-0"), (255, "CT-1"), (1109, "CT-4")):
        nifti(top / "studies" / name / f"study_{study:04d}.nii.gz", hu())
    nifti(top / "masks" / "study_0255_mask.nii.gz", (two_lungs() == 1).astype(np.int16))
    text = registry if registry is not None else (
        "\ufeffstudy_id,category,study_file,mask_file\r\n1,CT-0,/studies/CT-0/study_0001.nii.gz,\r\n"
        "255,CT-1,/studies/CT-1/study_0255.nii.gz,/masks/study_0255_mask.nii.gz\r\n1109,CT-4,/studies/CT-4/study_1109.nii.gz,\r\n")
    if text:
        (top / "dataset_registry.csv").write_bytes(text.encode())
    return root


@pytest.mark.parametrize("registry", [None, ""])
def test_mosmed_classes_come_from_the_registry_or_the_folders(tmp_path, registry):
    samples = list(get_source("mosmed").find(mosmed(tmp_path, registry)))
    assert [(sample.case_id, sample.labels["severity"]) for sample in samples] == [
        ("study_0001", "CT-0"), ("study_0255", "CT-1"), ("study_1109", "CT-4")]
    masks = load_masks(samples[1])
    assert masks.unit == "HU" and masks.infection.sum() == 7 * 16 * 2 and masks.lungs is None
    assert load_masks(samples[0]).infection is None


@pytest.mark.parametrize("row, error, words", [
    ("9,CT-1,/../../secret.nii.gz,", ConfigError, "leads out of its data set"),
    ("9,CT-5,/a.nii.gz,", ConfigError, r"(?s)row 2 of the registry.*dataset_registry.csv.*9, CT-5.*CT-0, CT-1"),
    ("9,CT-1,/a,\n9,CT-1,/a,", ConfigError, "(?s)row 3 of the registry.*each study once"),
    ("255,CT-2,/a,", ConfigError, "two classes")])
def test_mosmed_registries_that_are_refused(tmp_path, row, error, words):
    root = mosmed(tmp_path, f"study_id,category,study_file,mask_file\n{row}\n")
    with pytest.raises(error, match=words):
        list(get_source("mosmed").find(root))


# MedSeg

def medseg(root: Path, suffix: str = ".nii.gz") -> Path:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (SIDE, SIDE, 5)).astype(np.float32)
    nifti(root / f"tr_im{suffix}", rng.normal(-500, 300, (SIDE, SIDE, 5)).astype(np.float32))
    nifti(root / f"tr_mask{suffix}", mask)
    nifti(root / f"tr_lungmasks_updated{suffix}", np.full((SIDE, SIDE, 5), 2, np.uint8))
    return root


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_medseg_slices_are_transposed_and_have_no_effusion(tmp_path, suffix):
    samples = list(get_source("medseg").find(medseg(tmp_path, suffix)))
    stored = nibabel.load(tmp_path / f"tr_mask{suffix}").get_fdata()
    masks = load_masks(samples[4])
    assert len(samples) == 5 and samples[4].source_group == "medseg1:A" == samples[4].groups[-1]
    assert np.array_equal(masks.labels, np.where(stored[:, :, 4] == 3, 0, stored[:, :, 4]).T)
    assert masks.unit == "pseudo-HU" and masks.lungs.dtype == bool and masks.spacing_mm is None
    merged = datasources.MedSegSlices(effusion=True).load(samples[4])
    assert merged.infection.sum() == (stored[:, :, 4] > 0).sum() > masks.infection.sum()
    assert (merged.labels == masks.labels).all()


def test_medseg_with_a_slice_map_is_grouped_by_patient_and_still_joined_to_semiseg(tmp_path):
    root = medseg(tmp_path)
    (root / "slice_map.csv").write_text("slice;patient\n0;p1\n1;p1\n2;p2\n3;p2\n4;p3\n")
    samples = list(get_source("medseg").find(root))
    assert [sample.patient for sample in samples] == ["p1", "p1", "p2", "p2", "p3"]
    semiseg = Sample("covid-semiseg", "train/0", "medseg1:0")
    component = join_groups([*samples, semiseg])
    assert component["medseg1:0"] == component["medseg1:patient-p1"] != component["medseg1:patient-p2"]
    (root / "slice_map.csv").write_text("slice;patient\n0;p1\n0;p2\n")
    with pytest.raises(ConfigError, match="(?s)row 3 of the slice map.*slice_map.csv.*each slice once"):
        list(get_source("medseg").find(root))


@pytest.mark.parametrize("values", [[0, 4], [0, 0.5], [-1, 0]])
def test_medseg_values_that_are_no_labels(values):
    with pytest.raises(MaskError, match="unexpected values"):
        medseg_labels(np.array(values))


def medseg_volumes(root: Path, sizes: tuple[int, ...]) -> Path:
    for number, slices in enumerate(sizes, 1):
        nifti(root / "rp_im" / f"{number}.nii.gz", hu(slices))
        nifti(root / "rp_msk" / f"{number}.nii.gz", two_lungs(slices).astype(np.float32))
    return root


def test_medseg_volumes_may_be_scans_of_the_twenty_cases(tmp_path):
    samples = list(get_source("medseg-volumes").find(medseg_volumes(tmp_path, (39, 66, 7))))
    assert [sample.also for sample in samples] == [("radiopaedia:10", "radiopaedia:4"), ("radiopaedia:27",), ("radiopaedia:*",)]
    assert load_masks(samples[1]).labels.max() == 2
    case = Sample("covid19-ct-seg", "radiopaedia_27_86410_0", "radiopaedia:27")
    with pytest.raises(LeakageError, match="radiopaedia:27"):
        separate_groups(samples[1:2], [case])
    (tmp_path / "rp_msk" / "2.nii.gz").unlink()
    with pytest.raises(MaskError, match="without mask"):
        list(get_source("medseg-volumes").find(tmp_path))


def test_medseg_arrays_channels_are_not_labels(tmp_path):
    hot = np.zeros((3, SIDE, SIDE, 4), np.uint8)
    hot[..., 3] = 1
    for channel, columns in ((0, slice(0, 4)), (1, slice(4, 6)), (2, slice(6, 16))):
        hot[:, :, columns] = np.eye(4, dtype=np.uint8)[channel]
    np.save(tmp_path / "images_medseg.npy", np.zeros((3, SIDE, SIDE, 1), np.float32))
    np.save(tmp_path / "masks_medseg.npy", hot)
    samples = list(get_source("medseg-npy").find(tmp_path))
    masks = load_masks(samples[1])
    assert [(masks.labels == value).sum() // SIDE for value in (1, 2)] == [4, 2] and masks.lungs.sum() == 16 * SIDE
    assert masks.image.shape == (SIDE, SIDE)
    np.save(tmp_path / "masks_medseg.npy", hot * 0)
    with pytest.raises(MaskError, match="one of four"):
        load_masks(samples[1])
    np.save(tmp_path / "masks_medseg.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ReadError, match="not an array"):
        list(get_source("medseg-npy").find(tmp_path))


# iCTCF

TABLE = ("\ufeffPatient;Hospital;CT;Morbidity;Mortality\nPatient 1;Union;Positive;Severe;Cured\nPatient 2;Union;Positive;Regular;Unknown\n"
         "Patient 12;Liyuan;;Suspected;Unknown\n")


@pytest.mark.parametrize("layout", ["{p}/CT/{s}", "{p}/{s}", "{p}/P2/2020/../{s}"])
def test_ictcf_folders_in_all_variants(tmp_path, layout):
    for patient in (2, 12, 1):
        for stem in ("IMG-0001-0099", "IMG-0001-00100", "IMG-0001-00007"):
            picture(tmp_path / layout.format(p=f"Patient {patient}", s=f"{stem}.jpg"), mode="RGB")
    (tmp_path / "patients.csv").write_text(TABLE, encoding="utf-8")
    samples = list(get_source("ictcf").find(tmp_path))
    assert [(sample.case_id, sample.labels["severity"]) for sample in samples] == [("1", "severe"), ("2", "regular"), ("12", None)]
    assert [path.stem[-5:] for path in samples[0].images] == ["00007", "-0099", "00100"]
    image = load_masks(samples[0]).image
    assert image.shape == (SIDE, SIDE, 3) and load_masks(samples[0]).spacing_mm is None


def test_ictcf_flat_files_and_slices_without_a_patient(tmp_path):
    for name in ("Patient 3_1", "Patient 3_10", "Patient 3_2", "Patient 21_5"):
        picture(tmp_path / f"{name}.jpg")
    for folder in ("nCT", "pCT", "NiCT"):
        picture(tmp_path / folder / f"{folder}1.jpg")
    samples = list(get_source("ictcf").find(tmp_path))
    assert [len(sample.images) for sample in samples] == [3, 1, 1, 1, 1]
    assert [path.stem for path in samples[0].images] == ["Patient 3_1", "Patient 3_2", "Patient 3_10"]
    report = get_source("ictcf").check(tmp_path)
    assert report.ok and any("cannot be split by patient" in notice for notice in report.notices)
    with pytest.raises(LeakageError, match="cannot be split"):
        split_by_group(samples)


def test_a_patient_who_is_not_in_the_table_is_named(tmp_path):
    picture(tmp_path / "Patient 99" / "1.jpg")
    (tmp_path / "patients.csv").write_text(TABLE, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        list(get_source("ictcf").find(tmp_path))
    assert "Patient 99" in str(caught.value) and "patients.csv" in str(caught.value)


def test_the_site_text_has_no_header(tmp_path):
    lines = ["Patient 1\t40\tMale\tPositive\tPositive\t40\tCured\tRegular\tUnion", "Patient 2\t50\tFemale\t\t\t40to60\tDeceased\tCritically ill\tUnion"]
    (tmp_path / "patient.txt").write_text("\n".join(lines))
    table = read_ictcf_table(tmp_path / "patient.txt")
    assert (table[1].severity, table[2].severity, table[2].mortality, table[1].ct) == ("regular", "critical", "deceased", "positive")


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters='",;\t\r\n'), min_size=1, max_size=12))
def test_an_unknown_class_is_never_a_severity(tmp_path_factory, word):
    path = tmp_path_factory.mktemp("table") / "patients.csv"
    path.write_text(f"patient,morbidity,x\nPatient 1,{word},\n", newline="")
    first = (word.casefold().split() or [""])[0]
    if first == "" or first in ("mild", "regular", "severe", "critically", "critical", "control", "suspected"):
        return
    with pytest.raises(ConfigError, match="row 2"):
        read_ictcf_table(path)


def test_every_bad_row_of_a_table_of_labels_is_listed_with_its_number(tmp_path):
    """Semicolons, a byte order mark, and four rows that cannot be used: nobody of them is taken for mild."""
    path = tmp_path / "patients.csv"
    rows = ["Patient;Morbidity", "Patient 1;Mild", "Patient 2;Mildly severe?", ";Severe", "Patient 1;Severe", "Patient 4;Regular",
            "Patient 5;moderate"]
    path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8", newline="")
    with pytest.raises(ConfigError) as caught:
        read_ictcf_table(path)
    text = str(caught.value)
    for words in ("4 rows of the table of patients cannot be used", "file: ", "patients.csv", "row 3: unknown class",
                  "row 4: no patient", "row 5: patient 1 is already in row 2", "row 7: unknown class 'moderate'",
                  "expected: each patient once", "do: correct the table; an unknown class is never taken for a mild one"):
        assert words in text, text
    assert "row 2:" not in text and "row 6" not in text


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_all_kinds_give_the_same_rows(tmp_path, delimiter, mark):
    rows = [["Patient", "Morbidity", ""], ["Patient 1", "Mild", ""], ["", "", ""], ["Patient 2", "Control (CAP)", ""]]
    (tmp_path / "t.csv").write_text(mark + "\r\n".join(delimiter.join(row) for row in rows), encoding="utf-8", newline="")
    assert [(row, record["morbidity"]) for row, record in read_rows(tmp_path / "t.csv")] == [(2, "Mild"), (4, "Control (CAP)")]
    assert [one.severity for one in read_ictcf_table(tmp_path / "t.csv").values()] == ["mild", None]


@pytest.mark.parametrize("content, words", [
    (b"a,b\n1\n", "row 2"), (b"a,b\n1,2,3\n", "row 2"), (b"a,A\n1,2\n", "not clear"), (b"", "not clear"),
    (b"a,b\n\xff\xfe,2\n", "UTF-8"), (b'a,b\n"1,2\n', "damaged")])
def test_tables_that_are_refused(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        list(read_rows(tmp_path / "t.csv"))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_rows(tmp_path / "nothing.csv"))


@given(st.floats(0, 1e4).map(lambda value: round(value, 3)), st.sampled_from(["", "↑", "↓", "℃", " ↑"]))
def test_values_with_marks_keep_their_number(value, mark):
    assert parse_value(f"{value}{mark}").number == value
    assert parse_value(f"<{value}").number is None and parse_value(f"<{value}").high == value


# COVID-CT and covid-chestxray

def covid_ct(root: Path) -> Path:
    images = root / "Images-processed"
    picture(images / "CT_COVID" / "2020.01%2-p23-108%0.png")
    picture(images / "CT_COVID" / "a b.png", kind="JPEG")
    picture(images / "CT_NonCOVID" / "3%1.jpg", mode="RGB")
    (images / "CT_COVID" / "._junk.png").write_bytes(b"mac")
    (images / "__MACOSX").mkdir()
    (root / "COVID-CT-MetaInfo.csv").write_text("File name,Patient ID,DOI,Severity\n2020.01%2-p23-108%0.png,23,https://doi.org/10.1101/2020.02.01,critical\n"
                                                "a b,23,10.1101/2020.02.01,\n")
    for part, name in (("train", "2020.01%2-p23-108%0.png"), ("test", "a b.png")):
        path = root / "Data-split" / "COVID" / f"{part}CT_COVID.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name + "\n")
    return root


def test_covid_ct_reads_by_content_and_keeps_names(tmp_path):
    samples = list(get_source("covid-ct").find(covid_ct(tmp_path)))
    assert [sample.case_id for sample in samples] == ["2020.01%2-p23-108%0.png", "a b.png", "3%1.jpg"]
    assert [sample.source_group for sample in samples] == ["covidct:23", "covidct:23", "covidct-non:*"]
    assert samples[0].also == samples[1].also == ("doi:10.1101/2020.02.01",)
    assert load_masks(samples[1]).image.shape == (SIDE, SIDE)
    report = get_source("covid-ct").check(tmp_path)
    assert report.ok
    assert "a patient in several parts of the published split: 1 (23: test, train)" in report.notices
    assert "a JPEG file under another suffix: 1 (a b.png)" in report.notices


def test_figures_with_alpha_and_colour(tmp_path):
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[..., :3], rgba[:16, :, 3] = 200, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    grey, coloured = read_figure(tmp_path / "a.png")
    assert (grey[:16] == 200).all() and (grey[16:] == 0).all() and coloured == 0
    rgba[:8, :, 0], rgba[..., 3] = 20, 255
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert read_figure(tmp_path / "b.png")[1] == 0.25


def chestxray(root: Path) -> Path:
    header = "patientid,offset,finding,view,modality,folder,filename,doi,license,\n"
    rows = ["2,0,Pneumonia/Viral/COVID-19,PA,X-ray,images,x.jpg,10.1101/2020.02.01,CC BY,", "2,3,\"COVID-19, ARDS\",Axial,CT,images,ct.png,,,",
            "7,?,Pneumonia/Viral/SARS,Axial,CT,images,sars.png,,,", "9,,Pneumonia/Viral/COVID-19,Axial,CT,volumes,coronacases_org_001.nii.gz,,,",
            "8,,No Finding,PA,X-ray,images,gone.jpg,,,"]
    (root / "metadata.csv").parent.mkdir(parents=True, exist_ok=True)
    (root / "metadata.csv").write_text(header + "\n".join(rows) + "\n")
    for name in ("x.jpg", "ct.png", "sars.png"):
        picture(root / "images" / name)
    nifti(root / "volumes" / "coronacases_org_001.nii.gz", hu())
    (root / "annotations").mkdir()
    (root / "annotations" / "covid-severity-scores.csv").write_text("## a\n## b\n## c\n## d\n## e\nfilename,geographic_mean,opacity_mean\nx.jpg,3.5,2\n")
    return root


def test_chestxray_filters_by_an_element_and_refuses_x_rays(tmp_path):
    samples = {sample.case_id: sample for sample in get_source("covid-chestxray").find(chestxray(tmp_path))}
    assert [name for name, sample in samples.items() if has_finding(sample, "COVID-19")] == ["x.jpg", "ct.png", "coronacases_org_001.nii.gz"]
    assert not any(has_finding(sample, "COVID") for sample in samples.values())
    assert samples["x.jpg"].labels["geographic_mean"] == 3.5 and "geographic_mean" not in samples["ct.png"].labels
    with pytest.raises(IntensityError, match="X-ray is not a CT"):
        load_masks(samples["x.jpg"])
    assert load_masks(samples["ct.png"]).image.shape == (SIDE, SIDE)
    volume = samples["coronacases_org_001.nii.gz"]
    assert volume.groups == ("coronacases:001", "chestxray:9") and load_masks(volume).unit == "HU"
    report = get_source("covid-chestxray").check(tmp_path)
    assert report.ok and "listed in metadata.csv, but not there: 1 (gone.jpg)" in report.notices


def test_a_picture_of_one_paper_is_not_in_training_and_test(tmp_path):
    figures = list(get_source("covid-ct").find(covid_ct(tmp_path / "a")))[:1]
    rays = [sample for sample in get_source("covid-chestxray").find(chestxray(tmp_path / "b")) if sample.case_id == "x.jpg"]
    with pytest.raises(LeakageError):
        separate_groups(figures, rays)


def test_metadata_that_leads_out_of_the_set_is_refused(tmp_path):
    root = chestxray(tmp_path)
    (root / "metadata.csv").write_text("patientid,finding,modality,folder,filename\n1,x,CT,images,../../../secret.png\n")
    with pytest.raises(ConfigError, match="leads out"):
        list(get_source("covid-chestxray").find(root))


# CC-CCII

def cc_ccii(root: Path, patients: int, scans: int, slices: int, top: str = "") -> Path:
    for patient in range(patients):
        for scan in range(scans):
            folder = root / top / ("NCP", "CP", "Normal")[patient % 3] / str(patient) / str(scan)
            folder.mkdir(parents=True)
            for number in range(slices):
                (folder / f"{number:04d}.png").touch()
    return root


def peak_of_walk(root: Path) -> tuple[int, int]:
    """(bytes at the peak, slices) of one walk through a set."""
    tracemalloc.start()
    slices = sum(len(sample.images) for sample in get_source("cc-ccii").find(root))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, slices


def test_the_index_of_cc_ccii_streams(tmp_path):
    """Ten times the slices, the same memory; a list of the paths alone would be close to a megabyte more."""
    small, large = cc_ccii(tmp_path / "small", 4, 1, 50), cc_ccii(tmp_path / "large", 40, 1, 50)
    peak_of_walk(small)  # the first walk fills caches of the interpreter
    (first, n_first), (second, n_second) = peak_of_walk(small), peak_of_walk(large)
    assert (n_first, n_second) == (200, 2000) and second < first + 50_000


def test_the_index_streams_at_scale(tmp_path, monkeypatch):
    """180,000 slices that are only names, since so many files take long to make: still far below a megabyte."""
    for name in ("NCP", "CP", "Normal"):
        (tmp_path / name).mkdir()
    slices = [f"{number:04d}.png" for number in range(150)]
    patients = [str(number) for number in range(200)]

    def names_of(folder, folders):
        depth = len(Path(folder).relative_to(tmp_path).parts)
        return [["NCP", "CP", "Normal"], patients, ["1", "2"]][depth] if folders else slices

    monkeypatch.setattr(datasources, "_names", names_of)
    peak, count = peak_of_walk(tmp_path)
    print(f"{count} slices: {peak / 1e6:.2f} MB")
    assert count == 3 * 200 * 2 * 150 and peak < 500_000


def test_cc_ccii_order_groups_and_folders_of_zips(tmp_path):
    root = cc_ccii(tmp_path, 3, 2, 3, top="COVID19-1")
    picture(root / "COVID19-1" / "NCP" / "0" / "10" / "2.jpg")
    picture(root / "COVID19-1" / "NCP" / "0" / "10" / "10.png")
    samples = list(get_source("cc-ccii").find(root))
    assert [sample.case_id for sample in samples[:3]] == ["NCP/0/0", "NCP/0/1", "NCP/0/10"]
    assert [path.name for path in samples[2].images] == ["2.jpg", "10.png"]
    assert {sample.source_group for sample in samples} == {"ccii:0", "ccii:1", "ccii:2"}


def test_the_check_of_cc_ccii_counts_without_end(tmp_path):
    root = cc_ccii(tmp_path, 2, 1, 40)
    (root / "Normal" / "5" / "1").mkdir(parents=True)
    (root / "unzip_filenames.csv").write_text("zip_file,label,patient_id,scan_id,n_slice\na.zip,NCP,0,0,40\na.zip,CP,1,0,41\n")
    report = get_source("cc-ccii").check(root)
    assert any("a scan without pictures: 1 (Normal/5/1)" in fault for fault in report.faults)
    assert any(fault.startswith("neither NIfTI, nor DICOM, nor a picture: 2") for fault in report.faults)
    assert "another number of slices than unzip_filenames.csv says: 1 (CP/1/0)" in report.notices
    assert report.tables["Samples"].values.tolist() == [[2, 80, 2]]


@pytest.mark.parametrize("flat", [False, True])
def test_cc_ccii_masks(tmp_path, flat):
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[:, 4:12], values[:, 20:28], values[:4, 4:8], values[:2, 20:24] = 1, 1, 2, 3
    for patient, stem in (("0", "a"), ("11", "b")):
        picture(tmp_path / "image" / patient / f"{stem}.jpg")
        picture(tmp_path / "mask" / ("" if flat else patient) / f"{stem}.png", values)
    samples = list(get_source("cc-ccii-lesions").find(tmp_path))
    masks = load_masks(samples[0], split_lungs)
    assert [int((masks.labels == value).sum()) for value in (1, 2)] == [16, 8]
    assert (masks.lungs > 0).sum() == 16 * SIDE and masks.lungs[0, 5] == 1 and masks.lungs[0, 22] == 2
    picture(tmp_path / "mask" / ("" if flat else "0") / "a.png", values + 4)
    with pytest.raises(MaskError, match="unexpected values"):
        load_masks(samples[0])


def test_a_flat_mask_that_fits_two_images_is_refused(tmp_path):
    for patient in ("0", "1"):
        picture(tmp_path / "image" / patient / "a.jpg")
    picture(tmp_path / "mask" / "a.png")
    with pytest.raises(MaskError, match="fits two images"):
        list(get_source("cc-ccii-lesions").find(tmp_path))


# groups

names = st.sampled_from(["coronacases:1", "radiopaedia:4", "radiopaedia:10", "medseg2:1", "medseg2:2", "ictcf:*", "ictcf:1", "mosmed:1", "mosmed:2"])
pools = st.lists(st.builds(lambda k, group, also: Sample("x", str(k), group, also=tuple(also)), st.integers(0, 99), names,
                           st.lists(names, max_size=2)), min_size=2, max_size=25)


@given(pools, st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_never_shares_a_group(pool, share, seed):
    try:
        train, test = split_by_group(pool, share, seed, echo=str)
    except LeakageError:
        assert len(set(join_groups(pool).values()) & {join_groups(pool)[sample.source_group] for sample in pool}) == 1
        return
    assert train and test and Counter(map(id, train + test)) == Counter(map(id, pool))
    separate_groups(train, test)
    sure = [{group for sample in side for group in sample.groups if not group.endswith("*")} for side in (train, test)]
    assert not sure[0] & sure[1]


@given(pools)
def test_components_do_not_depend_on_the_order(pool):
    assert join_groups(pool) == join_groups(pool[::-1])


def test_dropping_says_what_was_dropped():
    train = [Sample("covid-semiseg", str(k), group) for k, group in enumerate(["coronacases:001", "coronacases:001", "medseg1:7"])]
    said = []
    kept, _ = separate_groups(train, [Sample("covid19-ct-seg", "c", "coronacases:001")], drop=True, echo=said.append)
    assert kept == train[2:] and said == ["dropped from training: coronacases:001 (covid-semiseg: 2 samples)"]


# getting a set, and the command line

def test_every_source_has_a_card_and_says_where_it_is_missing(tmp_path):
    for name, source in SOURCES.items():
        assert f"[{name}]" in describe_source(name)
        with pytest.raises(DataMissingError):
            source.locate(tmp_path)
        with pytest.raises(DataMissingError):
            check_data(name, tmp_path)


def archives(tmp_path: Path, monkeypatch, damage: bool = False) -> list[str]:
    """Two zips in the place of those on the web; the list of addresses that were asked for."""
    asked, remotes = [], []
    for folder in ("COVID-19-CT-Seg_20cases", "Lung_Mask"):
        path = tmp_path / f"{folder}.zip"
        if not path.exists():  # a gzip file says when it was made, so a second one would have another hash
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted((twenty_cases(tmp_path / "made") / folder).iterdir()):
                    archive.write(file, file.name)
        digest = sha256(path.read_bytes()).hexdigest()
        remotes.append(Remote(str(path), "0" * 64 if damage and folder == "Lung_Mask" else digest, folder))

    def fake(url, path, **_):
        asked.append(Path(url).stem)
        Path(path).write_bytes(Path(url).read_bytes())
        return Path(path)

    monkeypatch.setattr(datasources, "download", fake)
    monkeypatch.setattr(datasources.TwentyCases, "card", replace(datasources.TWENTY_CASES, files=tuple(remotes)))
    return asked


def test_a_set_is_fetched_checked_and_not_fetched_again(tmp_path, monkeypatch):
    asked, said = archives(tmp_path, monkeypatch), []
    get_data("covid19-ct-seg", tmp_path / "data", echo=said.append)
    assert "licence:" in said[0] and len(list(get_source("covid19-ct-seg").find(tmp_path / "data"))) == 2
    get_data("covid19-ct-seg", tmp_path / "data", echo=said.append)
    assert asked == ["COVID-19-CT-Seg_20cases", "Lung_Mask"]


def test_a_wrong_hash_leaves_the_first_file_and_goes_on_there(tmp_path, monkeypatch):
    archives(tmp_path, monkeypatch, damage=True)
    with pytest.raises(ChecksumError, match="sha256 0000"):
        get_data("covid19-ct-seg", tmp_path / "data", echo=str)
    home = tmp_path / "data" / "covid19-ct-seg"
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == ["COVID-19-CT-Seg_20cases", "SOURCE.json"]
    asked = archives(tmp_path, monkeypatch)
    get_data("covid19-ct-seg", tmp_path / "data", echo=str)
    assert asked == ["Lung_Mask"]


def test_a_set_fetched_by_hand_says_how_and_is_accepted_when_there(tmp_path):
    said = []
    with pytest.raises(DataMissingError, match="<data root>/mosmed/"):
        get_data("mosmed", tmp_path, echo=said.append)
    assert "CC BY-NC-ND" in said[0]
    assert get_data("mosmed", mosmed(tmp_path), echo=str).name == "COVID19_1110"


def test_the_list_of_data_sets_loads_no_torch():
    code = ("import sys; from covidsev.cli import main; main(['data', 'list'], standalone_mode=False); "
            "print('loaded:', 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("loaded: False"), done.stderr
    assert all(f"[{name}]" in done.stdout for name in SOURCES)


def test_data_check_and_get_on_the_command_line(tmp_path):
    from click.testing import CliRunner

    from covidsev.cli import main

    root = mosmed(tmp_path)
    checked = CliRunner().invoke(main, ["data", "check", "mosmed", "--root", str(root)])
    assert checked.exit_code == 0 and "CT-4" in checked.output, checked.output
    nifti(root / "COVID19_1110" / "masks" / "study_0255_mask.nii.gz", (two_lungs(slices=5) == 1).astype(np.int16))
    checked = CliRunner().invoke(main, ["data", "check", "mosmed", "--root", str(root)])
    assert checked.exit_code == 1 and "does not have the shape" in checked.output


# the real packs

def test_real_slices_have_the_known_ratios():
    root = real("covid19-ct-seg-slices")
    report = get_source("covid19-ct-seg-slices").check(root)
    published = {row["case_inferred"]: float(row["infection_over_lung"]) for _, row in read_rows(root / "cases.csv")}
    scans = report.tables["Scans"]
    assert report.ok, report.faults
    assert dict(zip(scans["scan"], scans["infection/lung"], strict=True)) == published
    assert report.tables["Samples"].values.tolist() == [[1614, 465, 18]]  # 20 scans; those of 10 and of 29 are one group each
    assert (scans["spine at bottom"] > scans["pictures"] / 2).all()


def test_real_slices_need_their_turn():
    root, votes = real("covid19-ct-seg-slices"), {True: Counter(), False: Counter()}
    for sample in list(get_source("covid19-ct-seg-slices").find(root))[::7]:
        if sample.images:
            as_stored = spine_at_bottom(np.asarray(Image.open(sample.images[0]).convert("L"), float), np.asarray(Image.open(sample.masks["lungs"])))
            votes[sample.labels["upside_down"]][as_stored] += 1
    assert votes[False][True] > 2 * votes[False][False] and votes[True][False] > 2 * votes[True][True]


def test_real_slabs_and_sides():
    samples = list(get_source("covid19-ct-seg-slices").find(real("covid19-ct-seg-slices")))
    whole = {sample.labels["scan"] for sample in samples if sample.labels["contiguous"]}
    assert whole == {"coronacases_002", "coronacases_008", "radiopaedia_14_85914_0", "radiopaedia_40_86625_0", "radiopaedia_7_85703_0"}
    slab = stack_masks([sample for sample in samples if sample.labels["scan"] == "radiopaedia_7_85703_0"], split_lungs)
    assert slab.lungs.shape == (256, 256, 27) and sides_note(slab.lungs) == ()
    assert (slab.lungs == 1).sum() > (slab.lungs == 2).sum()  # the right lung is the larger one


def test_real_mosmed_masks_and_registry():
    root = real("mosmed")
    source = get_source("mosmed")
    samples = list(source.find(root))
    assert [sample.case_id for sample in samples] == [f"study_{number:04d}" for number in range(255, 305)]
    assert {sample.labels["severity"] for sample in samples} == {"CT-1"}
    counts = Counter(row["category"] for row in source.registry(source.locate(root)).values())
    assert counts == {"CT-0": 254, "CT-1": 684, "CT-2": 125, "CT-3": 45, "CT-4": 2}
    masks = load_masks(samples[0])
    assert masks.infection.sum() == 45526 and masks.infection.shape == (512, 512, 38) and masks.spacing_mm[2] == 8
    assert load_masks(samples[-1]).spacing_mm[2] == 8


def test_real_ictcf_table():
    root = real("ictcf-tables")
    table = read_ictcf_table(root / "patients.csv")
    assert len(table) == 1521
    assert Counter(one.severity for one in table.values()) == {"regular": 596, None: 627, "severe": 202, "critical": 72,
                                                               "mild": 24}
    assert Counter(one.morbidity for one in table.values() if one.severity is None) == {"control": 328, "suspected": 299}
    # mild is defined by a CT without findings, so CT cannot tell it from the rest without circularity
    assert "positive" not in {one.ct for one in table.values() if one.morbidity in ("mild", "control")}
    assert "negative" not in {one.ct for one in table.values() if one.severity in ("regular", "severe", "critical")}
    report = get_source("ictcf").check(root)
    assert report.ok and "299 patients have no severity: suspected" in report.notices


def test_real_pool_shares_patients_with_the_twenty_cases(data_root):
    pool = list(get_source("covid-semiseg").find(data_root))
    assert Counter(sample.labels["split"] for sample in pool)["train"] == 50
    assert {"medseg1:A", "medseg1:D"} <= {sample.source_group for sample in pool}
    with pytest.raises(LeakageError, match="medseg1:A"):  # published training and test slices of one scan
        separate_groups([sample for sample in pool if sample.labels["split"] == "train"],
                        [sample for sample in pool if sample.labels["split"] == "test"])
    kept, _ = separate_groups([sample for sample in pool if sample.labels["split"] == "train"],
                              [sample for sample in pool if sample.labels["split"] == "test"], drop=True, echo=str)
    assert len(kept) == 50 - len({"4", "5", "17", "46", "33", "53", "40"})
    unlabelled = [sample for sample in pool if sample.labels["split"] == "unlabelled"]
    if unlabelled and (data_root / "covid19-ct-seg-slices").is_dir():
        cases = list(get_source("covid19-ct-seg-slices").find(data_root))
        with pytest.raises(LeakageError, match="nothing is left"):
            separate_groups(unlabelled, cases, drop=True, echo=str)


def test_lungs_are_converted_by_name_only():
    values = np.array([0, 1, 2], np.uint8)
    assert convert_lungs(values, "left-right").tolist() == [0, 2, 1] and convert_lungs(values, "right-left").tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="lung convention"):
        convert_lungs(values, "left")


def test_an_image_of_another_shape_than_its_masks_is_refused(tmp_path):
    small = picture(tmp_path / "small.png", np.zeros((SIDE, SIDE), np.uint8))
    wide = picture(tmp_path / "wide.png", np.zeros((SIDE, 2 * SIDE), np.uint8))
    sample = Sample("covid19-ct-seg-slices", "x", "coronacases:001", (wide,), {"lungs": small, "infection": small},
                    {"upside_down": False})
    with pytest.raises(GeometryError, match="differ in shape"):
        load_masks(sample)
