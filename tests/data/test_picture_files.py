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
from covidsev.data.pictures import (for_display, list_pictures, pair_by_stem, palette_picture, read_bytes, read_image,
                                    read_labels, read_map, read_mask, resize_image, resize_labels)

LABELS = np.random.default_rng(0).choice(3, (48, 40), p=[0.7, 0.2, 0.1]).astype(np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (48, 40), dtype=np.uint8)


def save(path, array, **options):
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(path, **options)
    return path


# --- pictures ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "dat"])
def test_type_is_told_by_content_and_equal_channels_become_one(tmp_path, mode, suffix):
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(GREY).convert(mode), format="PNG")
    assert_array_equal(read_image(path), GREY)


def test_a_jpeg_under_png_and_alpha_that_is_not_opaque(tmp_path):
    smooth = np.add.outer(np.arange(48), np.arange(40)).astype(np.uint8)
    assert np.abs(read_image(save(tmp_path / "a.png", smooth, format="JPEG",
                                  quality=95)).astype(int) - smooth).max() < 8
    transparent = np.dstack([GREY, GREY, GREY, 255 - GREY])
    assert_array_equal(read_image(save(tmp_path / "b.png", transparent)), GREY)


@pytest.mark.parametrize("kind", ["grey", "grey alpha", "colour"])
@pytest.mark.parametrize("reader", [read_image, read_mask, read_labels, read_map])
def test_sixteen_bit_pictures_are_refused(tmp_path, kind, reader):
    colour_type, channels = {"grey": (0, 1), "colour": (2, 3), "grey alpha": (4, 2)}[kind]
    rows = np.zeros((48, 1 + 40 * channels * 2), np.uint8).tobytes()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40, 48, 16, colour_type, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))
    with pytest.raises(ReadError, match="(?s)16-bit picture.*8 bits.*level -600"):
        reader(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_truncated_pictures_are_refused(tmp_path, suffix, part):
    content = save(tmp_path / f"whole.{suffix}", GREY).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[:int(part * len(content))])
    with pytest.raises(ReadError, match=f"(?s)(truncated|cannot? be read|not a picture).*cut.{suffix}"):
        read_image(path)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "an empty file"), (b"<!DOCTYPE html>", "looks like an HTML"), (b"\x00\x01 random", "first bytes"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
                                                (b"GIF89a" + bytes(20), "first bytes")])
def test_what_is_no_picture_is_named_with_its_first_bytes(tmp_path, content, words):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ReadError, match=f"(?s)not a picture.*{words}"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_png_bomb_is_refused_by_its_header(tmp_path, side, monkeypatch):
    content = save(tmp_path / "x.png", GREY).read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(content[:8] + struct.pack(">I", 13) + header
                                        + struct.pack(">I", zlib.crc32(header)) + content[33:])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("the pixels were decoded"))
    with pytest.raises(ReadError, match="nothing was decoded"):
        read_image(tmp_path / "bomb.png")


def test_small_colour_one_bit_several_and_missing_pictures_are_refused(tmp_path):
    with pytest.raises(ReadError, match="31 x 40"):
        read_image(save(tmp_path / "small.png", GREY[:40, :31]))
    with pytest.raises(IntensityError, match="coloured pixels"):
        read_image(save(tmp_path / "colour.png", np.dstack([GREY, GREY.T.reshape(GREY.shape), GREY])))
    with pytest.raises(IntensityError, match="1-bit"):
        read_image(save(tmp_path / "bit.png", LABELS > 0))
    Image.fromarray(GREY).save(tmp_path / "two.tif", save_all=True, append_images=[Image.fromarray(GREY)])
    with pytest.raises(ReadError, match="2 pictures"):
        read_image(tmp_path / "two.tif")
    with pytest.raises(ReadError, match="No such file"):
        read_image(tmp_path / "nothing.png")


def test_a_few_coloured_pixels_of_jpeg_rounding_are_allowed(tmp_path):
    smooth = np.add.outer(np.arange(48), np.arange(40)).astype(np.uint8)
    path = save(tmp_path / "a.jpg", np.dstack([smooth] * 3), quality=90)
    assert np.abs(read_image(path).astype(int) - smooth).max() < 10


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
    with pytest.raises(IntensityError, match="1.2 % coloured"):
        read_image(save(tmp_path / "b.png", colour))


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ReadError, match="not a regular file"):
            read_image(path)
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(ReadError, match="at most 4 bytes"):
        read_bytes(tmp_path / "a", most=4)
    with pytest.raises(ReadError, match="cannot be read"):
        read_bytes("a\0b")


# --- masks ------------------------------------------------------------------------------------------------

ENCODINGS = {
    "palette": (palette_picture, True), "colour": (lambda labels: palette_picture(labels).convert("RGB"),
                                                   True),
    "colour alpha": (lambda labels: palette_picture(labels).convert("RGBA"), True),
    "grey 38 75": (lambda labels: palette_picture(labels).convert("L"), True),
             "0 1 2": (Image.fromarray, True),
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
        with pytest.raises(MaskError, match="does not tell ground glass from consolidation"):
            read_labels(path)


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


@pytest.mark.parametrize("wrong", [{1: 1, 2: 255}, {1: 38, 2: 2}, {1: 76, 2: 150}, {1: 128, 2: 128},
                                   {1: 1, 2: 3}])
def test_mixtures_and_strays_are_refused(tmp_path, wrong):
    mask = np.choose(LABELS, [0, wrong[1], wrong[2]]).astype(np.uint8)
    for reader in (read_mask, read_labels):
        with pytest.raises(MaskError, match=f"(?s){wrong[2]}: .* px.*label_map or binarize"):
            reader(save(tmp_path / "m.png", mask))


def test_mixed_colours_and_interpolated_and_jpeg_masks_are_refused(tmp_path):
    colour = np.array(palette_picture(LABELS).convert("RGB"))
    colour[0, 0] = (255, 255, 255)
    with pytest.raises(MaskError, match=r"\(255, 255, 255\): 1 px"):
        read_mask(save(tmp_path / "m.png", colour))
    solid = np.zeros((64, 64), np.uint8)
    solid[20:40, 20:40] = 255
    for path in (save(tmp_path / "r.png", resize_image(solid, 50)),
                 save(tmp_path / "r.jpg", solid, quality=60)):
        with pytest.raises(MaskError, match="fit no known encoding"):
            read_mask(path)


def test_a_palette_is_read_as_index_not_as_luminance(tmp_path):
    path = save(tmp_path / "m.png", palette_picture(LABELS))
    assert set(np.unique(np.asarray(Image.open(path).convert("L")))) == {0, 38, 75}
    assert_array_equal(read_labels(path), LABELS)
    odd = Image.frombytes("P", LABELS.shape[::-1], LABELS.tobytes())
    odd.putpalette([9, 9, 9, 200, 10, 10, 10, 10, 200])  # other colours: the index counts
    assert_array_equal(read_labels(save(tmp_path / "odd.png", odd)), LABELS)
    black = Image.frombytes("P", LABELS.shape[::-1], LABELS.tobytes())
    black.putpalette([0] * 9)  # no colours: the index counts, nothing is lost
    assert_array_equal(read_labels(save(tmp_path / "black.png", black)), LABELS)
    stray = Image.frombytes("P", LABELS.shape[::-1], (LABELS * 2).tobytes())
    stray.putpalette([9, 9, 9, 1, 2, 3, 200, 10, 10, 7, 7, 7, 10, 10, 200])
    with pytest.raises(MaskError, match="4: "):
        read_labels(save(tmp_path / "stray.png", stray))


def test_an_inverted_palette_of_black_and_white_keeps_its_meaning(tmp_path):
    picture = Image.frombytes("P", LABELS.shape[::-1], (LABELS == 0).astype(np.uint8).tobytes())
    picture.putpalette([255, 255, 255, 0, 0, 0])  # as optimisers write it: index 0 is white
    assert_array_equal(read_mask(save(tmp_path / "m.png", picture)), LABELS > 0)


def test_the_way_out_is_explicit(tmp_path):
    path = save(tmp_path / "m.png", (LABELS * 100).astype(np.uint8))
    assert_array_equal(read_mask(path, binarize=150), LABELS == 2)


def test_maps_are_probabilities(tmp_path):
    path = save(tmp_path / "m.png", GREY)
    assert read_map(path).dtype == np.float64
    assert_array_equal(read_map(path), GREY / 255)
    with pytest.raises(IntensityError):
        read_map(save(tmp_path / "c.png", palette_picture(LABELS)))


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
    with pytest.raises(MaskError) as caught:
        pair_by_stem(images, masks)
    assert "68 images, 68 masks" in str(caught.value)
    assert "31 has no mask; 99 has no image" in str(caught.value)


def test_doubles_and_case_only_differences_are_refused(tmp_path):
    images = touch(tmp_path / "i", "a.jpg", "a.png", "Case.jpg", "b.jpg", "B.jpg")
    masks = touch(tmp_path / "m", "a.png", "case.png", "b.png", "B.png")
    with pytest.raises(MaskError) as caught:
        pair_by_stem(images, masks)
    for words in ("i: a is there 2 times", "Case has no mask (case differs)",
                  "i: B differs from another name in case only"):
        assert words in str(caught.value)


def test_an_empty_folder_a_missing_one_and_a_loop_are_named(tmp_path):
    full, empty = touch(tmp_path / "i", "a.jpg"), touch(tmp_path / "m", ".hidden.png", "notes.txt")
    with pytest.raises(MaskError, match="a has no mask"):
        pair_by_stem(full, empty)
    with pytest.raises(MaskError, match="no pictures"):
        pair_by_stem(empty, empty)
    with pytest.raises(ConfigError, match="No such file"):
        pair_by_stem(full, tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="(?i)symbolic link"):
        pair_by_stem(full, tmp_path / "loop")


def test_names_from_a_mac_pair_with_names_from_elsewhere(tmp_path):
    pairs = pair_by_stem(touch(tmp_path / "i", "Mu\u0308ller 1.jpg"),
                         touch(tmp_path / "m", "M\u00fcller 1.png"))
    assert len(pairs) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90))
def test_labels_keep_their_values_and_images_their_range(height, width):
    labels, image = resize_labels(LABELS, (height, width)), resize_image(GREY, (height, width))
    assert labels.shape == image.shape == (height, width) and labels.dtype == image.dtype == np.uint8
    assert_array_equal(for_display(GREY, "real"), GREY.T)
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
    with pytest.raises(MaskError):
        read_mask(paths[0])
