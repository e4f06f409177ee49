"""What a user has, good or broken: every fault is an error that names it, and no word about a patient gets through."""
import gzip
import json
import logging
import sys
import tracemalloc
import unicodedata
import warnings

import nibabel
import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import PLANTED, dicom_file, write_nifti

from covidsev.core import (ConfigError, CovidSevError, GeometryError, IntensityError, MaskError,
                           MissingExtraError, ReadError)
from covidsev.data import volumes
from covidsev.data.scans import (read_mask_alone, read_mask_for, read_scan, sniff, turn_picture,
                                 write_mask)
from covidsev.data.volumes import make_grid, nifti_grid, read_header

SHAPE = (40, 36, 12)
AFFINE = np.array([[-0.8, 0, 0, 15.0], [0, -0.8, 0, 14.0], [0, 0, 5.0, -30.0], [0, 0, 0, 1.0]])
RNG = np.random.default_rng(0)


def ct(shape=SHAPE) -> np.ndarray:
    """int16 in HU: a third air, a third lung, a third soft tissue, no two voxels arranged alike."""
    tissue = RNG.choice(np.array([-1000, -850, 40], np.int16), shape)
    return tissue + RNG.integers(-20, 20, shape, dtype=np.int16)


VOLUME = ct()
HU = VOLUME[::-1, ::-1]  # in RAS order
MASK = (VOLUME > 0).astype(np.uint8)
same = np.array_equal


def save(path, array=VOLUME, affine=AFFINE, **fields):
    return write_nifti(path, array, affine, **fields)


def write(path, data):
    path.write_bytes(data)
    return path


def save_picture(path, array, **options):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def grey(shape=(40, 44)) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def make_stack(folder, names, picture=grey):
    for name in names:
        save_picture(folder / name, picture())
    return folder


@pytest.fixture()
def scan(tmp_path):
    return read_scan(save(tmp_path / "case.nii.gz"))


def fails(error, *texts, call=read_scan, **options):
    """A check that `call` raises `error` with every one of `texts` in its message, and the file if it is about one."""
    def check(*arguments):
        with pytest.raises(error) as caught:
            call(*arguments, **options)
        about = () if isinstance(caught.value, ConfigError) else (arguments[0].name,)
        for text in (*texts, *about):
            assert text in str(caught.value), str(caught.value)
        return str(caught.value)
    return check


# rows 1 and 2: not a scan, not whole

@pytest.mark.parametrize("content, text", [
    (b"<!DOCTYPE html><html>404", "looks like an HTML"), (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
    (b"\0" * 400, "first bytes"), (gzip.compress(b"<html>" * 100, mtime=0), "looks like an HTML"),
    (b"NRRD0004\ntype: short\n", "an NRRD file"), (b"NDims = 3\nDimSize = 4 4 4\n", "a MetaImage"),
    (b"ObjectType = Image\nNDims = 3\n", "a MetaImage"), (b"PK\3\4rest", "a zip archive")])
def test_what_is_no_scan_is_named_by_its_first_bytes_with_the_way_out(tmp_path, content, text):
    fails(ReadError, text, "convert it to NIfTI")(write(tmp_path / "case.nii.gz", content))


@pytest.mark.parametrize("magic, text", [(b"XXXX", "neither NIfTI"), (b"ni1\0", "half of a pair")])
def test_another_magic_number(tmp_path, magic, text):
    data = save(tmp_path / "a.nii").read_bytes()
    fails(ReadError, text)(write(tmp_path / "a.nii", data[:344] + magic + data[348:]))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, name, keep):
    data = save(tmp_path / name).read_bytes()
    fails(ReadError, "truncated or corrupt")(write(tmp_path / name, data[:int(keep * len(data))]))


def test_a_flipped_byte_never_passes(tmp_path):
    data = save(tmp_path / "a.nii.gz").read_bytes()
    for place in [*range(30, len(data) - 8, max(1, len(data) // 25)), -6]:
        broken = bytearray(data)
        broken[place] ^= 0x55
        path = write(tmp_path / "a.nii.gz", broken)
        fails(CovidSevError)(path)
    fails(ReadError, "truncated or corrupt", "CRC")(path)  # the last one lies in the checksum


# row 3: claims, checked before allocation

@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_giant_claim_allocates_nothing(tmp_path, name):
    path = save(tmp_path / name, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    tracemalloc.start()
    fails(ReadError, "claims 35,181,150,961,663 voxels", f"has {path.stat().st_size:,} bytes")(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_packed_file_that_could_hold_it_meets_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "MAX_DECODED_BYTES", 4 * VOLUME.size - 1)
    fails(ReadError, "too large", "claims 17,280 voxels")(save(tmp_path / "a.nii.gz"))
    monkeypatch.undo()
    fails(ReadError, "too large")(save(tmp_path / "b.nii.gz", np.zeros((4096, 40, 2), np.int16)))


def test_a_later_offset_is_honoured_and_one_behind_the_end_is_not(tmp_path):
    data = save(tmp_path / "a.nii", vox_offset=368).read_bytes()
    assert same(read_scan(write(tmp_path / "a.nii", data[:352] + bytes(16) + data[352:])).hu, HU)
    fails(ReadError, "truncated or corrupt")(save(tmp_path / "b.nii", vox_offset=10**6))


# rows 4 to 12: shapes, types and geometry

NO_TURN = {"quatern_b": 0, "quatern_c": 0, "quatern_d": 0, "pixdim": [1, 0.8, 0.8, 5, 0, 0, 0, 0]}
HEADERS = [
    *((ReadError, {"vox_offset": offset}, ["where the voxels begin", "at least 352"])
      for offset in (0, 1, 348, 351, 352.5, -8, np.nan, np.inf)),
    *((ReadError, {"dim": [3, 40, size, 12, 1, 1, 1, 1]}, ["negative or zero dimension", str(size)])
      for size in (0, -36)),
    *((ReadError, {"datatype": code}, ["data type", name]) for code, name in
      ((128, "RGB"), (32, "complex"), (1, "binary"), (1999, "unknown code 1999"))),
    *((ReadError, {"dim": dim}, [f"a {dim[0]}-D array"]) for dim in (
        [7, 5, 6, 12, 2, 2, 2, 6], [5, 40, 36, 12, 1, 1, 1, 1], [1, 17280, 1, 1, 1, 1, 1, 1])),
    *((GeometryError, fields, texts) for fields, *texts in [
        ({"srow_x": [np.nan, 0, 0, 0]}, "sform of the header holds NaN"),
        ({"qform_code": 1, "quatern_b": np.inf}, "qform of the header holds NaN"),
        ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "singular"),
        ({"srow_x": [0, -0.8, 0, 0]}, "singular"),
        ({"sform_code": 0, "qform_code": 0}, "--assume-orientation RAS"),
        ({"pixdim": [1, 0, 0.8, 5, 0, 0, 0, 0]}, "zero, negative"),
        ({"pixdim": [1, 0.8, -0.8, 5, 0, 0, 0, 0]}, "-0.8"),
        ({"pixdim": [1, 0.8, 0.8, np.nan, 0, 0, 0, 0]}, "not a number"),
        ({"pixdim": [1, 0.8, 0.8, 2.5, 0, 0, 0, 0]}, "sform and voxel sizes disagree",
         "sform [0.8, 0.8, 5.0] mm", "pixdim [0.8, 0.8, 2.5] mm"),
        ({"qform_code": 1, **NO_TURN}, "sform and qform disagree", "sform -0.8 0 0 15",
         "qform 0.8 0 0")])]


@pytest.mark.parametrize("error, fields, texts", HEADERS)
def test_headers_that_cannot_be_believed_of_scans_and_masks(tmp_path, scan, error, fields, texts):
    path = save(tmp_path / "a.nii", **fields)
    fails(error, *texts)(path)
    fails(error, *texts, call=read_mask_for)(path, scan)


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8", ">i2", ">f4"])
def test_every_type_and_byte_order_reads_the_same(tmp_path, dtype):
    header = nibabel.Nifti1Header(endianness=">") if ">" in dtype else None
    nibabel.save(nibabel.Nifti1Image(VOLUME.astype(dtype.strip(">")), AFFINE, header), tmp_path / "a.nii")
    assert same(read_scan(tmp_path / "a.nii").hu, HU)
    half = save(tmp_path / "b.nii", VOLUME // 2, scl_slope=2, scl_inter=-24)
    assert same(read_scan(half).hu, HU // 2 * 2 - 24)


def test_four_dimensions(tmp_path):
    one = read_scan(save(tmp_path / "one.nii", VOLUME[..., None]))
    assert same(one.hu, HU) and any("squeezed" in note for note in one.warnings)
    path = save(tmp_path / "two.nii.gz", np.stack([VOLUME, VOLUME[::-1]], -1))
    fails(ReadError, "4-D", "--volume 0 to --volume 1")(path)
    second = read_scan(path, volume=1)
    assert same(second.hu, HU[::-1]) and any("volume: 1" in note for note in second.warnings)
    fails(ConfigError, "no volume 2", volume=2)(path)


def test_two_dimensions_are_a_slice(tmp_path):
    one = read_scan(save(tmp_path / "a.nii", VOLUME[:, :, 3]))
    assert one.kind == "slice" and one.spacing_mm == pytest.approx((0.8, 0.8))
    assert same(one.hu, VOLUME[:, :, 3].T)  # LPS is how a screen shows it
    write_mask(tmp_path / "out.nii", read_mask_for(save(tmp_path / "m.nii", MASK[:, :, 3]), one), one)
    mask, image = nibabel.load(tmp_path / "out.nii"), nibabel.load(tmp_path / "a.nii")
    assert same(np.asarray(mask.dataobj), MASK[:, :, 3]) and np.allclose(mask.affine, image.affine)


def test_no_orientation_and_an_assumed_one(tmp_path):
    path = save(tmp_path / "a.nii", sform_code=0, qform_code=0)
    ras, lps = (read_scan(path, assume_orientation=codes) for codes in ("RAS", "lps"))
    assert same(ras.hu, VOLUME) and same(lps.hu, HU)
    assert ras.warnings == ["orientation_assumed: RAS"] and lps.orientation == "LPS"
    mask = save(tmp_path / "m.nii", MASK, sform_code=0, qform_code=0)
    assert same(read_mask_for(mask, lps), MASK[::-1, ::-1])
    for wrong in ("RA", "RRS", "XYZ", "LRS"):
        fails(ConfigError, "not an orientation", assume_orientation=wrong)(path)


@pytest.mark.parametrize("length, refused", [(1.0000002, False), (1.0002, False), (1.01, True)])
@pytest.mark.parametrize("sform_code", [0, 1])
def test_a_rounded_rotation_is_no_fault(tmp_path, length, refused, sform_code):
    """Half a turn about z is (0, 0, 1), which rounding may leave a little above 1."""
    path = save(tmp_path / "a.nii", **{**NO_TURN, "quatern_d": length}, qoffset_x=15, qoffset_y=14,
                qoffset_z=-30, qform_code=1, sform_code=sform_code)
    if refused:
        fails(GeometryError, "qform of the header cannot be used")(path)
    else:
        assert same(read_scan(path).hu, HU)


def tilted(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    turn = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    affine = AFFINE.copy()
    affine[:3, :3] = np.array(turn) @ AFFINE[:3, :3]
    return affine


@pytest.mark.parametrize("degrees, notes", [
    (0, []), (12, []), (25, ["oblique: 25 degrees off the body's axes"])])
def test_masks_are_written_where_the_oblique_image_lies(tmp_path, degrees, notes):
    path = save(tmp_path / "a.nii", affine=tilted(degrees))
    scan = read_scan(path)
    write_mask(tmp_path / "m.nii.gz", scan.hu > 0, scan)
    image, mask = nibabel.load(path), nibabel.load(tmp_path / "m.nii.gz")
    for affine in (mask.affine, mask.get_qform()):
        assert np.allclose(image.affine, affine, atol=1e-4)
    assert scan.warnings == notes and same(np.asarray(mask.dataobj), MASK)


def test_what_is_no_stack_of_axial_slices(tmp_path):
    shear = AFFINE.copy()
    shear[1, 2] = 5.5
    fails(GeometryError, "tilted by 48 degrees")(save(tmp_path / "c.nii", affine=shear))
    sagittal = np.array([[0, 0, 5.0, 0], [0.8, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 1.0]])
    fails(GeometryError, "not axial")(save(tmp_path / "a.nii", VOLUME[:, :, :1], sagittal))
    fails(ReadError, "too small", "8 x 36")(save(tmp_path / "b.nii", ct((8, 36, 12))))


@given(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_any_order_of_axes_comes_back_bit_for_bit(order, signs):
    affine, shape = np.diag([0.0, 0, 0, 1]), np.array([5, 6, 7])[order]
    affine[order, range(3)] = np.array(signs) * np.array([0.7, 0.9, 5.0])[order]
    array = np.arange(210, dtype=np.int32).reshape(shape)
    grid = make_grid(shape, affine)
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    assert same(np.asarray(expected.dataobj), grid.canonical(array))
    assert same(grid.stored(grid.canonical(array)), array)
    assert np.allclose(expected.affine, grid.canonical_affine)


# rows 13 to 15: values

def test_nan_is_counted_and_filled_on_request(tmp_path):
    array = VOLUME.astype(np.float32)
    array[0, :20, 0], array[1, :5, 1] = np.nan, np.inf
    path = save(tmp_path / "a.nii", array)
    fails(IntensityError, "NaN or infinity", "25 voxels, 0.145 %", "--nan-fill -1024")(path)
    filled = read_scan(path, nan_fill=-1024)
    assert (filled.hu == -1024).sum() == 25 and filled.warnings == ["nan_filled: 25 voxels"]
    fails(IntensityError, "100 %")(save(tmp_path / "b.nii", np.full(SHAPE, np.nan, np.float32)))


@pytest.mark.parametrize("slope, inter", [(np.nan, 0), (0, 0), (np.inf, 0), (1, np.nan)])
def test_scaling_that_is_no_number(tmp_path, slope, inter):
    found = read_scan(save(tmp_path / "a.nii", scl_slope=slope, scl_inter=inter))
    assert found.warnings[0].startswith("scl_invalid") and same(found.hu, HU)
    raw = save(tmp_path / "raw.nii", VOLUME + 1024, scl_slope=slope, scl_inter=inter)
    fails(IntensityError, "not Hounsfield units", "--hu-offset -1024")(raw)  # never taken for HU unseen


def test_values_that_are_no_hounsfield_units(tmp_path):
    raw = save(tmp_path / "raw.nii", VOLUME + 1024)
    fails(IntensityError, "not Hounsfield units", "p1 ", "median", "p99 ", "--window LEVEL,WIDTH",
          "--hu-offset -1024")(raw)
    assert same(read_scan(raw, hu_offset=-1024).hu, HU)
    path = save(tmp_path / "grey.nii", np.clip((VOLUME + 1350) / 5.88, 0, 255).astype(np.uint8))
    air = save(tmp_path / "air.nii", np.full(SHAPE, -1000, np.int16))
    for wrong in (path, air):
        fails(IntensityError, "not Hounsfield units")(wrong)
    found = read_scan(path, window=(-600, 1500))
    assert found.window == (-600.0, 1500.0) and found.unit == "HU"
    assert np.abs(found.hu - HU).max() < 1500 / 255 + 0.1
    fails(IntensityError, "0..255", window=(-600, 1500))(save(tmp_path / "hu.nii"))
    for window in ((-600, 0), (-600, -5), (np.nan, 5), (1,)):
        fails(ConfigError, "a width above 0", window=window)(path)
    fails(ConfigError, "not both", window=(-600, 1500), hu_offset=-1024)(path)


# rows 16 and 17: where a mask lies

def test_masks_of_another_shape(tmp_path, scan):
    path = save(tmp_path / "m.nii", np.ones((40, 36, 11), np.uint8))
    for ignore in (False, True):
        fails(GeometryError, "(40, 36, 11)", "(40, 36, 12)", "never resized", call=read_mask_for,
              ignore_affine=ignore)(path, scan)
    picture = read_scan(save_picture(tmp_path / "a.png", grey((50, 40))))
    fails(GeometryError, "mask (40, 50)", "image (50, 40)", call=read_mask_for)(
        save_picture(tmp_path / "m.png", np.zeros((40, 50), np.uint8)), picture)


@pytest.mark.parametrize("place, amount", [((0, 3), 1.0), ((2, 3), -5.0), ((0, 0), 0.01), ((0, 0), 1.6)])
def test_masks_in_another_place(tmp_path, scan, place, amount):
    affine = AFFINE.copy()
    affine[place] += amount
    path = save(tmp_path / "m.nii", MASK, affine)
    fails(GeometryError, "lie in different places", "--ignore-affine", call=read_mask_for)(path, scan)
    assert same(read_mask_for(path, scan, ignore_affine=True), MASK[::-1, ::-1])
    assert any("ignore_affine" in note for note in scan.warnings)


def test_masks_of_the_wrong_kind(tmp_path, scan):
    picture = save_picture(tmp_path / "m.png", np.zeros((36, 40), np.uint8))
    fails(MaskError, "no mask for a volume", call=read_mask_for)(picture, scan)
    fails(MaskError, "a folder of masks", call=read_mask_for)(tmp_path, scan)
    fails(GeometryError, "does not say how it lies", call=read_mask_for)(
        save(tmp_path / "m.nii", VOLUME[:, :, 0]), read_scan(picture))


# rows 18 and 19: pairs by stem

@pytest.mark.parametrize("first_slice", ["top", "bottom"])
def test_stacks_and_masks_go_by_natural_order_and_pair_by_stem(tmp_path, first_slice):
    names = ["a10.png", "a9.png", "a100.png"]
    scan = read_scan(make_stack(tmp_path / "s", names), first_slice=first_slice)
    assert (scan.kind, scan.unit, scan.hu.shape) == ("stack", "grey", (44, 40, 3))
    assert (scan.names, scan.spacing_mm, scan.affine) == (("a9", "a10", "a100"), None, None)
    masks = make_stack(tmp_path / "m", names, lambda: RNG.integers(0, 3, (40, 44)).astype(np.uint8))
    found = read_mask_for(masks, scan)
    write_mask(tmp_path / "out", found, scan)
    for k, name in enumerate(scan.names if first_slice == "bottom" else scan.names[::-1]):
        for array, folder in ((scan.hu, "s"), (found, "m"), (found, "out")):
            picture = np.asarray(Image.open(tmp_path / folder / f"{name}.png"))
            assert same(turn_picture(array[:, :, k]), picture)
    (masks / "a9.png").rename(masks / "b9.png")
    wrong = fails(MaskError, "a9 has no mask", "b9 has no image", "3 slices, 3 masks", call=read_mask_for)
    wrong(masks, scan)
    (masks / "a10.png").unlink()
    fails(MaskError, "a10 has no mask", "3 slices, 2 masks", call=read_mask_for)(masks, scan)


def test_names_are_compared_in_one_unicode_form(tmp_path):
    scan = read_scan(make_stack(tmp_path / "s", ["Mu\u0308ller 1.png", "Mu\u0308ller 2.png"]))  # as a Mac packs them
    plain = [f"M\u00fcller {k}.png" for k in (1, 2)]
    for kind in ("NFC", "NFD"):
        names = [unicodedata.normalize(kind, name) for name in plain]
        masks = make_stack(tmp_path / kind, names, lambda: np.ones((40, 44), np.uint8))
        assert read_mask_for(masks, scan).all()
    write_mask(tmp_path / "out", np.ones(scan.hu.shape), scan)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == plain


def test_slices_of_several_sizes_are_no_stack(tmp_path):
    folder = make_stack(tmp_path / "s", ["a.png", "b.png"])
    save_picture(folder / "c.png", grey((40, 45)))
    fails(GeometryError, "differ in size", "(40, 45)", "(40, 44)")(folder)


# rows 20 to 22: what the values of a mask mean

@pytest.mark.parametrize("values, text", [((0, 1, 2, 3), "3: "), ((0, 1, 7), "7: "), ((0, 7), "--label-map 7=1"),
                                          ((0, 1, 255), "255: "), ((0, -1, 1), "-1: ")])
def test_unexpected_values(tmp_path, scan, values, text):
    mask = np.array(values, np.int16)[RNG.integers(0, len(values), SHAPE)]
    path = save(tmp_path / "m.nii", mask)
    fails(MaskError, text, "values (", call=read_mask_for)(path, scan)
    mapped = read_mask_for(path, scan, label_map=dict.fromkeys(set(values) - {0}, 1))
    assert same(mapped, (mask != 0)[::-1, ::-1])
    assert same(read_mask_for(path, scan, binarize=0.5), (mask > 0.5)[::-1, ::-1])


@pytest.mark.parametrize("top", [0, 1, 255])
def test_empty_and_binary_masks_are_taken_and_logged(tmp_path, scan, top):
    found = read_mask_for(save(tmp_path / "m.nii", (top * MASK).astype(np.uint8)), scan)
    assert found.dtype == np.uint8 and same(found, MASK[::-1, ::-1] * (top > 0))
    assert scan.warnings == (["mask_values: 0/255 read as 0/1"] if top == 255 else [])


def test_masks_that_were_interpolated(tmp_path, scan):
    soft = np.linspace(0, 1, VOLUME.size, dtype=np.float32).reshape(SHAPE)
    path = save(tmp_path / "m.nii", soft)
    assert same(read_mask_for(path, scan, binarize=0.5), (soft > 0.5)[::-1, ::-1])
    nan = save(tmp_path / "n.nii", np.full(SHAPE, np.nan, np.float32))
    for wrong in (path, nan, save(tmp_path / "h.nii", 1.01 * MASK)):
        fails(MaskError, "does not hold labels", "--binarize", call=read_mask_for)(wrong, scan)


@pytest.mark.parametrize("top, dtype, slope, inter", [(1, float, 1, 0), (255, np.uint8, 1 / 255, 0),
                                                      (1, np.float32, 1.0000000591, 0), (1, np.int16, 1, 1e-7)])
def test_labels_that_were_only_rounded(tmp_path, scan, top, dtype, slope, inter):
    """Saved with a scale, as by programs that store floats in a byte: 1 comes back as 1.0000000591."""
    path = save(tmp_path / "m.nii", (MASK * top).astype(dtype), scl_slope=slope, scl_inter=inter)
    assert same(read_mask_for(path, scan), MASK[::-1, ::-1])
    alone, spacing = read_mask_alone(path, (1,))
    assert same(alone, MASK[::-1, ::-1]) and spacing == pytest.approx((0.8, 0.8, 5.0))


def test_label_maps_and_lobes(tmp_path, scan):
    lobes = RNG.integers(0, 6, SHAPE).astype(np.uint8)
    path = save(tmp_path / "m.nii", lobes)
    assert same(read_mask_for(path, scan, labels=range(1, 6)), lobes[::-1, ::-1])
    for label_map in ({1: 1}, {k: 9 for k in range(6)}):
        fails(MaskError, "label map does not fit", call=read_mask_for, label_map=label_map)(path, scan)


def test_mask_pictures(tmp_path):
    scan = read_scan(save_picture(tmp_path / "a.png", grey()))
    labels = RNG.integers(0, 3, (40, 44)).astype(np.uint8)
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "p.png")
    assert same(read_mask_for(tmp_path / "p.png", scan), labels)  # indices, not luminance 0, 38, 75
    mask = (labels > 0).astype(np.uint8)
    for top in (1, 255):
        assert same(read_mask_for(save_picture(tmp_path / "b.png", mask * top), scan), mask)
    assert scan.warnings == ["mask_values: 0/255 read as 0/1"]
    blurred = save_picture(tmp_path / "m.jpg", 255 * mask, quality=60)
    fails(MaskError, "values", "binarize", call=read_mask_for)(blurred, scan)
    assert read_mask_for(blurred, scan, binarize=127).max() == 1


# rows 30 to 34: pictures

@pytest.mark.parametrize("shape", [(32, 32), (33, 35), (37, 211), (500, 300)])
def test_any_shape_comes_and_goes_at_its_own_size(tmp_path, shape):
    array = grey(shape)
    scan = read_scan(save_picture(tmp_path / "a.png", array))
    assert same(scan.hu, array) and scan.hu.dtype == np.float32
    write_mask(tmp_path / "m.png", array > 99, scan)
    assert same(read_mask_for(tmp_path / "m.png", scan), array > 99)


def test_16_bits_of_a_tiff_in_a_window(tmp_path):
    raw = (VOLUME[:, :, 0].astype(np.int32) + 1024).astype(np.uint16)
    path = save_picture(tmp_path / "a.tif", raw)
    fails(IntensityError, "16-bit", "--window", "--hu-offset")(path)
    assert np.allclose(read_scan(path, window=(0, 65535 * 2)).hu, 2.0 * raw - 65535)
    assert same(read_scan(path, hu_offset=-1024).hu, raw.astype(int) - 1024)


def test_the_type_is_told_by_content(tmp_path):
    data = save(tmp_path / "v.nii.gz").read_bytes()
    for path in (write(tmp_path / "v.dat", data), write(tmp_path / "w.nii.gz", gzip.decompress(data))):
        assert same(read_scan(path).hu, HU)  # the second is called .gz and is not packed


# rows 35 and 36: DICOM

def dicom_series(folder, slices=range(12), prefix="PLANTEDNAME", **changes):
    return toys.dicom_series(folder, VOLUME, slices, prefix, **changes)


EVEN = VOLUME // 2 * 2  # what survives the slope of 2


def test_a_series_is_the_same_volume_as_its_nifti(tmp_path):
    folder = dicom_series(tmp_path / "s")
    (folder / "readme.txt").write_text("not DICOM")
    found, twin = read_scan(folder), read_scan(save(tmp_path / "a.nii", EVEN))
    assert same(found.hu, twin.hu) and np.allclose(found.affine, twin.affine)
    assert (found.kind, found.unit, found.orientation, found.warnings) == ("volume", "HU", "LPS", [])
    mask = (found.hu > 0).astype(np.uint8)
    write_mask(tmp_path / "m.nii.gz", mask, found)
    assert same(read_mask_for(tmp_path / "m.nii.gz", twin), mask)
    single = read_scan(folder / "PLANTEDNAME_00_0.dcm")
    assert single.kind == "slice" and same(single.hu, EVEN[:, :, 0].T)
    nested = tmp_path / "nested" / "STUDY" / "SERIES"
    nested.parent.mkdir(parents=True)
    folder.rename(nested)
    assert same(read_scan(tmp_path / "nested").hu, twin.hu)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    found = read_scan(dicom_series(tmp_path / "s", ImagePositionPatient=lambda k: [-15, -14 + k, -30 + 5 * k]))
    assert found.affine[1, 2] == pytest.approx(-1.0)
    write_mask(tmp_path / "m.nii", found.hu > 0, found)
    assert same(read_mask_for(tmp_path / "m.nii", found), found.hu > 0)


@pytest.mark.parametrize("changes, texts", [
    ({"Modality": "CR"}, ["no CT", "modality CR"]), ({"NumberOfFrames": 5}, ["several frames", "dcm2niix"]),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ["only localizer images", "12 files"]),
    ({"RescaleSlope": None}, ["no RescaleSlope", "12 of 12 files", "--hu-offset"]),
    ({"ImagePositionPatient": None}, ["no ImagePositionPatient"]), ({"PixelSpacing": None}, ["no PixelSpacing"]),
    ({"SamplesPerPixel": 3}, ["colour pictures"]), ({"PixelData": b"\0\0"}, ["truncated or corrupt", "12 of 12"]),
    ({"ImagePositionPatient": [0, 0, 0]}, ["11 slices have the position of another"]),
    ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, ["position of another"]),
    *(({name: value}, ["cannot be", "12 of 12"]) for name, value in (
        ("PixelSpacing", [0, 0.8]), ("ImageOrientationPatient", [0] * 6),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), ("ImageOrientationPatient", [2, 0, 0, 0, 1, 0])))])
def test_series_that_are_refused(tmp_path, changes, texts):
    message = fails(ReadError, *texts)(dicom_series(tmp_path / "s", **changes))
    assert not [word for word in PLANTED if word in message] and "1.2.3.4" not in message


MALFORMED = {"RescaleIntercept": ["PLANTED1,0", "PLANTEDTEXT", ["1", "2"]], "RescaleSlope": ["1,0PLANTED", "1e999"],
             "PixelSpacing": [["PLANTED0,8", "0.8"], ["0.8"], ["0.8", "0.8", "0.8"]], "SliceThickness": ["5,0PLANTED"],
             "ImagePositionPatient": [["1", "PLANTED", "3"], ["1", "2"], ["1", "2", "NaN"]],
             "ImageOrientationPatient": [["1", "0", "0", "0", "1"], ["PLANTED"] * 6]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in MALFORMED.items() for value in values])
def test_malformed_numbers_are_named_without_their_value(tmp_path, name, value, caplog):
    folder = dicom_series(tmp_path / "s", range(6))
    for k, path in enumerate(sorted(folder.iterdir())[:2]):
        write_raw(path, name, value)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        message = fails(ReadError, f"{name} is malformed", "2 of 6 files")(folder)
    assert not any("PLANTED" in text for text in (message, caplog.text, *(str(one.message) for one in seen)))


def write_raw(path, name, value):
    """Replaces the text of a tag by anything, as a damaged or foreign program would leave it."""
    import pydicom
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    file = pydicom.dcmread(path)
    tag, text = Tag(pydicom.datadict.tag_for_keyword(name)), "\\".join([value] if isinstance(value, str) else value)
    data = (text + " " * (len(text) % 2)).encode()
    file._dict[tag] = RawDataElement(tag, "DS", len(data), data, 0, False, True)
    file.save_as(path, enforce_file_format=False)


@pytest.mark.parametrize("name", ["PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID",
                                  "SeriesInstanceUID"])
def test_two_people_never_become_one_scan(tmp_path, name):
    """Any one of the ids tells them apart, even where the positions would interleave into one long scan."""
    folder = dicom_series(tmp_path / "s", range(6), "A", **{name: "1.5"})
    dicom_series(folder, range(6, 10), "B", **{name: "1.6"})
    message = fails(ReadError, "mixes 2 series", "6, 4 files", "--volume 0 to --volume 1")(folder)
    assert "1.5" not in message and "1.6" not in message
    assert read_scan(folder, volume=1).hu.shape == (40, 36, 4)
    fails(ConfigError, "no series 2", volume=2)(folder)


@pytest.mark.parametrize("implicit", [False, True])
def test_dicom_without_its_mark_is_read(tmp_path, implicit):
    """Some exporters write the data set alone: no preamble, no file header."""
    import pydicom

    whole = dicom_series(tmp_path / "s")
    expected = read_scan(whole).hu
    for path in list(whole.iterdir())[::2]:
        file = pydicom.dcmread(path)
        bare = pydicom.dataset.Dataset(file)
        bare.save_as(path, implicit_vr=implicit, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM" and sniff(path) == "dicom"
    assert same(read_scan(whole).hu, expected)


def test_missing_odd_and_damaged_slices(tmp_path):
    gap = dicom_series(tmp_path / "gap", [0, 1, 2, 3, 5, 6, 7])
    fails(GeometryError, "slices are missing: 1 gaps", "10.00 mm", "5.00 mm")(gap)
    dicom_file(gap / "x.dcm", 7, np.zeros((20, 20), np.int32))
    fails(ReadError, "do not have one size", "of 8 files")(gap)
    file = next(gap.iterdir())
    file.write_bytes(file.read_bytes()[:140])
    fails(ReadError, "cannot be read", "1 damaged of 8")(gap)


def test_a_localizer_beside_the_series_is_left_out_and_said(tmp_path):
    folder = dicom_series(tmp_path / "s")
    dicom_series(folder, range(2), "SCOUT", SeriesInstanceUID="9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_series(folder, range(1), "DOSE", SeriesInstanceUID="8", Modality="SR")
    found = read_scan(folder)
    assert found.hu.shape == SHAPE and found.warnings == ["left_out: 3 files that are no axial CT"]
    within = dicom_series(tmp_path / "t")
    dicom_series(within, range(1), "SCOUT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    fails(ReadError, "localizer images within the series", "1 of 13")(within)


def test_pixels_without_a_decoder(tmp_path):
    encaps, uid = (pytest.importorskip(f"pydicom.{name}") for name in ("encaps", "uid"))
    pixels = encaps.encapsulate([b"\xff\x4fPLANTEDTEXT\xff\xd9"])
    folder = dicom_series(tmp_path / "s", syntax=uid.JPEG2000Lossless, PixelData=pixels)
    message = fails(ReadError, "cannot be decoded", "JPEG 2000", "pip install pylibjpeg")(folder)
    assert "PLANTED" not in message


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    folder = dicom_series(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    fails(MissingExtraError, "pip install 'covidsev[ct]'")(folder)


def test_nothing_about_the_patient_gets_through(tmp_path, capfd, caplog):
    """Every output, message, log and warning is searched for the planted words."""
    folder, out, scans = dicom_series(tmp_path / "s", BurnedInAnnotation="YES"), tmp_path / "out", []
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name, path in (("m.nii.gz", folder), ("m.nii", folder), ("one.nii", folder / "PLANTEDNAME_00_0.dcm")):
            scans.append(read_scan(path))
            write_mask(out / name, scans[-1].hu > 0, scans[-1])
    assert any("burned_in_annotation" in note for note in scans[0].warnings)
    texts = [caplog.text, *capfd.readouterr(), *(str(one.message) for one in seen)]
    texts += [text for scan in scans for text in (repr(scan), repr(scan.record()))]
    for data in [path.read_bytes() for path in out.iterdir()]:
        texts += [data.decode("latin1"), gzip.decompress(data).decode("latin1") if data[:1] == b"\x1f" else ""]
    assert not [word for word in (*PLANTED, "PLANTED", "1.2.3.4") if any(word in text.upper() for text in texts)]


def test_text_fields_of_a_nifti_header_are_not_passed_on(tmp_path):
    planted = {"descrip": b"PLANTEDTEXT 2020", "aux_file": b"PLANTEDNAME", "db_name": b"PLANTEDID",
               "intent_name": b"PLANTEDDOCTOR"}
    scan = read_scan(save(tmp_path / "a.nii.gz", **planted))
    write_mask(tmp_path / "m.nii", scan.hu > 0, scan)
    data = (tmp_path / "m.nii").read_bytes()
    assert all(nibabel.Nifti1Header(data[:348])[name].item() == b"" for name in planted)
    assert b"PLANTED" not in data and data[348:352] == b"\0\0\0\0"  # no extensions
    assert "PLANTED" not in repr(scan)


# the rest: paths, folders, writing

def test_paths_that_are_not_there(tmp_path):
    fails(ConfigError, "No such file")(tmp_path / "nothing.nii")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    fails(ConfigError, "loop", "check the path")(loop)
    (tmp_path / "empty").mkdir()
    fails(ReadError, "no scan in this folder")(tmp_path / "empty")


def test_odd_names_and_a_folder_with_one_nifti(tmp_path, monkeypatch):
    for name in ("a b.nii", "-x.nii", "größe ø.nii", "..x.nii"):
        folder = save(tmp_path / name / name).parent
        monkeypatch.chdir(folder)
        for path in (name, f"../{name}/{name}"):
            assert read_scan(path).source == name and same(read_scan(path).hu, HU)
    folder = save(tmp_path / "one" / "ct.nii").parent
    assert same(read_scan(folder).hu, HU)
    save(folder / "mask.nii")
    fails(ReadError, "more than one scan", "2 NIfTI files")(folder)


def test_a_mask_that_is_not_one_of_the_scan(tmp_path, scan):
    fails(ConfigError, ".nii or .nii.gz", call=write_mask)(tmp_path / "m.png", np.zeros(SHAPE), scan)
    for mask, error, words in ((np.zeros((2, 2, 2)), GeometryError, "differ in shape"),
                               (np.full(SHAPE, 300), MaskError, "0 to 255"),
                               (np.full(SHAPE, 0.5), MaskError, "does not hold labels")):
        fails(error, words, call=write_mask)(tmp_path / "m.nii", mask, scan)
    assert not (tmp_path / "m.nii").exists()


def test_a_scan_is_described_by_plain_values(tmp_path):
    record = read_scan(save(tmp_path / "a.nii")).record()
    assert json.loads(json.dumps(record)) == record and record["orientation"] == "LPS" and len(record["sha256"]) == 64
    assert record["spacing"] == pytest.approx([0.8, 0.8, 5.0])


def test_mosmed_masks_are_no_scans(data_root):
    """Real NIfTI files: LAS, 8 mm, values 0 and 1; the check for HU must refuse them as scans."""
    masks = sorted((data_root / "mosmed").rglob("*_mask.nii.gz"))
    if not masks:
        pytest.skip("needs the MosMed masks in the data folder")
    for path in masks[::25]:
        header = read_header(path)
        grid, notes = nifti_grid(header, path)
        assert (grid.orientation, notes) == ("LAS", []) and np.linalg.norm(grid.affine[:3, 2]) == pytest.approx(8.0)
        fails(IntensityError, "not Hounsfield units")(path)
