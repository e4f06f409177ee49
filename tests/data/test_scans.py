"""What a user has, good or broken: every fault is an error that names it, and no word about a patient gets through."""
import gzip
import importlib.util
import io
import json
import logging
import os
import sys
import tracemalloc
import unicodedata
import warnings

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import write_nifti

from covidsev.data import volumes
from covidsev.core import (ConfigError, CovidSevError, GeometryError, IntensityError, MaskError, MissingExtraError,
                             ReadError)
from covidsev.data.scans import (Scan, read_mask_alone, read_mask_for, read_scan, sniff, turn_picture,
                                 write_mask)
from covidsev.data.volumes import make_grid, nifti_grid, read_header

SHAPE = (40, 36, 12)
AFFINE = np.array([[-0.8, 0, 0, 15.0], [0, -0.8, 0, 14.0], [0, 0, 5.0, -30.0], [0, 0, 0, 1.0]])
RNG = np.random.default_rng(0)


def ct(shape=SHAPE) -> np.ndarray:
    """int16 in HU: a third air, a third lung, a third soft tissue, no two voxels arranged alike."""
    return RNG.choice(np.array([-1000, -850, 40], np.int16), shape) + RNG.integers(-20, 20, shape, dtype=np.int16)


VOLUME = ct()


def save(path, array=VOLUME, affine=AFFINE, **fields):
    return write_nifti(path, array, affine, **fields)


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
    (b"\0" * 400, "first bytes"), (gzip.compress(b"<html>" * 100, mtime=0), "looks like an HTML")])
def test_what_is_no_scan_is_named_by_its_first_bytes(tmp_path, content, text):
    path = tmp_path / "case.nii.gz"
    path.write_bytes(content)
    fails(ReadError, text, "case.nii.gz")(path)


def test_bad_magic(tmp_path):
    path = save(tmp_path / "a.nii")
    data = bytearray(path.read_bytes())
    data[344:348] = b"XXXX"
    path.write_bytes(data)
    fails(ReadError, "neither NIfTI", "a.nii")(path)


@pytest.mark.parametrize("content, words", [(b"NRRD0004\ntype: short\n", "an NRRD file"), (b"ObjectType = Image\nNDims = 3\n", "a MetaImage"),
                                            (b"NDims = 3\nDimSize = 4 4 4\n", "a MetaImage"), (b"PK\3\4rest", "a zip archive")])
def test_other_formats_are_named_with_the_way_out(tmp_path, content, words):
    (tmp_path / "a.mha").write_bytes(content)
    fails(ReadError, words, "convert it to NIfTI")(tmp_path / "a.mha")


def test_a_pipe_is_not_waited_for(tmp_path, scan):
    os.mkfifo(tmp_path / "pipe.nii")
    fails(ReadError, "not a regular file")(tmp_path / "pipe.nii")
    fails(ReadError, "not a regular file", call=read_mask_for)(tmp_path / "pipe.nii", scan)


def test_half_of_a_pair(tmp_path):
    path = save(tmp_path / "a.nii")
    data = bytearray(path.read_bytes())
    data[344:348] = b"ni1\0"
    path.write_bytes(data)
    fails(ReadError, "half of a pair")(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, name, keep):
    path = save(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])
    fails(ReadError, "truncated or corrupt", name)(path)


def test_a_wrong_checksum(tmp_path):
    path = save(tmp_path / "a.nii.gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 255  # inside the CRC
    path.write_bytes(data)
    fails(ReadError, "truncated or corrupt", "CRC")(path)


def test_a_flipped_byte_never_passes(tmp_path):
    path = save(tmp_path / "a.nii.gz")
    data = bytearray(path.read_bytes())
    for place in range(30, len(data) - 8, max(1, len(data) // 25)):
        broken = data.copy()
        broken[place] ^= 0x55
        path.write_bytes(broken)
        with pytest.raises(CovidSevError):
            read_scan(path)


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


@pytest.mark.parametrize("offset", [0, 1, 348, 351, 352.5, -8, np.nan, np.inf])
def test_voxels_never_begin_in_the_header(tmp_path, scan, offset):
    """Read from there, the header itself would become voxels of the first slice; in a mask as well."""
    fails(ReadError, "where the voxels begin", "at least 352")(save(tmp_path / "a.nii", vox_offset=offset))
    mask = save(tmp_path / "m.nii", (VOLUME > 0).astype(np.uint8), vox_offset=offset)
    fails(ReadError, "where the voxels begin", call=read_mask_for)(mask, scan)


def test_a_later_offset_is_honoured_and_one_behind_the_end_is_not(tmp_path):
    path = save(tmp_path / "a.nii", vox_offset=368)
    data = path.read_bytes()
    path.write_bytes(data[:352] + bytes(16) + data[352:])
    assert np.array_equal(read_scan(path).hu, VOLUME[::-1, ::-1])
    fails(ReadError, "truncated or corrupt")(save(tmp_path / "b.nii", vox_offset=10**6))


# rows 4, 5, 11, 12: shapes and types

@pytest.mark.parametrize("size", [0, -36])
def test_negative_and_zero_dimensions(tmp_path, size):
    fails(ReadError, "negative or zero dimension", str(size))(save(tmp_path / "a.nii", dim=[3, 40, size, 12, 1, 1, 1,
                                                                                            1]))


@pytest.mark.parametrize("code, name", [(128, "RGB"), (32, "complex"), (1, "binary"), (1999, "unknown code 1999")])
def test_types_that_are_no_numbers(tmp_path, code, name):
    fails(ReadError, "data type", name)(save(tmp_path / "a.nii", datatype=code))


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8", ">i2", ">f4"])
def test_every_type_and_byte_order_reads_the_same(tmp_path, dtype):
    image = nibabel.Nifti1Image(VOLUME.astype(dtype.strip(">")), AFFINE,
                                nibabel.Nifti1Header(endianness=">") if ">" in dtype else None)
    nibabel.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_scan(tmp_path / "a.nii").hu, VOLUME[::-1, ::-1])


def test_slope_and_intercept(tmp_path):
    path = save(tmp_path / "a.nii", ((VOLUME + 1024) // 2).astype(np.int16), scl_slope=2, scl_inter=-1024)
    assert np.array_equal(read_scan(path).hu, ((VOLUME + 1024) // 2 * 2 - 1024)[::-1, ::-1])


def test_four_dimensions(tmp_path):
    one = read_scan(save(tmp_path / "one.nii", VOLUME[..., None]))
    assert np.array_equal(one.hu, VOLUME[::-1, ::-1]) and any("squeezed" in note for note in one.warnings)
    path = save(tmp_path / "two.nii.gz", np.stack([VOLUME, VOLUME[::-1]], -1))
    fails(ReadError, "4-D", "--volume 0 to --volume 1")(path)
    second = read_scan(path, volume=1)
    assert np.array_equal(second.hu, VOLUME[:, ::-1]) and any("volume: 1" in note for note in second.warnings)
    fails(ConfigError, "no volume 2", volume=2)(path)


@pytest.mark.parametrize("dim", [[7, 5, 6, 12, 2, 2, 2, 6], [5, 40, 36, 12, 1, 1, 1, 1], [1, 17280, 1, 1, 1, 1, 1, 1]])
def test_other_numbers_of_dimensions(tmp_path, dim):
    fails(ReadError, f"a {dim[0]}-D array")(save(tmp_path / "a.nii", dim=dim))


def test_two_dimensions_are_a_slice(tmp_path):
    path = save(tmp_path / "a.nii", VOLUME[:, :, 3])
    one = read_scan(path)
    assert one.kind == "slice" and one.hu.shape == (36, 40) and one.spacing_mm == pytest.approx((0.8, 0.8))
    assert np.array_equal(one.hu, VOLUME[:, :, 3].T)  # LPS is how a screen shows it
    mask = (VOLUME[:, :, 3] > 0).astype(np.uint8)
    found = read_mask_for(save(tmp_path / "m.nii", mask), one)
    assert np.array_equal(found, mask.T)
    write_mask(tmp_path / "out.nii", found, one)
    back = nibabel.load(tmp_path / "out.nii")
    assert np.array_equal(np.asarray(back.dataobj), mask) and np.allclose(back.affine, nibabel.load(path).affine)


def test_a_single_sagittal_slice_is_refused(tmp_path):
    sagittal = np.array([[0, 0, 5.0, 0], [0.8, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 1.0]])
    fails(GeometryError, "not axial")(save(tmp_path / "a.nii", VOLUME[:, :, :1], sagittal))


# rows 6 to 10: geometry

@pytest.mark.parametrize("fields, text", [
    ({"srow_x": [np.nan, 0, 0, 0]}, "sform of the header holds NaN"),
    ({"qform_code": 1, "quatern_b": np.inf}, "qform of the header holds NaN"),
    ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "singular"),
    ({"srow_x": [0, -0.8, 0, 0]}, "singular"),
    ({"sform_code": 0, "qform_code": 0}, "--assume-orientation RAS"),
    ({"pixdim": [1, 0, 0.8, 5, 0, 0, 0, 0]}, "zero, negative"), ({"pixdim": [1, 0.8, -0.8, 5, 0, 0, 0, 0]}, "-0.8"),
    ({"pixdim": [1, 0.8, 0.8, np.nan, 0, 0, 0, 0]}, "not a number"),
    ({"pixdim": [1, 0.8, 0.8, 2.5, 0, 0, 0, 0]}, "sform and voxel sizes disagree"),
    ({"qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 0, "pixdim": [1, 0.8, 0.8, 5, 0, 0, 0, 0]},
     "sform and qform disagree")])
def test_geometry_that_cannot_be_believed(tmp_path, fields, text):
    message = fails(GeometryError, text, "a.nii")(save(tmp_path / "a.nii", **fields))
    if "voxel sizes disagree" in text:
        assert "sform [0.8, 0.8, 5.0] mm" in message and "pixdim [0.8, 0.8, 2.5] mm" in message
    if "disagree" in text and "qform" in text:
        assert "sform -0.8 0 0 15" in message and "qform 0.8 0 0" in message  # both are shown


def test_no_orientation_and_an_assumed_one(tmp_path):
    path = save(tmp_path / "a.nii", sform_code=0, qform_code=0)
    ras, lps = read_scan(path, assume_orientation="RAS"), read_scan(path, assume_orientation="lps")
    assert np.array_equal(ras.hu, VOLUME) and np.array_equal(lps.hu, VOLUME[::-1, ::-1])
    assert ras.warnings == ["orientation_assumed: RAS"] and lps.orientation == "LPS"
    mask = save(tmp_path / "m.nii", (VOLUME > 0).astype(np.uint8), sform_code=0, qform_code=0)
    assert np.array_equal(read_mask_for(mask, lps), (VOLUME > 0)[::-1, ::-1])
    for wrong in ("RA", "RRS", "XYZ", "LRS"):
        fails(ConfigError, "not an orientation", assume_orientation=wrong)(path)


@pytest.mark.parametrize("length, refused", [(1.0000002, False), (1.0002, False), (1.01, True)])
@pytest.mark.parametrize("sform_code", [0, 1])
def test_a_rounded_rotation_is_no_fault(tmp_path, length, refused, sform_code):
    """Half a turn about z is (0, 0, 1), which rounding may leave a little above 1."""
    path = save(tmp_path / "a.nii", quatern_b=0, quatern_c=0, quatern_d=length, qoffset_x=15, qoffset_y=14,
                qoffset_z=-30, qform_code=1, sform_code=sform_code, pixdim=[1, 0.8, 0.8, 5, 0, 0, 0, 0])
    if refused:
        fails(GeometryError, "qform of the header cannot be used")(path)
    else:
        assert np.array_equal(read_scan(path).hu, VOLUME[::-1, ::-1])


def tilted(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    return affine


def test_oblique_scans(tmp_path):
    assert read_scan(save(tmp_path / "a.nii", affine=tilted(10))).warnings == []
    assert read_scan(save(tmp_path / "b.nii",
                          affine=tilted(25))).warnings == ["oblique: 25 degrees off the body's axes"]
    shear = AFFINE.copy()
    shear[1, 2] = 5.5  # a tilted gantry: the axes are not square on each other
    fails(GeometryError, "tilted by 48 degrees")(save(tmp_path / "c.nii", affine=shear))


@given(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_any_order_of_axes_comes_back_bit_for_bit(order, signs):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (to, sign) in enumerate(zip(order, signs)):
        affine[to, axis] = sign * (0.7, 0.9, 5.0)[to]
    shape = [(5, 6, 7)[to] for to in order]
    array = np.arange(210).reshape(shape)
    grid = make_grid(shape, affine)
    canonical = grid.canonical(array)
    assert canonical.shape == (5, 6, 7) and np.array_equal(grid.stored(canonical), array)
    assert np.array_equal(np.sign(grid.canonical_affine[:3, :3]), np.eye(3))
    voxel = (3, 2, 4)
    where = grid.canonical_affine @ (*voxel, 1)
    own = np.rint(np.linalg.solve(affine, where)[:3]).astype(int)
    assert canonical[voxel] == array[tuple(own)]  # the same millimetre holds the same voxel
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(array.astype(np.int32), affine))
    assert np.array_equal(np.asarray(expected.dataobj), canonical)
    assert "".join(nibabel.aff2axcodes(affine)) == grid.orientation


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
    assert found.warnings[0].startswith("scl_invalid") and np.array_equal(found.hu, VOLUME[::-1, ::-1])
    raw = save(tmp_path / "raw.nii", VOLUME + 1024, scl_slope=slope, scl_inter=inter)
    fails(IntensityError, "not Hounsfield units", "--hu-offset -1024")(raw)  # never taken for HU unseen


def test_values_that_are_no_hounsfield_units(tmp_path):
    raw = save(tmp_path / "raw.nii", VOLUME + 1024)
    message = fails(IntensityError, "not Hounsfield units", "median", "--window LEVEL,WIDTH", "--hu-offset -1024")(raw)
    assert "p1 " in message and "p99 " in message
    assert np.array_equal(read_scan(raw, hu_offset=-1024).hu, VOLUME[::-1, ::-1])
    grey = np.clip((VOLUME + 1350) / 1500 * 255, 0, 255)
    path = save(tmp_path / "grey.nii", grey.astype(np.uint8))
    fails(IntensityError, "not Hounsfield units")(path)
    found = read_scan(path, window=(-600, 1500))
    assert found.window == (-600.0, 1500.0) and found.unit == "HU"
    assert np.abs(found.hu - VOLUME[::-1, ::-1]).max() < 1500 / 255 + 0.1
    fails(IntensityError, "0..255", window=(-600, 1500))(save(tmp_path / "hu.nii"))
    for window in ((-600, 0), (-600, -5), (np.nan, 5), (1,)):
        fails(ConfigError, "a width above 0", window=window)(path)
    fails(ConfigError, "not both", window=(-600, 1500), hu_offset=-1024)(path)


def test_air_only_is_no_chest(tmp_path):
    fails(IntensityError, "not Hounsfield units")(save(tmp_path / "a.nii", np.full(SHAPE, -1000, np.int16)))


# rows 16 and 17: where a mask lies

def test_masks_of_another_shape(tmp_path, scan):
    path = save(tmp_path / "m.nii", np.ones((40, 36, 11), np.uint8))
    for ignore in (False, True):
        fails(GeometryError, "(40, 36, 11)", "(40, 36, 12)", "never resized", call=read_mask_for,
              ignore_affine=ignore)(path, scan)
    picture = read_scan(save_picture(tmp_path / "a.png", grey((50, 40))))
    fails(GeometryError, "mask (40, 50)", "image (50, 40)", call=read_mask_for)(
        save_picture(tmp_path / "m.png", np.zeros((40, 50), np.uint8)), picture)


@pytest.mark.parametrize("change", [{(0, 3): 1.0}, {(2, 3): -5.0}, {(0, 0): 0.01}, {(0, 0): 1.6}])
def test_masks_in_another_place(tmp_path, scan, change):
    affine = AFFINE.copy()
    for place, amount in change.items():
        affine[place] += amount
    mask = (VOLUME > 0).astype(np.uint8)
    path = save(tmp_path / "m.nii", mask, affine)
    fails(GeometryError, "lie in different places", "--ignore-affine", call=read_mask_for)(path, scan)
    assert np.array_equal(read_mask_for(path, scan, ignore_affine=True), mask[::-1, ::-1])
    assert any("ignore_affine" in note for note in scan.warnings)


def test_a_mask_in_another_order_of_axes(tmp_path, scan):
    mask = RNG.integers(0, 3, SHAPE).astype(np.uint8)
    image = nibabel.Nifti1Image(mask, AFFINE).as_reoriented([[2, 1], [0, -1], [1, 1]])
    nibabel.save(image, tmp_path / "m.nii.gz")
    assert np.array_equal(read_mask_for(tmp_path / "m.nii.gz", scan), mask[::-1, ::-1])


def test_masks_of_the_wrong_kind(tmp_path, scan):
    picture = save_picture(tmp_path / "m.png", np.zeros((36, 40), np.uint8))
    fails(MaskError, "no mask for a volume", call=read_mask_for)(picture, scan)
    fails(MaskError, "a folder of masks", call=read_mask_for)(tmp_path, scan)
    slice_ = read_scan(save_picture(tmp_path / "a.png", grey((36, 40))))
    fails(GeometryError, "does not say how it lies", call=read_mask_for)(save(tmp_path / "m.nii", VOLUME[:, :, 0]),
                                                                         slice_)


# rows 18 and 19: pairs by stem

def save_picture(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def grey(shape=(40, 44)) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def make_stack(folder, names, shape=(40, 44)):
    folder.mkdir()
    for name in names:
        save_picture(folder / name, grey(shape))
    return folder


def test_a_stack_reads_by_natural_order_top_first(tmp_path):
    folder = make_stack(tmp_path / "s", ["IMG-10.png", "IMG-9.png", "IMG-100.png"])
    found = read_scan(folder)
    assert (found.kind, found.unit, found.hu.shape, found.spacing_mm, found.affine) == ("stack", "grey", (44, 40, 3),
                                                                                        None, None)
    assert found.names == ("IMG-9", "IMG-10", "IMG-100")
    top = np.asarray(Image.open(folder / "IMG-9.png"))
    assert np.array_equal(turn_picture(found.hu[:, :, -1]), top)
    assert np.array_equal(turn_picture(read_scan(folder, first_slice="bottom").hu[:, :, 0]), top)


@pytest.mark.parametrize("first_slice", ["top", "bottom"])
def test_masks_of_a_stack_pair_by_stem_and_go_back_by_stem(tmp_path, first_slice):
    names = ["a10.png", "a2.png", "a1.png"]
    folder = make_stack(tmp_path / "s", names)
    scan = read_scan(folder, first_slice=first_slice)
    masks = {name: RNG.integers(0, 3, (40, 44)).astype(np.uint8) for name in names}
    (tmp_path / "m").mkdir()
    for name, mask in masks.items():
        save_picture(tmp_path / "m" / name, mask)
    found = read_mask_for(tmp_path / "m", scan)
    write_mask(tmp_path / "out", found, scan)
    for k, name in enumerate(["a10.png", "a2.png", "a1.png"] if first_slice == "top" else ["a1.png", "a2.png",
                                                                                           "a10.png"]):
        assert np.array_equal(turn_picture(found[:, :, k]), masks[name])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), masks[name])
    (tmp_path / "m" / "a2.png").rename(tmp_path / "m" / "b2.png")
    fails(MaskError, "a2 has no mask", "b2 has no image", "3 slices, 3 masks", call=read_mask_for)(tmp_path / "m", scan)
    (tmp_path / "m" / "a1.png").unlink()
    fails(MaskError, "a1 has no mask", "3 slices, 2 masks", call=read_mask_for)(tmp_path / "m", scan)


def test_names_are_compared_in_one_unicode_form(tmp_path):
    folder = make_stack(tmp_path / "s", ["Mu\u0308ller 1.png", "Mu\u0308ller 2.png"])  # as a Mac packs them
    scan = read_scan(folder)
    for kind in ("NFC", "NFD"):
        masks = make_stack(tmp_path / kind, [unicodedata.normalize(kind, f"M\u00fcller {k}.png") for k in (1, 2)])
        for path in masks.iterdir():
            save_picture(path, np.full((40, 44), 1, np.uint8))
        assert read_mask_for(masks, scan).all()
        write_mask(tmp_path / "out", np.ones(scan.hu.shape), scan)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["M\u00fcller 1.png", "M\u00fcller 2.png"]


def test_slices_of_several_sizes_are_no_stack(tmp_path):
    folder = make_stack(tmp_path / "s", ["a.png", "b.png"])
    save_picture(folder / "c.png", grey((40, 45)))
    fails(GeometryError, "differ in size", "(40, 45)", "(40, 44)")(folder)


# rows 20 to 22: what the values of a mask mean

@pytest.mark.parametrize("values, text", [
    ((0, 1, 2, 3), "3: "), ((0, 1, 7), "7: "), ((0, 7), "--label-map 7=1"), ((0, 1, 255), "255: "), ((0, -1, 1), "-1: ")])
def test_unexpected_values(tmp_path, scan, values, text):
    mask = np.array(values, np.int16)[RNG.integers(0, len(values), SHAPE)]
    path = save(tmp_path / "m.nii", mask)
    fails(MaskError, text, "values (", call=read_mask_for)(path, scan)
    mapped = read_mask_for(path, scan, label_map=dict.fromkeys(set(values) - {0}, 1))
    assert np.array_equal(mapped, (mask != 0)[::-1, ::-1])
    assert np.array_equal(read_mask_for(path, scan, binarize=0.5), (mask > 0.5)[::-1, ::-1])


@pytest.mark.parametrize("top", [1, 255])
def test_binary_masks_are_taken_and_logged(tmp_path, scan, top):
    mask = (VOLUME > 0)
    found = read_mask_for(save(tmp_path / "m.nii", (top * mask).astype(np.uint8)), scan)
    assert found.dtype == np.uint8 and np.array_equal(found, mask[::-1, ::-1])
    assert scan.warnings == (["mask_values: 0/255 read as 0/1"] if top == 255 else [])


def test_an_empty_mask_is_a_mask(tmp_path, scan):
    assert not read_mask_for(save(tmp_path / "m.nii", np.zeros(SHAPE, np.uint8)), scan).any()


def test_masks_that_were_interpolated(tmp_path, scan):
    soft = np.linspace(0, 1, VOLUME.size, dtype=np.float32).reshape(SHAPE)
    path = save(tmp_path / "m.nii", soft)
    fails(MaskError, "does not hold labels", "--binarize", call=read_mask_for)(path, scan)
    assert np.array_equal(read_mask_for(path, scan, binarize=0.5), (soft > 0.5)[::-1, ::-1])
    fails(MaskError, "does not hold labels", call=read_mask_for)(
        save(tmp_path / "n.nii", np.full(SHAPE, np.nan, np.float32)), scan)
    whole = save(tmp_path / "f.nii", (VOLUME > 0).astype(np.float64))  # floats are fine where they are whole
    assert np.array_equal(read_mask_for(whole, scan), (VOLUME > 0)[::-1, ::-1])


@pytest.mark.parametrize("dtype, slope, inter", [(np.uint8, 1 / 255, 0), (np.float32, 1.0000000591, 0), (np.int16, 1, 1e-7)])
def test_labels_that_were_only_rounded(tmp_path, scan, dtype, slope, inter):
    """Saved with a scale, as by programs that store floats in a byte: 1 comes back as 1.0000000591."""
    mask = (VOLUME > 0)
    stored = (mask * (255 if dtype == np.uint8 else 1)).astype(dtype)
    path = save(tmp_path / "m.nii", stored, scl_slope=slope, scl_inter=inter)
    assert np.array_equal(read_mask_for(path, scan), mask[::-1, ::-1])
    alone, spacing = read_mask_alone(path, (1,))
    assert np.array_equal(alone, mask[::-1, ::-1]) and spacing == pytest.approx((0.8, 0.8, 5.0))
    half = save(tmp_path / "h.nii", np.where(mask, 1.01, 0).astype(np.float32))
    fails(MaskError, "does not hold labels", call=read_mask_for)(half, scan)


def test_label_maps_and_lobes(tmp_path, scan):
    lobes = RNG.integers(0, 6, SHAPE).astype(np.uint8)
    path = save(tmp_path / "m.nii", lobes)
    fails(MaskError, "unexpected values", call=read_mask_for)(path, scan)
    assert np.array_equal(read_mask_for(path, scan, labels=range(1, 6)), lobes[::-1, ::-1])
    fails(MaskError, "label map does not fit", call=read_mask_for, label_map={1: 1})(path, scan)
    fails(MaskError, "label map does not fit", call=read_mask_for, label_map={k: 9 for k in range(6)})(path, scan)


def test_mask_pictures(tmp_path):
    scan = read_scan(save_picture(tmp_path / "a.png", grey()))
    labels = RNG.integers(0, 3, (40, 44)).astype(np.uint8)
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "p.png")
    assert np.array_equal(read_mask_for(tmp_path / "p.png", scan), labels)  # indices, not luminance 0, 38, 75
    for top in (1, 255):
        mask = (labels > 0).astype(np.uint8)
        assert np.array_equal(read_mask_for(save_picture(tmp_path / "b.png", mask * top), scan), mask)
    assert scan.warnings == ["mask_values: 0/255 read as 0/1"]
    blurred = save_picture(tmp_path / "m.jpg", 255 * (labels > 0).astype(np.uint8), quality=60)
    fails(MaskError, "values", "binarize", call=read_mask_for)(blurred, scan)
    assert read_mask_for(blurred, scan, binarize=127).max() == 1


# rows 30 to 34: pictures

@pytest.mark.parametrize("shape", [(32, 32), (33, 35), (37, 211), (500, 300)])
def test_any_shape_comes_and_goes_at_its_own_size(tmp_path, shape):
    array = grey(shape)
    scan = read_scan(save_picture(tmp_path / "a.png", array))
    assert np.array_equal(scan.hu, array) and scan.hu.dtype == np.float32
    write_mask(tmp_path / "m.png", array > 99, scan)
    assert np.array_equal(read_mask_for(tmp_path / "m.png", scan), array > 99)


def test_a_tiny_volume(tmp_path):
    fails(ReadError, "too small", "8 x 36")(save(tmp_path / "a.nii", ct((8, 36, 12))))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits(tmp_path, suffix):
    hu = VOLUME[:, :, 0].astype(np.int32)
    path = save_picture(tmp_path / f"a.{suffix}", (hu + 1024).astype(np.uint16))
    fails(IntensityError, "16-bit", "--window", "--hu-offset")(path)
    assert np.array_equal(read_scan(path, hu_offset=-1024).hu, hu)
    windowed = read_scan(path, window=(0, 65535 * 2))
    assert np.allclose(windowed.hu, 2.0 * (hu + 1024) - 65535)
    fails(ConfigError, "8-bit picture cannot hold", hu_offset=-1024)(save_picture(tmp_path / "b.png", grey()))


def test_the_type_is_told_by_content(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64), 100, np.uint8)).save(buffer, "JPEG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert (read_scan(tmp_path / "a.png").hu == 100).all()
    save(tmp_path / "v.nii.gz").rename(tmp_path / "v.dat")
    assert sniff(tmp_path / "v.dat") == "nifti" and read_scan(tmp_path / "v.dat").kind == "volume"
    (tmp_path / "w.nii.gz").write_bytes(gzip.decompress((tmp_path / "v.dat").read_bytes()))
    assert np.array_equal(read_scan(tmp_path / "w.nii.gz").hu, VOLUME[::-1, ::-1])  # called .gz and not packed


# rows 35 and 36: DICOM

needs_pydicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="needs pydicom")
PLANTED = ("PLANTEDNAME", "PLANTEDID", "19010101", "PLANTEDHOSPITAL", "PLANTEDDOCTOR", "PLANTEDTEXT")


def dicom_file(path, k, array, **changes):
    """Slice k of a CT, in HU through slope and intercept, with a planted patient."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = changes.pop("syntax", ExplicitVRLittleEndian)
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    file.PatientName, file.PatientID, file.PatientBirthDate = "PLANTEDNAME^A", "PLANTEDID", "19010101"
    file.InstitutionName, file.ReferringPhysicianName, file.StudyDescription = "PLANTEDHOSPITAL", "PLANTEDDOCTOR", "PLANTEDTEXT"
    file.Modality, file.SeriesInstanceUID, file.ImageType = "CT", "1.2.3.4", ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.ImagePositionPatient, file.ImageOrientationPatient = [-15, -14, -30 + 5 * k], [1, 0, 0, 0, 1, 0]
    file.PixelSpacing, file.SliceThickness, file.Rows, file.Columns = [0.8, 0.8], 5, *array.shape
    file.RescaleSlope, file.RescaleIntercept, file.SamplesPerPixel, file.InstanceNumber = 2, -2000, 1, 99 - k
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.PhotometricInterpretation, file.PixelData = "MONOCHROME2", ((array + 2000) // 2).astype(np.uint16).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


def dicom_series(folder, slices=range(12), prefix="PLANTEDNAME", **changes):
    """A series in a folder; the first columns of VOLUME are the first columns of each slice."""
    folder.mkdir(exist_ok=True)
    for k in slices:
        dicom_file(folder / f"{prefix}_{(5 * k) % 12:02d}.dcm", k, VOLUME[:, :, k].T.astype(np.int32), **changes)
    return folder


EVEN = VOLUME // 2 * 2  # what survives the slope of 2


@needs_pydicom
def test_a_series_is_the_same_volume_as_its_nifti(tmp_path):
    folder = dicom_series(tmp_path / "s")
    (folder / "readme.txt").write_text("not DICOM")
    found, twin = read_scan(folder), read_scan(save(tmp_path / "a.nii", EVEN))
    assert np.array_equal(found.hu, twin.hu) and np.allclose(found.affine, twin.affine)
    assert (found.kind, found.unit, found.orientation, found.warnings) == ("volume", "HU", "LPS", [])
    mask = (found.hu > 0).astype(np.uint8)
    write_mask(tmp_path / "m.nii.gz", mask, found)
    assert np.array_equal(read_mask_for(tmp_path / "m.nii.gz", twin), mask)
    nested = tmp_path / "nested" / "STUDY" / "SERIES"
    nested.parent.mkdir(parents=True)
    folder.rename(nested)
    assert np.array_equal(read_scan(tmp_path / "nested").hu, twin.hu)


@needs_pydicom
def test_one_dicom_file_is_a_slice(tmp_path):
    folder = dicom_series(tmp_path / "s")
    found = read_scan(folder / "PLANTEDNAME_00.dcm")
    assert found.kind == "slice" and np.array_equal(found.hu, EVEN[:, :, 0].T)


@needs_pydicom
def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(12):
        dicom_file(folder / f"{k}.dcm", k, VOLUME[:, :, k].T.astype(np.int32), ImagePositionPatient=[-15, -14 + k, -30 +
                                                                                                     5 * k])
    found = read_scan(folder)
    assert found.affine[1, 2] == pytest.approx(-1.0)
    write_mask(tmp_path / "m.nii", found.hu > 0, found)
    assert np.array_equal(read_mask_for(tmp_path / "m.nii", found), found.hu > 0)


@needs_pydicom
@pytest.mark.parametrize("changes, error, texts", [
    ({"Modality": "CR"}, ReadError, ["no CT", "modality CR"]),
    ({"Modality": "DX"}, ReadError, ["modality DX"]),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ReadError, ["only localizer images", "12 files"]),
    ({"RescaleSlope": None}, ReadError, ["no RescaleSlope", "12 of 12 files", "--hu-offset"]),
    ({"ImagePositionPatient": None}, ReadError, ["no ImagePositionPatient"]),
    ({"PixelSpacing": None}, ReadError, ["no PixelSpacing"]),
    ({"NumberOfFrames": 5}, ReadError, ["several frames", "dcm2niix"]),
    ({"SamplesPerPixel": 3}, ReadError, ["colour pictures"]),
    ({"ImagePositionPatient": [0, 0, 0]}, ReadError, ["11 slices have the position of another"]),
    ({"PixelData": b"\0\0"}, ReadError, ["truncated or corrupt", "12 of 12"]),
    ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, ReadError, ["position of another"])])
def test_series_that_are_refused(tmp_path, changes, error, texts):
    message = fails(error, *texts)(dicom_series(tmp_path / "s", **changes))
    assert not [word for word in PLANTED if word in message] and "1.2.3.4" not in message


MALFORMED = {"RescaleIntercept": ["PLANTED1,0", "PLANTEDTEXT", ["1", "2"]], "RescaleSlope": ["1,0PLANTED", "1e999"],
             "PixelSpacing": [["PLANTED0,8", "0.8"], ["0.8"], ["0.8", "0.8", "0.8"]], "SliceThickness": ["5,0PLANTED"],
             "ImagePositionPatient": [["1", "PLANTED", "3"], ["1", "2"], ["1", "2", "NaN"]],
             "ImageOrientationPatient": [["1", "0", "0", "0", "1"], ["PLANTED"] * 6]}


@needs_pydicom
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


@needs_pydicom
@pytest.mark.parametrize("changes", [{"ImageOrientationPatient": [0] * 6}, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
                                     {"PixelSpacing": [0, 0.8]}, {"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}])
def test_numbers_that_cannot_be(tmp_path, changes):
    fails(ReadError, "cannot be", "12 of 12")(dicom_series(tmp_path / "s", **changes))


@needs_pydicom
@pytest.mark.parametrize("name", ["PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "SeriesInstanceUID"])
def test_two_people_never_become_one_scan(tmp_path, name):
    """Any one of the ids tells them apart, even where the positions would interleave into one long scan."""
    folder = dicom_series(tmp_path / "s", range(6), "A", **{name: "1.5"})
    dicom_series(folder, range(6, 12), "B", **{name: "1.6"})
    message = fails(ReadError, "mixes 2 series", "6, 6 files")(folder)
    assert "1.5" not in message and "1.6" not in message


@needs_pydicom
def test_positions_must_lie_on_one_line(tmp_path):
    """Two scans whose ids were all blanked betray themselves by where their slices are."""
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(12):
        dicom_file(folder / f"{k}.dcm", k, VOLUME[:, :, k].T.astype(np.int32),
                   ImagePositionPatient=[-15 + 40 * (k % 2), -14, -30 + 5 * k])
    fails(GeometryError, "do not lie on one line", "36.4 mm")(folder)


@needs_pydicom
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
    assert np.array_equal(read_scan(whole).hu, expected)


@needs_pydicom
def test_missing_and_mixed_slices(tmp_path):
    fails(GeometryError, "slices are missing: 1 gaps", "10.00 mm", "5.00 mm")(
        dicom_series(tmp_path / "gap", [0, 1, 2, 3, 5, 6, 7]))
    folder = dicom_series(tmp_path / "mixed", range(8))
    dicom_series(folder, range(4), "B", SeriesInstanceUID="5.6.7")
    message = fails(ReadError, "mixes 2 series", "8, 4 files", "--volume 0 to --volume 1")(folder)
    assert "5.6.7" not in message
    assert read_scan(folder, volume=1).hu.shape == (40, 36, 4)
    fails(ConfigError, "no series 2", volume=2)(folder)
    sizes = dicom_series(tmp_path / "sizes", range(6))
    dicom_file(sizes / "x.dcm", 7, np.zeros((20, 20), np.int32))
    fails(ReadError, "do not have one size", "of 7 files")(sizes)


@needs_pydicom
def test_a_localizer_beside_the_series_is_left_out_and_said(tmp_path):
    folder = dicom_series(tmp_path / "s")
    dicom_series(folder, range(2), "SCOUT", SeriesInstanceUID="9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_series(folder, range(1), "DOSE", SeriesInstanceUID="8", Modality="SR")
    found = read_scan(folder)
    assert found.hu.shape == SHAPE and found.warnings == ["left_out: 3 files that are no axial CT"]
    within = dicom_series(tmp_path / "t")
    dicom_series(within, range(1), "SCOUT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    fails(ReadError, "localizer images within the series", "1 of 13")(within)


@needs_pydicom
def test_pixels_without_a_decoder(tmp_path):
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    folder = dicom_series(tmp_path / "s", syntax=JPEG2000Lossless,
                          PixelData=encapsulate([b"\xff\x4fPLANTEDTEXT\xff\xd9"]))
    message = fails(ReadError, "cannot be decoded", "JPEG 2000", "pip install pylibjpeg")(folder)
    assert "PLANTED" not in message


@needs_pydicom
def test_damaged_dicom(tmp_path):
    folder = dicom_series(tmp_path / "s")
    file = folder / "PLANTEDNAME_00.dcm"
    file.write_bytes(file.read_bytes()[:140])
    fails(ReadError, "cannot be read", "1 damaged of 12")(folder)


@needs_pydicom
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    folder = dicom_series(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    fails(MissingExtraError, "pip install 'covidsev[ct]'")(folder)


@needs_pydicom
def test_nothing_about_the_patient_gets_through(tmp_path, capfd, caplog):
    """Every output, message, log and warning is searched for the planted words."""
    folder = dicom_series(tmp_path / "s", BurnedInAnnotation="YES")
    caplog.set_level(logging.DEBUG)
    out = tmp_path / "out"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scan = read_scan(folder)
        write_mask(out / "m.nii.gz", scan.hu > 0, scan)
        write_mask(out / "m.nii", scan.hu > 0, scan)
        single = read_scan(folder / "PLANTEDNAME_00.dcm")
        write_mask(out / "slice.nii", single.hu > 0, single)
    assert any("burned_in_annotation" in note for note in scan.warnings)
    texts = [repr(scan.record()), repr(single.record()), repr(scan), repr(single), caplog.text, *capfd.readouterr(),
             *(str(one.message) for one in seen)]
    texts += [gzip.decompress(path.read_bytes()).decode("latin1") if path.suffix == ".gz" else path.read_text("latin1")
              for path in out.iterdir()] + [path.read_bytes().decode("latin1") for path in out.iterdir()]
    assert not [word for word in (*PLANTED, "PLANTED", "1.2.3.4") if any(word in text.upper() for text in texts)]


def test_text_fields_of_a_nifti_header_are_not_passed_on(tmp_path):
    path = save(tmp_path / "a.nii.gz", descrip=b"PLANTEDTEXT 2020", aux_file=b"PLANTEDNAME", db_name=b"PLANTEDID",
                intent_name=b"PLANTEDDOCTOR")
    scan = read_scan(path)
    write_mask(tmp_path / "m.nii", scan.hu > 0, scan)
    data = (tmp_path / "m.nii").read_bytes()
    raw = nibabel.Nifti1Header(data[:348])
    assert all(raw[name].item() == b"" for name in ("descrip", "aux_file", "db_name", "intent_name"))
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


@pytest.mark.parametrize("name", ["a b.nii", "-x.nii", "größe ø.nii", "..x.nii"])
def test_odd_names(tmp_path, name, monkeypatch):
    save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert read_scan(name).source == name and np.array_equal(read_scan(os.path.join("..", tmp_path.name, name)).hu,
                                                             VOLUME[::-1, ::-1])


def test_a_folder_with_one_nifti_is_that_scan(tmp_path):
    (tmp_path / "one").mkdir()
    save(tmp_path / "one" / "ct.nii")
    assert np.array_equal(read_scan(tmp_path / "one").hu, VOLUME[::-1, ::-1])
    save(tmp_path / "one" / "mask.nii")
    fails(ReadError, "more than one scan", "2 NIfTI files")(tmp_path / "one")


def test_a_mask_that_is_not_one_of_the_scan(tmp_path, scan):
    write = fails(GeometryError, "differ in shape", call=write_mask)
    write(tmp_path / "m.nii", np.zeros((2, 2, 2)), scan)
    fails(ConfigError, ".nii or .nii.gz", call=write_mask)(tmp_path / "m.png", np.zeros(scan.hu.shape), scan)
    fails(MaskError, "0 to 255", call=write_mask)(tmp_path / "m.nii", np.full(scan.hu.shape, 300), scan)
    fails(MaskError, "does not hold labels", call=write_mask)(tmp_path / "m.nii", np.full(scan.hu.shape, 0.5), scan)
    assert not (tmp_path / "m.nii").exists()


@pytest.mark.parametrize("degrees", [0, 12])
def test_written_masks_lie_where_the_image_lies(tmp_path, degrees):
    path = save(tmp_path / "a.nii", affine=tilted(degrees))
    scan = read_scan(path)
    write_mask(tmp_path / "m.nii.gz", scan.hu > 0, scan)
    image, mask = nibabel.load(path), nibabel.load(tmp_path / "m.nii.gz")
    assert np.allclose(image.affine, mask.affine, atol=1e-5) and np.allclose(mask.get_qform(), mask.get_sform(),
                                                                             atol=1e-4)
    assert np.array_equal(np.asarray(mask.dataobj), VOLUME > 0)


def test_a_scan_is_described_by_plain_values(tmp_path):
    record = read_scan(save(tmp_path / "a.nii")).record()
    assert json.loads(json.dumps(record)) == record and record["orientation"] == "LPS" and len(record["sha256"]) == 64
    assert record["spacing"] == pytest.approx([0.8, 0.8, 5.0])


def test_mosmed_masks_read_as_they_are(data_root):
    """Real NIfTI files: LAS, 8 mm, values 0 and 1. They are masks, so the check for HU must refuse them as scans."""
    masks = sorted((data_root / "mosmed").rglob("*_mask.nii.gz"))
    if not masks:
        pytest.skip("needs the MosMed masks in the data folder")
    for path in masks[::25]:
        header = read_header(path)
        grid, notes = nifti_grid(header, path)
        assert (grid.orientation, notes) == ("LAS", []) and np.linalg.norm(grid.affine[:3, 2]) == pytest.approx(8.0)
        fails(IntensityError, "not Hounsfield units")(path)
        blank = Scan(np.zeros(grid.canonical(np.empty(grid.shape)).shape, np.float32), "volume", "HU", "", "",
                     grid.canonical_affine, (1.0, 1.0, 8.0), grid=grid)
        assert read_mask_for(path, blank).max() == 1
