"""Cards, tables that went through spreadsheets, and copies of data sets as people have them; the real packs, where they
are."""
import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import write_nifti

from covidsev.core import ConfigError, DataMissingError, GeometryError, MaskError, ReadError, data_root
from covidsev.data.sources import (SOURCES, cards, check_data, describe, get_data, get_source, how_to_get,
                                   load_masks, read_ictcf_table, read_rows, scan_patient)
from covidsev.severity.lungs import split_lungs

SIDE = 64
RNG = np.random.default_rng(0)


def picture(path, array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)
    return path


def table(path, header, *rows, delimiter=",", mark="") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def grey(bits=8) -> np.ndarray:
    return RNG.integers(0, 256 if bits == 8 else 2600, (SIDE, SIDE)).astype(np.uint8 if bits == 8 else np.uint16)


def drawn(rows, columns) -> np.ndarray:
    """A mask 0/255, true in a rectangle."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[rows[0]:rows[1], columns[0]:columns[1]] = 255
    return mask


# --- cards

def test_every_card_says_where_the_set_is_missing(tmp_path):
    for name, card in cards().items():
        assert card.page in (text := describe(card)) and f"[{name}]" in text and "layout:" in text
        assert f"<data root>/{name}/" in how_to_get(card)
        if name in SOURCES:
            with pytest.raises(DataMissingError, match="(?s)is not there.*<data root>"):
                get_source(name).locate(tmp_path)
        elif name != "covid-semiseg":
            pytest.raises(ConfigError, get_source, name).match("nothing here reads it")
    papers = {"covid-semiseg", "medseg", "medseg-volumes", "ictcf", "covid-ct", "covid-chestxray", "cc-ccii"}
    read = {"medseg9", "covid19-ct-seg-slices", "coronacases10", "ictcf", "mosmed", "covid-ct", "covid-ct-md"}
    assert papers <= cards().keys() and read == SOURCES.keys()


def test_the_list_of_data_sets_loads_no_torch():
    code = ("import sys; from covidsev.cli import main; main(['data', 'list'], standalone_mode=False); "
            "print('loaded:', 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("loaded: False"), done.stderr
    assert all(f"[{name}]" in done.stdout for name in cards())


def test_a_set_fetched_by_hand_says_how_and_is_accepted_when_there(tmp_path):
    with pytest.raises(DataMissingError, match="(?s)cannot be fetched by a program.*save dataset_registry.xlsx"):
        get_data("mosmed", tmp_path, echo=str)
    assert get_data("mosmed", mosmed(tmp_path), echo=str).name == "COVID19_1110"
    pytest.raises(ConfigError, check_data, "mosmeds", tmp_path).match("did you mean 'mosmed'")


# --- tables

@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_all_kinds_give_the_same_rows(tmp_path, delimiter, mark):
    path = table(tmp_path / "t.csv", ["Patient", " Morbidity  type", ""], ["1", " a, b ; c ", ""], [], ["2", "d", ""],
                 delimiter=delimiter, mark=mark)
    assert [(number, *row.items()) for number, row in read_rows(path)] == [
        (2, ("patient", "1"), ("morbidity type", "a, b ; c")), (4, ("patient", "2"), ("morbidity type", "d"))]


@pytest.mark.parametrize("content, words", [
    (b"a,b\n1,2,3\n", "row 2 does not fit"), (b"a,b\n1,2\n\n3\n", "row 4 does not fit"), (b"a,A \n1,2\n", "not clear"),
    (b"", "not clear"), (b"\xff\xfea", "not UTF-8"), (b'a,b\n"1,2\n', "cannot be read"), (b"b\n1\n", "expected: a")])
def test_tables_that_are_refused(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    pytest.raises(ConfigError, list, read_rows(tmp_path / "t.csv", need=["a"])).match(words)
    pytest.raises(ConfigError, list, read_rows(tmp_path)).match("cannot be read")


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9))
def test_an_unknown_class_is_never_a_severity(tmp_path_factory, word):
    path = table(tmp_path_factory.mktemp("t") / "patients.csv", ["patient", "morbidity"], ["Patient 1", word])
    known = {**{name: name for name in ("mild", "regular", "severe", "critical")}, "critically": "critical",
             "control": None, "suspected": None}
    if word.casefold() in known:
        assert read_ictcf_table(path)[1].severity == known[word.casefold()]
    else:
        pytest.raises(ConfigError, read_ictcf_table, path).match("row 2: unknown class")


def test_the_site_text_has_no_header(tmp_path):
    path = tmp_path / "patient.txt"
    path.write_text("Patient 7\t61\tMale\tPositive\tPositive\t60+\tCured\tCritically ill\tUnion\n", encoding="utf-8")
    assert read_ictcf_table(path)[7][:5] == (7, "critical", "critically", "positive", "cured")


# --- sets by table

def png_slices(root, scans=("coronacases_002", "radiopaedia_14_85914_0")):
    """The 20-case set as PNG slices, two of each scan; those of Radiopaedia stored upside down."""
    folder, rows, cases = root / "covid19-ct-seg-slices", [], []
    for number, scan in enumerate(s for scan in scans for s in (scan, scan)):
        turn = -1 if "radiopaedia" in scan else 1
        for name, array in (("ct", grey()), ("lungs", drawn((8, 50), (8, 56))), ("covid", drawn((10, 20), (10, 30)))):
            if name != "ct" or number % 2 == 0:
                picture(folder / name / f"{number:04d}.png", array[::turn])
        rows.append([f"{number:04d}.png", scan, number % 2])
        cases.append([scan, "anterior down" if turn < 0 else "anterior up", 1])
    table(folder / "slices.csv", ["file", "case_inferred", "index_in_case"], *rows)
    table(folder / "cases.csv", ["case_inferred", "orientation", "contiguous"], *cases)
    return folder


def test_png_slices_are_turned_upright_and_never_mirrored(tmp_path):
    stored = np.asarray(Image.open(png_slices(tmp_path) / "ct/0002.png"))
    samples = list(get_source("covid19-ct-seg-slices").find(tmp_path))
    assert [sample.group for sample in samples] == ["coronacases:002"] * 2 + ["radiopaedia:14"] * 2
    loaded = [load_masks(sample) for sample in samples]
    for masks, has_image in zip(loaded, (1, 0, 1, 0), strict=True):
        assert np.array_equal(masks.infection, drawn((10, 20), (10, 30)) > 0) and masks.lungs.dtype == bool
        assert (masks.image is not None) == has_image and masks.unit == "grey" and masks.spacing_mm is None
    assert np.array_equal(loaded[2].image, stored[::-1])


def test_faults_of_a_set_by_table_are_listed_and_stop_a_reader(tmp_path):
    folder = png_slices(tmp_path)
    report = check_data("covid19-ct-seg-slices", tmp_path)
    assert report.ok and "4 samples of 1614" in report.notices[0] and "radiopaedia_14_85914_0" in str(report)
    picture(folder / "covid/0001.png", np.zeros((SIDE, 2 * SIDE), np.uint8))
    (folder / "lungs/0002.png").write_bytes(b"<html>")
    table(folder / "MANIFEST.csv", ["path", "sha256"], ["ct/0000.png", "0" * 64])
    text = str(check_data("covid19-ct-seg-slices", tmp_path))
    for words in ("differ in shape", "not a picture", "not the one in MANIFEST.csv", "3 faults"):
        assert words in text
    with pytest.raises(GeometryError, match="differ in shape"):
        [load_masks(sample) for sample in get_source("covid19-ct-seg-slices").find(tmp_path)]
    table(folder / "cases.csv", ["case_inferred", "orientation"], ["coronacases_002", "anterior up"])
    with pytest.raises(ConfigError, match="row 4: cases.csv does not have this"):
        list(get_source("covid19-ct-seg-slices").find(tmp_path))


def test_medseg9_has_lungs_and_infection_of_any_value(tmp_path):
    folder = tmp_path / "medseg9"
    for name, array in (("img", grey()), ("lung", drawn((8, 50), (8, 56))), ("inf", drawn((10, 20), (10, 30)) // 2)):
        picture(folder / "v1_r7_85703_0" / name / "004.png", array)
    table(folder / "slices.csv", ["vol", "k", "kept"], [1, 3, 0], [1, 4, 1])
    table(folder / "cases.csv", ["vol", "radiopaedia_case"], [1, "r7_85703_0"])
    (sample,) = get_source("medseg9").find(tmp_path)
    assert (sample.case_id, sample.group, sample.labels["scan"]) == ("v1_4", "radiopaedia:7", "radiopaedia_7_85703_0")
    masks = load_masks(sample)
    assert masks.infection.sum() == 200 and masks.lungs.sum() == 42 * 48 and masks.image.shape == (SIDE, SIDE)


def test_coronacases_are_hu_on_a_crop_with_masks_laid_on_it(tmp_path):
    """An infection of 128, lungs and experts of 256 pixels in the data set beside, and an image cut from 512."""
    folder, other = tmp_path / "coronacases10", tmp_path / "covid19-ct-seg-slices"
    image = RNG.integers(0, 256, (400, 512)).astype(np.uint8)
    picture(folder / "c001/img512/008.png", image)
    soft, lungs = np.zeros((10, 128, 128), np.uint8), np.zeros((256, 256), np.uint8)
    soft[8, 40:60, 30:50] = lungs[60:200, 40:220] = 255
    np.savez(folder / "c001/inf128.npz", inf=soft)
    for name in ("lungs", "covid"):
        picture(other / name / "0009.png", lungs)
    header = ["case", "k", "hu_slope", "hu_intercept", "kept_512", "lung_mask_256_file"]
    table(folder / "slices.csv", header, [1, 0, 8, -1000, 0, ""], [1, 8, 8.5, -1015, 1, "0009.png"])
    table(folder / "cases.csv", ["case", "crop_r0", "crop_r1", "crop_c0", "crop_c1"], [1, 20, 420, 0, 512])
    (sample,) = get_source("coronacases10").find(tmp_path)
    masks = load_masks(sample)
    assert (sample.group, masks.unit) == ("coronacases:001", "HU")
    assert np.allclose(masks.image, image * 8.5 - 1015) and np.array_equal(masks.experts, masks.lungs)
    for mask, box in ((masks.lungs, (100, 379, 80, 439)), (masks.infection, (140, 219, 120, 199))):
        rows, columns = np.nonzero(mask)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == box


def test_covid_ct_md_is_hu_from_sixteen_bits(tmp_path):
    folder, image = tmp_path / "covid-ct-md", grey(16)
    picture(folder / "P001/002.png", image)
    table(folder / "slices.csv", ["patient", "i_from_top", "kept", "LLL"], ["P001", 0, 0, 0], ["P001", 2, 1, 1])
    table(folder / "cases.csv", ["patient", "diagnosis"], ["P001", "COVID-19"])
    (sample,) = get_source("covid-ct-md").find(tmp_path)
    labels = sample.labels
    assert (sample.group, labels["lll"], labels["diagnosis"]) == ("covid-ct-md:P001", "1", "COVID-19")
    assert np.array_equal(load_masks(sample).image, image.astype(np.float32) - 1024)


def mosmed(root, rows=((255, "CT-1"), (256, "CT-1"), (1109, "CT-4")), masks=(255, 256)):
    """A copy with the registry, masks and one study."""
    folder, affine = root / "mosmed" / "COVID19_1110", np.diag([-0.8, -0.8, 8.0, 1.0])
    infection = np.zeros((40, 36, 5), np.int16)
    infection[3:9, 4:8, 2] = 1
    for number in masks:
        write_nifti(folder / f"masks/study_{number:04d}_mask.nii.gz", infection, affine)
    hu = RNG.choice(np.array([-1000, -850, 40], np.int16), infection.shape)
    write_nifti(folder / "studies/CT-1/study_0255.nii.gz", hu, affine)
    lines = [[number, kind, f"/studies/{kind}/study_{number:04d}.nii.gz",
              f"/masks/study_{number:04d}_mask.nii.gz" * (number in masks)] for number, kind in rows]
    header = ["study_id", "category", "study_file", "mask_file"]
    table(root / "mosmed/extra/dataset_registry.csv", header, *lines, mark="\ufeff")
    return root


def test_mosmed_volumes_masks_and_classes(tmp_path):
    first, second = get_source("mosmed").find(mosmed(tmp_path))
    assert (first.case_id, first.group, first.labels["severity"]) == ("study_0255", "mosmed:study_0255", "CT-1")
    whole, alone = load_masks(first), load_masks(second)
    assert whole.unit == "HU" and whole.image.shape == whole.infection.shape
    assert whole.infection.sum() == 24 and alone.spacing_mm == pytest.approx((0.8, 0.8, 8.0))
    assert np.array_equal(whole.infection, alone.infection)


@pytest.mark.parametrize("lines, error, words", [
    (["255,CT-9,,"], ConfigError, "row 2: no class"), (["255,,,"], ConfigError, "row 2: no class"),
    (["255,CT-1,,", "255,CT-1,,"], ConfigError, "row 3: .* there twice"),
    (["255,CT-1,/../../../etc/passwd,"], ConfigError, "leads out of its data set"),
    (None, DataMissingError, "(?s)table of this data set is missing.*as CSV")])
def test_mosmed_registries_that_are_refused(tmp_path, lines, error, words):
    path = mosmed(tmp_path) / "mosmed/extra/dataset_registry.csv"
    path.unlink()
    if lines:
        path.write_text("\n".join(["study_id,category,study_file,mask_file", *lines]), encoding="utf-8")
        assert not check_data("mosmed", tmp_path).ok
    pytest.raises(error, list, get_source("mosmed").find(tmp_path)).match(words)


def test_masks_of_a_volume_that_do_not_fit_are_faults(tmp_path):
    masks = mosmed(tmp_path) / "mosmed/COVID19_1110/masks"
    assert check_data("mosmed", tmp_path).ok
    write_nifti(masks / "study_0255_mask.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    assert any("differ in shape" in fault for fault in check_data("mosmed", tmp_path).faults)
    write_nifti(masks / "study_0256_mask.nii.gz", np.full((40, 36, 5), 7, np.int16), np.eye(4))
    pytest.raises(MaskError, load_masks, list(get_source("mosmed").find(tmp_path))[1]).match("7: ")


def test_data_check_and_get_on_the_command_line(tmp_path):
    from click.testing import CliRunner

    from covidsev.cli import main

    root, mask = mosmed(tmp_path), tmp_path / "mosmed/COVID19_1110/masks/study_0255_mask.nii.gz"
    for content, code, words in ((mask.read_bytes(), 0, "CT-1"), (b"<html>", 1, "looks like an HTML")):
        mask.write_bytes(content)
        checked = CliRunner().invoke(main, ["data", "check", "mosmed", "--root", str(root)])
        assert checked.exit_code == code and words in checked.output, checked.output


# --- sets by pattern

LAYOUTS = {"CT": "Patient 12/CT/IMG-0001-{}.jpg", "bare": "Patient 12/IMG-0001-{}.jpg", "flat": "Patient 12_{}.jpg",
           "named": "patient_12/other-name/IMG-{}.jpg", "deep": "CT/Patient 12/CT/{}.jpg"}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ictcf_folders_in_all_variants(tmp_path, layout):
    root = tmp_path / "HUST-19"
    for number in ("0099", "00100", "00007"):
        picture(root / layout.format(number), grey())
    table(root / "patients.csv", ["Patient", "Morbidity", "CT"], ["Patient 12", "Severe", "Positive"],
          ["Patient 1", "Suspected", ""])
    (sample,) = get_source("ictcf").find(tmp_path)
    assert (sample.patient, sample.group) == ("12", "ictcf:12")
    assert (sample.labels["severity"], sample.labels["ct"]) == ("severe", "positive")
    assert [path.stem.replace("_", "-").split("-")[-1] for path in sample.images] == ["00007", "0099", "00100"]
    report = check_data("ictcf", tmp_path)
    assert report.ok and "1 patients of the table are suspected (no severity)" in report.notices


def test_ictcf_series_unlisted_patients_and_no_table(tmp_path):
    root = tmp_path / "ictcf"
    for name in ("Patient 1/a/1.jpg", "Patient 1/b/1.jpg", "Patient 1/b/2.jpg", "Patient 2/1.jpg"):
        picture(root / name, grey())
    samples = list(get_source("ictcf").find(root))
    assert [(one.patient, len(one.images)) for one in samples] == [("1", 1), ("1", 2), ("2", 1)]
    assert len({one.case_id for one in samples}) == 3
    assert "no table of patients" in check_data("ictcf", root).notices[0]
    table(root / "patients.csv", ["Patient", "Morbidity"], ["Patient 1", "Mild"])
    pytest.raises(ConfigError, list, get_source("ictcf").find(root)).match("not in the table")
    (root / "Patient 1/a/1.jpg").write_bytes(b"<html>")
    pytest.raises(ReadError, load_masks, next(get_source("ictcf").find(root)))


def test_covid_ct_reads_by_content_and_keeps_names(tmp_path):
    root = tmp_path / "covid-ct" / "Images-processed"
    names = ["CT_COVID/2020.01%2-p23 b.png", "CT_NonCOVID/1.jpg", "other/2.png"]
    for name in names:
        picture(root / name, grey())
    Image.fromarray(grey()).save(root / names[0], format="JPEG")
    samples = list(get_source("covid-ct").find(tmp_path))
    assert [(one.case_id, one.labels["finding"], one.group) for one in samples] == [
        ("2020.01%2-p23 b.png", "COVID", "covid-ct:*"), ("1.jpg", "NonCOVID", "covid-ct:*")]
    assert load_masks(samples[0]).image.shape == (SIDE, SIDE)
    assert "2 samples of 746" in check_data("covid-ct", tmp_path).notices[0]


@pytest.mark.parametrize("name", ["coronacases_001", "coronacases_org_001"])
def test_patients_have_one_name_in_all_sets(name):
    assert scan_patient("x", name) == "coronacases:001"


def test_covid_semiseg_check_lists_every_fault_at_once(tmp_path):
    from covidsev.data.datasets import load_phantom, write_covid_semiseg

    train, test = load_phantom("train", 4, 64), load_phantom("test", 2, 64)
    dataset = write_covid_semiseg(tmp_path / "Dataset", train=train, test=test)
    report = check_data("covid-semiseg", tmp_path)
    assert report.ok and report.tables["Pixels"]["slices"].tolist() == [4, 2], str(report)
    multi, single, binary = (dataset / name for name in (
        "TrainingSet/MultiClassInfection-Train", "TrainingSet/LungInfection-Train/Doctor-label",
        "TestingSet/LungInfection-Test"))
    for path, value in ((multi / "GT/train-000.png", 7), (single / "GT/train-003.png", 9),
                        (binary / "GT/test-000.png", 255)):
        picture(path, np.full((64, 64), value, np.uint8))
    (multi / "Imgs/train-001.png").write_bytes(b"<html>")
    (multi / "Imgs/train-002.png").unlink()
    faults = check_data("covid-semiseg", tmp_path).faults
    for words in ("GT/train-000.png", "looks like an HTML", "train-002 has no image", "slice test-000 differs",
                  "GT/train-003.png"):
        assert any(words in fault for fault in faults), (words, faults)
    part = check_data("covid-semiseg", binary)
    assert any("has no train slices" in fault for fault in part.faults)
    assert any("no multi-class masks" in notice for notice in part.notices)


# --- the real packs

def real(name):
    root = data_root()
    if root is None or not (root / name).is_dir():
        pytest.skip(f"needs {name} in the data folder")
    return root / name


def test_real_covid_semiseg():
    report = check_data("covid-semiseg", real("covid-semiseg"))
    pixels = report.tables["Pixels"].set_index("split").to_dict("index")
    names = ("slices", "background_px", "ggo_px", "consolidation_px", "infected_%_min", "infected_%_mean",
             "infected_%_max")
    assert [pixels["train"][name] for name in names] == [50, 5_807_318, 560_121, 326_093, 0.9, 14.5, 38.7]
    assert [pixels["test"][name] for name in names] == [48, 4_852_231, 636_258, 262_742, 1.0, 15.9, 41.7]
    notices = "\n".join(report.notices)
    assert report.ok and "test 21, 65, 91, 93, 97" in notices and "prior_is_ground_truth" in notices
    assert "not the published" not in notices and "1600 slices, 20 scans, 18 groups" in notices


def test_real_slices_have_the_spine_at_the_bottom():
    """Along the midline the lower third of the box around the lungs is brighter than the upper one."""
    votes = Counter()
    for sample in list(get_source("covid19-ct-seg-slices").find(real("covid19-ct-seg-slices")))[::5]:
        masks = load_masks(sample, split_lungs)
        if masks.image is not None:
            rows, columns = (np.flatnonzero((masks.lungs > 0).any(axis=axis)) for axis in (1, 0))
            middle, third = (columns[0] + columns[-1]) // 2, (rows[-1] - rows[0]) // 3
            strip = masks.image[:, middle - 8:middle + 9]
            below, above = strip[rows[-1] - third:rows[-1] + 1].mean(), strip[rows[0]:rows[0] + third].mean()
            votes[sample.labels.get("orientation"), bool(below > above)] += 1
    for orientation in ("anterior up", "anterior down"):
        assert votes[orientation, True] > 2 * votes[orientation, False], votes


@pytest.mark.parametrize("name, samples, groups", [("medseg9", 412, 7), ("coronacases10", None, 7), ("covid-ct-md", 77, 3),
                                                   ("covid-ct", None, 1)])
def test_real_packs_are_whole(name, samples, groups):
    report = check_data(name, real({"covid-ct": "covid-ct-sample"}.get(name, name)))
    rows = {(what, value): number for what, value, number in report.tables["What is there"].itertuples(index=False)}
    assert report.ok and rows["groups", ""] == groups and samples in (None, rows["samples", ""]), str(report)


def test_real_coronacases_agree_with_their_dicom_scale_and_experts():
    """Air is -1000 outside and lungs are where HU say so; the coarse infection lies on the experts'."""
    dice, shares = [], []
    for sample in list(get_source("coronacases10").find(real("coronacases10")))[::6]:
        masks = load_masks(sample)
        if masks.experts is not None and masks.experts.sum() > 500:
            dice.append(2 * (masks.experts & masks.infection).sum() / (masks.experts.sum() + masks.infection.sum()))
            shares.append(np.median(masks.image[masks.lungs & ~masks.infection]))
    assert np.mean(dice) > 0.9 and -950 < np.median(shares) < -700, (np.mean(dice), np.median(shares))


def test_real_mosmed_masks_and_registry():
    root = real("mosmed")
    samples = list(get_source("mosmed").find(root))
    assert [sample.case_id for sample in samples] == [f"study_{number:04d}" for number in range(255, 305)]
    assert {sample.labels["severity"] for sample in samples} == {"CT-1"}
    counts = Counter(row["category"] for _, row in read_rows(root / "extra/dataset_registry.csv"))
    assert counts == {"CT-0": 254, "CT-1": 684, "CT-2": 125, "CT-3": 45, "CT-4": 2}
    masks = load_masks(samples[0])
    assert masks.infection.sum() == 45526 and masks.infection.shape == (512, 512, 38) and masks.spacing_mm[2] == 8


def test_real_ictcf_table():
    root = real("ictcf-tables")
    patients = list(read_ictcf_table(root / "patients.csv").values())
    assert Counter(one.severity for one in patients) == {"regular": 596, None: 627, "severe": 202, "critical": 72, "mild": 24}
    # mild is defined by a CT without findings, so CT cannot tell it from the rest without circularity
    assert "positive" not in {one.ct for one in patients if one.morbidity in ("mild", "control")}
    assert "negative" not in {one.ct for one in patients if one.severity in ("regular", "severe", "critical")}
    report = check_data("ictcf", root)
    assert report.ok and "299 patients of the table are suspected (no severity)" in report.notices
