"""Pictures, masks and maps from files: every encoding, every refusal; and pairs by stem."""
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from PIL import Image, ImageFile

from covidsev.core import ConfigError, IntensityError, MaskError, ReadError, data_root
from covidsev.data.pictures import (list_pictures, pair_by_stem, palette_picture, read_bytes, read_image,
                                    read_labels, read_map, read_mask, resize_image, resize_labels)

LABELS = np.random.default_rng(0).choice(3, (48, 40), p=[0.7, 0.2, 0.1]).astype(np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (48, 40), dtype=np.uint8)


def save(path, array, **options):
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(path, **options)
    return path


def with_palette(path, indices, colours):
    picture = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    picture.putpalette(colours)
    return save(path, picture)


def png(width, height, bits=8, colour=0, rows=b""):
    """A PNG of these rows, whatever its header claims."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(
        ">I", zlib.crc32(name + data)) for name, data in chunks)


# --- pictures ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "dat"])
def test_type_is_told_by_content_and_equal_channels_become_one(tmp_path, mode, suffix):
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(GREY).convert(mode), format="PNG")
    assert_array_equal(read_image(path), GREY)


def test_a_jpeg_under_png_and_alpha_that_is_not_opaque(tmp_path):
    smooth = np.add.outer(np.arange(48), np.arange(40)).astype(np.uint8)
    for array in (smooth, np.dstack([smooth] * 3)):  # a few coloured pixels of JPEG rounding are allowed
        path = save(tmp_path / "a.png", array, format="JPEG", quality=90)
        assert np.abs(read_image(path).astype(int) - smooth).max() < 10
    transparent = np.dstack([GREY, GREY, GREY, 255 - GREY])
    assert_array_equal(read_image(save(tmp_path / "b.png", transparent)), GREY)


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2)], ids=["grey", "colour", "grey alpha"])
@pytest.mark.parametrize("reader", [read_image, read_mask, read_labels, read_map])
def test_sixteen_bit_pictures_are_refused(tmp_path, colour, channels, reader):
    (tmp_path / "deep.png").write_bytes(png(40, 48, 16, colour, bytes(48 * (1 + 40 * channels * 2))))
    pytest.raises(ReadError, reader, tmp_path / "deep.png").match("(?s)16-bit picture.*8 bits.*level -600")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_truncated_pictures_are_refused(tmp_path, suffix, part):
    path = save(tmp_path / f"cut.{suffix}", GREY)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(ReadError, match=f"(?s)(truncated|cannot? be read|not a picture).*cut.{suffix}"):
        read_image(path)


@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"), (b"<!DOCTYPE html>", "looks like an HTML"), (b"\x00\x01 random", "first bytes"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"), (b"GIF89a" + bytes(20), "first bytes")])
def test_what_is_no_picture_is_named_with_its_first_bytes(tmp_path, content, words):
    (tmp_path / "x.png").write_bytes(content)
    pytest.raises(ReadError, read_image, tmp_path / "x.png").match(f"(?s)not a picture.*{words}")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_png_bomb_is_refused_by_its_header(tmp_path, side, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("the pixels were decoded"))
    pytest.raises(ReadError, read_image, tmp_path / "bomb.png").match("nothing was decoded")


def test_small_one_bit_several_and_missing_pictures_are_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "two.tif", save_all=True, append_images=[Image.fromarray(GREY)])
    for path, error, words in (
            (save(tmp_path / "small.png", GREY[:40, :31]), ReadError, "31 x 40"),
            (save(tmp_path / "bit.png", LABELS > 0), IntensityError, "1-bit"),
            (tmp_path / "two.tif", ReadError, "2 pictures"), (tmp_path / "no.png", ReadError, "No such file")):
        pytest.raises(error, read_image, path).match(words)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_is_turned_as_its_tag_says(tmp_path, suffix, tag):
    """What every viewer shows is what is read, for each of the eight ways to hold a camera."""
    smooth = np.add.outer(2 * np.arange(48), np.arange(40)).astype(np.uint8)
    ways = {1: lambda a: a, 2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: np.transpose,
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = tag
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(ways[tag](smooth)), exif=exif)
    found = read_image(path).astype(int)
    assert found.shape == smooth.shape and np.abs(found - smooth).max() < 12
    assert_array_equal(read_mask(path, binarize=0), found > 0)


def test_up_to_one_percent_of_coloured_pixels_is_read(tmp_path):
    colour = np.dstack([GREY] * 3)
    colour[:3, :6] = (255, 0, 0)  # 18 of 1,920
    assert_array_equal(read_image(save(tmp_path / "a.png", colour))[4:], GREY[4:])
    colour[3, :6] = (255, 0, 0)
    pytest.raises(IntensityError, read_image, save(tmp_path / "b.png", colour)).match("1.2 % coloured")


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        pytest.raises(ReadError, read_image, path).match("not a regular file")
    (tmp_path / "a").write_bytes(b"12345")
    pytest.raises(ReadError, read_bytes, tmp_path / "a", most=4).match("at most 4 bytes")
    pytest.raises(ReadError, read_bytes, "a\0b").match("cannot be read")


# --- masks ------------------------------------------------------------------------------------------------

ENCODINGS = {
    "palette": (palette_picture, True), "0 1 2": (Image.fromarray, True),
    "colour": (lambda labels: palette_picture(labels).convert("RGB"), True),
    "colour alpha": (lambda labels: palette_picture(labels).convert("RGBA"), True),
    "grey 38 75": (lambda labels: palette_picture(labels).convert("L"), True),
    "0 1 2 as rgb": (lambda labels: Image.fromarray(labels).convert("RGB"), True),
    "0 255": (lambda labels: Image.fromarray(np.uint8(255) * (labels > 0)), False),
    "one bit": (lambda labels: Image.fromarray(labels > 0), False),
    "0 255 as palette": (lambda labels: Image.fromarray(np.uint8(255) * (labels > 0)).convert("P"), False)}
MASKS = arrays(np.uint8, (33, 35), elements=st.sampled_from([0, 0, 0, 1, 2]))


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=15, deadline=None)
@given(labels=st.one_of(MASKS, st.sampled_from([np.full((33, 35), value, np.uint8) for value in range(3)])))
def test_every_encoding_reads_back(tmp_path_factory, encoding, labels):
    write, has_classes = ENCODINGS[encoding]
    path = save(tmp_path_factory.mktemp("mask") / "m.png", write(labels))
    assert_array_equal(read_mask(path), labels > 0)
    if has_classes or not labels.any():
        assert_array_equal(read_labels(path), labels)
    else:
        pytest.raises(MaskError, read_labels, path).match("does not tell ground glass from consolidation")


@settings(max_examples=60, deadline=None)
@given(values=st.sets(st.integers(0, 255), min_size=2, max_size=4))
def test_values_that_fit_no_encoding_are_refused_with_counts(tmp_path_factory, values):
    mask = np.zeros((40, 40), np.uint8)
    mask[:4] = np.resize(sorted(values), (4, 40))
    path = save(tmp_path_factory.mktemp("mask") / "m.png", mask)
    present = set(np.unique(mask).tolist())
    if any(present <= known for known in ({0, 1, 2}, {0, 38, 75}, {0, 255})):
        assert_array_equal(read_mask(path), mask > 0)
    else:
        with pytest.raises(MaskError) as caught:
            read_mask(path)
        assert all(f"{value}: {(mask == value).sum()} px" in str(caught.value) for value in present)


def test_a_stray_colour_is_refused(tmp_path):
    colour = np.array(palette_picture(LABELS).convert("RGB"))
    colour[0, 0] = (255, 255, 255)
    pytest.raises(MaskError, read_mask, save(tmp_path / "m.png", colour)).match(r"\(255, 255, 255\): 1 px")


@pytest.mark.parametrize("colours", [[9, 9, 9, 200, 10, 10, 10, 10, 200], [0] * 9], ids=["other", "none"])
def test_a_palette_is_read_as_index_whatever_its_colours(tmp_path, colours):
    assert_array_equal(read_labels(with_palette(tmp_path / "odd.png", LABELS, colours)), LABELS)
    stray = with_palette(tmp_path / "m.png", 2 * LABELS, [9, 9, 9, 1, 2, 3, 200, 10, 10, 7, 7, 7, 10, 10, 200])
    pytest.raises(MaskError, read_labels, stray).match("4: ")


def test_an_inverted_palette_of_black_and_white_keeps_its_meaning(tmp_path):
    """As optimisers write it: index 0 is white."""
    assert_array_equal(read_mask(with_palette(tmp_path / "m.png", LABELS == 0, [255, 255, 255, 0, 0, 0])), LABELS > 0)


def test_a_map_in_colour_is_refused(tmp_path):
    pytest.raises(IntensityError, read_map, save(tmp_path / "c.png", palette_picture(LABELS))).match("colour")


# --- pairs ------------------------------------------------------------------------------------------------

def touch(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 300), min_size=1, max_size=12), st.randoms())
def test_pairs_are_by_stem_whatever_the_order_of_creation(tmp_path_factory, numbers, random):
    folder = tmp_path_factory.mktemp("pairs")
    for name, suffix in (("i", "jpg"), ("m", "png")):
        shuffled = sorted(numbers)
        random.shuffle(shuffled)
        touch(folder / name, *(f"{number}.{suffix}" for number in shuffled))
    pairs = pair_by_stem(folder / "i", folder / "m")
    assert [int(stem) for stem, _, _ in pairs] == sorted(numbers)
    assert all(image.stem == mask.stem == stem for stem, image, mask in pairs)


def test_68_images_and_67_masks_name_the_odd_one_out(tmp_path):
    images = touch(tmp_path / "i", *(f"{k}.jpg" for k in range(68)))
    masks = touch(tmp_path / "m", *(f"{k}.png" for k in range(68) if k != 31), "99.png")
    with pytest.raises(MaskError, match="(?s)68 images, 68 masks.*31 has no mask; 99 has no image"):
        pair_by_stem(images, masks)


def test_names_that_differ_in_case_only_are_refused(tmp_path):
    with pytest.raises(MaskError, match="i: B differs from another name in case only"):
        pair_by_stem(touch(tmp_path / "i", "b.jpg", "B.jpg"), touch(tmp_path / "m", "b.png", "B.png"))


def test_an_empty_folder_a_missing_one_and_a_loop_are_named(tmp_path):
    full, empty = touch(tmp_path / "i", "a.jpg"), touch(tmp_path / "m", ".hidden.png", "notes.txt")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for images, masks, error, words in (
            (full, empty, MaskError, "a has no mask"), (empty, empty, MaskError, "no pictures"),
            (full, tmp_path / "nothing", ConfigError, "No such file"),
            (full, tmp_path / "loop", ConfigError, "(?i)symbolic link")):
        pytest.raises(error, pair_by_stem, images, masks).match(words)


@settings(max_examples=20, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90))
def test_labels_keep_their_values_and_images_their_range(height, width):
    labels, image = resize_labels(LABELS, (height, width)), resize_image(GREY, (height, width))
    assert labels.shape == image.shape == (height, width) and labels.dtype == image.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2} and abs(float(image.mean()) - GREY.mean()) < 8


# --- the real data

SEMISEG = data_root() and data_root() / "covid-semiseg/Dataset"
needs_real = pytest.mark.skipif(not SEMISEG or not SEMISEG.is_dir(), reason="no real data")


@needs_real
def test_real_palette_read_as_grey_gives_the_same_labels(tmp_path):
    for path in list_pictures(SEMISEG / "TestingSet/MultiClassInfection-Test/GT")[:6]:
        picture = Image.open(path)
        for mode in ("L", "RGB"):
            assert_array_equal(read_labels(save(tmp_path / "m.png", picture.convert(mode))), np.asarray(picture))


@needs_real
def test_real_pseudo_labels_are_probabilities_with_a_small_median_area():
    paths = list_pictures(SEMISEG / "TrainingSet/LungInfection-Train/Pseudo-label/GT")
    maps = [read_map(path) for path in paths[::8]]
    assert sum(len(np.unique(each)) > 2 for each in maps) > 0.9 * len(maps)
    assert 0.010 < np.median([(each > 127 / 255).mean() for each in maps]) < 0.020
    pytest.raises(MaskError, read_mask, paths[0])
