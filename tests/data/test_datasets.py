"""Readers, pairing, layouts, splits, leaks; and the known answers of the real COVID-SemiSeg, where it is."""
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from PIL import Image, ImageFile

from covidsev.core import (ConfigError, DataMissingError, GeometryError, IntensityError, LeakageError,
                             MaskError,
                             ReadError, data_root)
from covidsev.data.datasets import (KNOWN_SHARED_GROUPS, LABELLED_PEAKS, SCAN_GROUPS, ScanRule,
                                    SliceSet, carve, check_covid_semiseg, check_disjoint,
                                    domain_shift, find_covid_semiseg, grey_peaks, grey_profile,
                                    harmonise, load_covid_semiseg, load_phantom, load_priors,
                                    load_splits, load_unlabelled, mask_edge, nested_subset,
                                    phantom_pool, phantom_pseudo_labels, pool_tensors,
                                    prior_is_ground_truth, pseudo_label_tensors, read_pseudo_label,
                                    scan_group, scan_of_name, scan_rule, shares_scan_with_train,
                                    spread_over_scans, to_tensors, write_covid_semiseg)
from covidsev.data.pictures import (for_display, pair_by_stem, palette_picture, read_image,
                                    read_labels, read_map, read_mask, resize_image, resize_labels)

LABELS = np.random.default_rng(0).choice(3, (48, 40), p=[0.7, 0.2, 0.1]).astype(np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (48, 40), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COVIDSEV_QUIET", "1")


def save(path, array, **options):
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(path, **options)
    return path


def slices(ids, groups=None, seed=0, kind="phantom", name="toy"):
    draw = np.random.default_rng(seed)
    images = [draw.integers(0, 256, (40, 36 + k), dtype=np.uint8) for k in range(len(ids))]
    labels = [draw.choice(3, image.shape, p=[0.8, 0.1, 0.1]).astype(np.uint8) for image in images]
    return SliceSet(name, kind, list(ids), images, labels, list(groups or ids))


def tree(tmp_path):
    """A small data set in the layout of COVID-SemiSeg; returns (Dataset folder, train, test)."""
    train, test = slices(["0", "1", "10", "2"], seed=1), slices(["6", "7"], seed=2)
    return write_covid_semiseg(tmp_path / "covid-semiseg" / "Dataset", train=train, test=test), train, test


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


def test_opt_ins_are_explicit_and_checked(tmp_path):
    path = save(tmp_path / "m.png", (LABELS * 100).astype(np.uint8))
    assert_array_equal(read_labels(path, label_map={0: 0, 100: 1, 200: 2}), LABELS)
    assert_array_equal(read_mask(path, binarize=150), LABELS == 2)
    with pytest.raises(MaskError, match="does not cover"):
        read_labels(path, label_map={0: 0, 100: 1})
    with pytest.raises(MaskError, match="does not cover"):
        read_labels(path, label_map={0: 0, 100: 1, 200: 3})


def test_maps_are_probabilities(tmp_path):
    path = save(tmp_path / "m.png", GREY)
    assert read_map(path).dtype == np.float64
    assert_array_equal(read_map(path), GREY / 255)
    assert read_pseudo_label(path).dtype == np.float64 and read_pseudo_label(path, binarize=0.5).dtype == bool
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
    for function in (find_covid_semiseg, lambda path: pair_by_stem(full, path)):
        with pytest.raises(ConfigError, match="(?i)symbolic link"):
            function(tmp_path / "loop")


def test_names_from_a_mac_pair_with_names_from_elsewhere(tmp_path):
    pairs = pair_by_stem(touch(tmp_path / "i", "Mu\u0308ller 1.jpg"),
                         touch(tmp_path / "m", "M\u00fcller 1.png"))
    assert len(pairs) == 1


@pytest.mark.parametrize("name", ["with space", "ünï 中文", "-dash", "a..b", "--data-root"])
def test_odd_paths_work(tmp_path, monkeypatch, name):
    train, test = slices(["-1", "ü 2"], seed=1), slices(["%0"], seed=2)
    write_covid_semiseg(tmp_path / name / "Dataset", train=train, test=test)
    monkeypatch.chdir(tmp_path)
    assert load_covid_semiseg(name, "train").ids == ["-1", "ü 2"]
    assert load_covid_semiseg(f"{name}/../{name}/Dataset", "test").ids == ["%0"]


# --- layout -----------------------------------------------------------------------------------------------

def test_layout_round_trip_and_every_form_of_root(tmp_path, monkeypatch):
    dataset, train, test = tree(tmp_path)
    monkeypatch.setenv("COVIDSEV_DATA", str(tmp_path))
    for root in (tmp_path, tmp_path / "covid-semiseg", dataset, None):
        assert find_covid_semiseg(root) == dataset
        loaded = load_covid_semiseg(root, "train")
        assert loaded.ids == ["0", "1", "2", "10"] and not loaded.binary_only and loaded.kind == "phantom"
        expected = train.subset([train.ids.index(name) for name in loaded.ids])
        assert loaded.content_hash() == expected.content_hash()
    assert load_covid_semiseg(dataset, "test").content_hash() == test.content_hash()
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        load_covid_semiseg(dataset, "trian")


def test_unpacked_zips_are_roots_for_what_they_hold(tmp_path):
    dataset, train, _ = tree(tmp_path)
    multi = dataset / "TrainingSet" / "MultiClassInfection-Train"
    assert_array_equal(load_covid_semiseg(multi, "train").labels[0], train.labels[0])
    binary = load_covid_semiseg(dataset / "TestingSet" / "LungInfection-Test", "test")
    assert binary.binary_only and set(np.unique(binary.labels[0])) == {0, 1}
    flat = tmp_path / "flat"
    for name in ("TrainingSet/LungInfection-Train", "TestingSet/LungInfection-Test"):
        (flat / name.split("/")[1]).parent.mkdir(exist_ok=True)
        os.rename(dataset / name, flat / name.split("/")[1])
    assert load_covid_semiseg(flat, "train").binary_only and len(load_covid_semiseg(flat, "test")) == 2
    with pytest.raises(DataMissingError, match="no test slices"):
        load_covid_semiseg(multi, "test")


def test_missing_data_names_the_command_and_never_gives_the_phantom(tmp_path, monkeypatch):
    for root in (tmp_path, str(tmp_path)):
        with pytest.raises(DataMissingError, match="(?s)covidsev data get covid-semiseg.*COVIDSEV_DATA"):
            load_splits("covid-semiseg", root=root)
    with pytest.raises(DataMissingError, match="no unlabelled"):
        load_unlabelled(tree(tmp_path)[0])
    with pytest.raises(DataMissingError, match="no priors"):
        load_priors(tmp_path)


def test_shapes_that_differ_are_refused_with_both_shapes(tmp_path):
    dataset, train, _ = tree(tmp_path)
    save(dataset / "TrainingSet/MultiClassInfection-Train/Imgs/2.png", np.zeros((40, 50), np.uint8))
    with pytest.raises(GeometryError,
                       match=r"(?s)slice 2 differ in shape.*image \(40, 50\), mask \(40, 39\)"):
        load_covid_semiseg(dataset, "train")


def test_binary_and_multi_class_masks_must_agree(tmp_path):
    dataset, train, _ = tree(tmp_path)
    path = dataset / "TrainingSet/LungInfection-Train/Doctor-label/GT/1.png"
    save(path, np.asarray(Image.open(path))[::-1])
    os.remove(path.with_name("10.png"))
    with pytest.raises(MaskError, match="(?s)disagree.*10 has no mask; slice 1 differs"):
        load_covid_semiseg(dataset, "train")


def test_check_lists_every_fault_at_once(tmp_path):
    dataset, train, test = tree(tmp_path)
    assert check_covid_semiseg(tmp_path).ok
    multi = dataset / "TrainingSet/MultiClassInfection-Train"
    single = dataset / "TrainingSet/LungInfection-Train/Doctor-label"
    save(multi / "GT/0.png", (LABELS * 3)[:40, :36].copy())
    (multi / "Imgs/1.png").write_bytes(b"<html>")
    save(single / "Edge/2.png", np.zeros_like(train.labels[3]))
    save(dataset / "TestingSet/LungInfection-Test/GT/6.png", np.zeros_like(test.labels[0]))
    (multi / "Imgs/10.png").unlink()
    save(single / "GT/2.png", (train.labels[3] > 0).astype(np.uint8) * 9)
    report = check_covid_semiseg(tmp_path)
    text = str(report)
    assert not report.ok and len(report.faults) == text.count("\n  - ") - len(report.notices)
    for words in ("GT/0.png", "looks like an HTML", "train 2: Edge = gradient", "slice 6 differs",
                  "10 has no image", "Doctor-label/GT/2.png"):
        assert any(words in fault for fault in report.faults), (words, report.faults)
    assert report.tables["Pixels"]["slices"].tolist() == [1, 2]


def test_check_says_which_split_is_missing(tmp_path):
    report = check_covid_semiseg(tree(tmp_path)[0] / "TestingSet" / "LungInfection-Test")
    assert any("has no train slices" in fault for fault in report.faults)
    assert any("no multi-class masks" in fault for fault in report.faults)


def test_a_prior_that_is_the_truth_is_announced(tmp_path):
    dataset, train, _ = tree(tmp_path)
    folder = dataset / "TrainingSet/MultiClassInfection-Train/Prior"
    folder.mkdir()
    for name, labels in zip(train.ids, train.labels, strict=True):
        save(folder / f"{name}.png", np.uint8(255) * (labels > 0))
    with pytest.warns(UserWarning, match="prior_is_ground_truth"):
        assert load_priors(dataset)["2"].dtype == np.float64
    save(folder / "0.png", np.uint8(128) * (train.labels[0] > 0))
    assert not prior_is_ground_truth(dataset)


# --- sets, splits, leaks ----------------------------------------------------------------------------------

def test_phantom_splits_are_separate_repeatable_and_marked():
    first = load_splits("phantom", size=64, n_train=5, val_slices=4, n_test=3, split_seed=1)
    again = load_splits("phantom", size=64, n_train=5, val_slices=4, n_test=3, split_seed=1)
    assert [len(each) for each in first] == [5, 4, 3] and {each.kind for each in first} == {"phantom"}
    assert [each.content_hash() for each in first] == [each.content_hash() for each in again]
    other = load_splits("phantom", size=64, n_train=5, val_slices=4, n_test=3, split_seed=2)
    assert not {each.content_hash() for each in first} & {each.content_hash() for each in other}
    assert first.train.images[0].shape == (64, 64) and first.train.groups[0] == first.train.groups[1]
    assert not any(shares_scan_with_train(first.test))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=12, max_size=40), st.integers(2, 6), st.integers(0, 10**6))
def test_carving_takes_whole_groups_and_is_repeatable(groups, n, seed):
    published = slices([str(k) for k in range(len(groups))], [f"g{group}" for group in groups])
    try:
        rest, chosen = carve(published, n, seed)
    except ConfigError as error:
        assert "cannot carve" in str(error)
        return
    assert len(chosen) == n and sorted(rest + chosen) == list(range(len(groups)))
    assert not {groups[index] for index in rest} & {groups[index] for index in chosen}
    assert (rest, chosen) == carve(published, n, seed)


def test_validation_is_spread_over_the_infected_share():
    labels = [np.zeros((40, 40), np.uint8) for _ in range(30)]
    for index, label in enumerate(labels):
        label[:index + 1] = 1
    published = replace(slices([str(k) for k in range(30)]), labels=labels, images=labels)
    for seed in range(20):
        chosen = carve(published, 10, seed)[1]
        assert [index // 3 for index in chosen] == list(range(10))


def test_leaks_are_named_by_group_and_by_pixels():
    train, val = slices(["a", "b"], ["p1", "p2"]), slices(["c", "d"], ["p3", "p1"], seed=9)
    with pytest.raises(LeakageError, match="group p1: train a and val d"):
        check_disjoint(train=train, val=val)
    copy = replace(val, images=[train.images[1], val.images[1]], groups=["p8", "p9"])
    with pytest.raises(LeakageError, match="(?s)image .*train b and test c"):
        check_disjoint(train=train, test=copy)
    assert check_disjoint(train=train, val=replace(val, groups=["p3", "p4"])) == []


def test_known_groups_may_only_be_shared_with_the_test_set():
    train = slices(["4"], ["medseg1:A"], kind="real")
    other = slices(["91"], ["medseg1:A"], seed=5, kind="real")
    assert check_disjoint(known=KNOWN_SHARED_GROUPS, train=train,
                          test=other) == ["group medseg1:A: train 4 and test 91"]
    with pytest.raises(LeakageError):
        check_disjoint(known=KNOWN_SHARED_GROUPS, train=train, val=other)
    with pytest.raises(LeakageError):
        check_disjoint(train=train, test=other)


def test_content_hash_sees_every_part():
    base = slices(["a", "b"])
    changed = [base.subset([1, 0]), replace(base, groups=["a", "c"]), replace(base, ids=["a", "c"]),
               replace(base, images=[base.images[0], base.images[1] ^ 1]),
               replace(base, labels=[base.labels[0], base.labels[1] * 0])]
    hashes = {each.content_hash() for each in [base, *changed]}
    assert len(hashes) == 1 + len(changed)
    assert replace(base, name="other").content_hash() == base.content_hash()


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'covid-semiseg'"):
        load_splits("covid-semisg")
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        load_phantom("tset", 2, 64)


def test_scan_names():
    assert scan_of_name("Data-1_coronacases_org_006_50") == ("coronacases:006", "coronacases:006")
    name = "Data-1_radiopaedia_org_covid-19-pneumonia-{}-dcm_12"
    series = [scan_of_name(name.format(part)) for part in ("10_85902_1", "10_85902_3")]
    assert series[0][0] != series[1][0] and series[0][1] == series[1][1] == "radiopaedia:10"
    assert scan_of_name(name.format("14_85914_0")) == ("radiopaedia:14_85914_0", "radiopaedia:14")
    assert scan_of_name("mine") == ("mine", "mine")


# --- edges, sizes -----------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(2, 9), st.integers(2, 9))))
def test_edge_equals_the_gradient_rule_and_moves_with_the_mask(mask):
    expected = np.any([part != 0 for part in np.gradient(mask.astype(float))], axis=0)
    before = mask.copy()
    edge = mask_edge(mask)
    assert edge.dtype == bool
    assert_array_equal(edge, expected)
    assert_array_equal(mask, before)
    assert_array_equal(mask_edge(mask[::-1]), edge[::-1])
    assert_array_equal(mask_edge(mask.T), edge.T)
    assert_array_equal(mask_edge(~mask), edge)


def test_edge_in_torch_is_the_same():
    import torch

    for dtype in (torch.bool, torch.uint8, torch.float32):
        batch = torch.from_numpy(np.stack([LABELS, LABELS[::-1].copy()])[:, None] > 0).to(dtype)
        edge = mask_edge(batch)
        assert edge.dtype == torch.bool and edge.shape == batch.shape
        assert_array_equal(edge[1, 0].numpy(), mask_edge(LABELS)[::-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90))
def test_labels_keep_their_values_and_images_their_range(height, width):
    labels, image = resize_labels(LABELS, (height, width)), resize_image(GREY, (height, width))
    assert labels.shape == image.shape == (height, width) and labels.dtype == image.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2} and abs(float(image.mean()) - GREY.mean()) < 8


def test_tensors_hold_all_slices_once(tmp_path):
    images, labels = to_tensors(slices(["a", "b", "c"]), 64)
    assert tuple(images.shape) == tuple(labels.shape) == (3, 1, 64, 64)
    assert str(images.dtype) == str(labels.dtype) == "torch.uint8"
    assert set(labels.unique().tolist()) == {0, 1, 2}
    assert_array_equal(for_display(GREY, "real"), GREY.T)


# --- subsets, and the unlabelled pool ---------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 45), st.integers(0, 10**6), st.data())
def test_subsets_are_nested_whatever_the_sizes(count, seed, data):
    whole = slices([str(k) for k in range(count)], seed=seed)
    large = data.draw(st.integers(1, count))
    small = data.draw(st.integers(1, large))
    chosen = nested_subset(whole, large, seed)
    assert set(nested_subset(whole, small, seed)) <= set(chosen) and len(set(chosen)) == large
    assert chosen == sorted(chosen) and nested_subset(whole, count, seed) == list(range(count))
    for n in (0, -1, count + 1):
        with pytest.raises(ConfigError, match="training slices"):
            nested_subset(whole, n, seed)


def test_no_limit_means_all_training_slices_in_their_order(tmp_path):
    root, train, _ = tree(tmp_path)
    splits = load_splits("covid-semiseg", root=root, val_slices=0)
    assert splits.train.ids == ["0", "1", "2", "10"] and len(splits.val) == 0
    assert [tuple(part.shape) for part in to_tensors(splits.val, 64)] == [(0, 1, 64, 64)] * 2
    fewer = [load_splits("covid-semiseg", root=root, val_slices=0, n_train=n).train.ids for n in (1, 2, 3)]
    assert set(fewer[0]) < set(fewer[1]) < set(fewer[2]) < set(splits.train.ids)
    for data, n in (("covid-semiseg", 5), ("covid-semiseg", 0), ("phantom", 0), ("phantom", -2)):
        with pytest.raises(ConfigError, match=f"n_train = {n}"):
            load_splits(data, root=root, val_slices=0, n_train=n, size=64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 99), st.data())
def test_a_sample_of_the_pool_is_spread_evenly(numbers, seed, data):
    scans = [str(number) for number in sorted(numbers)]
    n = data.draw(st.integers(0, len(scans)))
    chosen = spread_over_scans(scans, n, seed)
    assert len(chosen) == len(set(chosen)) == (n or len(scans)) and chosen == sorted(chosen)
    counts = {scan: sum(scans[k] == scan for k in chosen) for scan in set(scans)}
    for scan, count in counts.items():  # nobody has two fewer than another, unless it has no more
        assert count == scans.count(scan) or count >= max(counts.values()) - 1
    with pytest.raises(ConfigError, match="unlabelled slices"):
        spread_over_scans(scans, len(scans) + 1, seed)
    with pytest.raises(ConfigError, match="unlabelled slices"):
        spread_over_scans(scans, -1, seed)


def chest(size=64, spine="right", level=LABELLED_PEAKS):
    """A drawing: lungs, soft tissue, and a bright spine at one side."""
    lung, tissue = level
    picture = np.full((size, size), tissue, np.uint8)
    picture[8:-8, 8:-14], picture[size // 2 - 6:size // 2 + 6, -8:] = lung, 255
    return picture if spine == "right" else np.ascontiguousarray(picture[:, ::-1])


def make_pool(tmp_path, per_scan=3):
    """Two scans in the layout of the pool: one dark with the spine at the left, one as the labelled ones."""
    root, _, _ = tree(tmp_path)
    part = root / "TrainingSet/LungInfection-Train/Pseudo-label"
    names = {"Data-1_coronacases_org_003_{}": chest(spine="left", level=(14, 98)),
             "Data-1_radiopaedia_org_covid-19-pneumonia-36_86526_0-dcm_{}": chest()}
    for folder in ("Imgs", "GT"):
        (part / folder).mkdir(parents=True)
    for name, picture in names.items():
        for number in range(per_scan):
            save(part / "Imgs" / f"{name.format(number)}.png", picture)
            soft = np.where(picture == 255, 128, 127).astype(np.uint8)
            save(part / "GT" / f"{name.format(number)}.png", soft)
    return root, part


def test_the_pool_comes_out_like_the_labelled_slices(tmp_path):
    pool = load_unlabelled(make_pool(tmp_path)[0])
    images, ids = pool_tensors(pool, 64)
    assert ids == pool.ids and tuple(images.shape) == (6, 1, 64, 64)
    wanted, found = chest(), images[:, 0].numpy()
    assert (found[3:] == wanted).all()  # bright, spine at the right: as it was
    flat = wanted != 255
    assert np.abs(found[:3].astype(int) - wanted)[:, flat].max() <= 1 and not (found[:3, ~flat] < 250).any()


def test_labels_of_the_pool_are_mirrored_with_their_image_and_cut_at_128(tmp_path):
    pool = load_unlabelled(make_pool(tmp_path)[0])
    images, labels, ids = pseudo_label_tensors(pool, 64, n=4, seed=2)
    assert set(labels.unique().tolist()) == {0, 1} and str(labels.dtype) == "torch.uint8" and len(ids) == 4
    assert ((images == 255) == (labels == 1)).all()  # 128 is infection, 127 is not
    assert (pool_tensors(pool, 64, n=4, seed=2)[0] == images).all()


def test_a_rule_is_undecided_between_the_votes_and_bright_scans_keep_their_window():
    left, right = chest(spine="left"), chest()
    assert scan_rule([left, left, left, right]) == ScanRule(False, None)  # three quarters are not more
    assert scan_rule([left] * 4 + [right]) == ScanRule(True, None)
    dark = chest(level=(14, 98))
    rule = scan_rule([dark])
    assert rule.peaks is not None and harmonise(np.array([[14, 98]], np.uint8), rule).tolist() == [
        list(LABELLED_PEAKS)]
    with pytest.raises(IntensityError, match="one grey value"):
        scan_rule([np.full((40, 40), 7, np.uint8)])


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(32, 40), st.integers(32, 40))), st.booleans())
def test_harmonising_keeps_shape_type_and_the_order_of_greys(picture, mirrored):
    histogram = np.bincount(picture.ravel(), minlength=256)
    if len(np.unique(picture)) < 2:
        return
    lung, tissue = grey_peaks(histogram)
    assert lung < tissue
    out = harmonise(picture, ScanRule(mirrored, (lung, tissue)))
    assert out.shape == picture.shape and out.dtype == np.uint8
    order = np.argsort(picture.ravel(), kind="stable")
    out = out[:, ::-1] if mirrored else out
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("fault, error, words", [
    ("no maps", DataMissingError, "no pseudo labels"),
    ("stray", MaskError, "_0 has no mask; stray has no image"),
    ("double", MaskError, "_0 is there 2 times"), ("shape", GeometryError, "differ in shape"),
    ("damaged", ReadError, "not a picture"), ("sixteen bits", ReadError, "16-bit")])
def test_pseudo_labels_that_cannot_be_used_are_named(tmp_path, fault, error, words):
    root, part = make_pool(tmp_path)
    first = part / "GT" / "Data-1_coronacases_org_003_0.png"
    if fault == "no maps":
        (part / "GT").rename(part / "Maps")
    if fault == "stray":
        first.rename(first.with_name("stray.png"))
    if fault == "double":
        save(first.with_suffix(".jpg"), chest())
    if fault == "shape":
        save(first, chest(96))
    if fault == "damaged":
        first.write_bytes(b"<html>")
    if fault == "sixteen bits":
        save(first, np.zeros((64, 64), np.uint16))
    with pytest.raises(error, match=words):
        pseudo_label_tensors(load_unlabelled(root), 64)
    assert len(pool_tensors(load_unlabelled(root), 64)[1]) == 6  # the images need no maps


def test_a_damaged_slice_of_the_pool_is_named_and_an_empty_pool_is_no_pool(tmp_path):
    root, part = make_pool(tmp_path)
    bad = part / "Imgs" / "Data-1_coronacases_org_003_1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ReadError, match="003_1"):
        pool_tensors(load_unlabelled(root), 64)
    for path in (part / "Imgs").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="a pool with slices"):
        pool_tensors(load_unlabelled(root), 64)


def test_the_phantom_pool_is_repeatable_and_of_other_patients():
    images, ids = phantom_pool(6, 64, seed=1)
    same, labels, names = phantom_pseudo_labels(6, 64, seed=1)
    assert (images == same).all() and ids == names and set(labels.unique().tolist()) == {0, 1}
    assert not (images == phantom_pool(6, 64, seed=2)[0]).flatten(1).all(1).any()
    truth = (to_tensors(load_phantom("pool", 6, 64, 1), 64)[1] > 0).numpy()
    moved = np.roll(labels.numpy() > 0, (-2, -2), (2, 3))
    assert_array_equal(moved, truth)
    splits = load_splits("phantom", size=64, n_train=6, n_test=6, val_slices=6, split_seed=1)
    check_disjoint(pool=load_phantom("pool", 6, 64, 1), **splits._asdict())


# --- the real data ----------------------------------------------------------------------------------------

REAL = data_root() and data_root() / "covid-semiseg"
HASHES = ["2cbc09befbee6ba6", "da3134af09142a38", "e186c547697062b1"]  # split seed 0, 10 validation slices
needs_real = pytest.mark.skipif(not REAL or not (REAL / "Dataset").is_dir(), reason="no real data")


@pytest.fixture(scope="module")
def report():
    return check_covid_semiseg(REAL)


@pytest.fixture(scope="module")
def profile():
    return grey_profile(load_unlabelled(REAL))


@needs_real
def test_real_check_has_no_fault_and_the_known_pixel_sums(report):
    assert report.faults == []
    pixels = report.tables["Pixels"].set_index("split").to_dict("index")
    assert pixels["train"] == {"slices": 50, "background_px": 5_807_318, "ggo_px": 560_121,
                               "consolidation_px": 326_093,
                               "infected_%_min": 0.9, "infected_%_mean": 14.5, "infected_%_max": 38.7}
    assert pixels["test"] == {"slices": 48, "background_px": 4_852_231, "ggo_px": 636_258,
                              "consolidation_px": 262_742,
                              "infected_%_min": 1.0, "infected_%_mean": 15.9, "infected_%_max": 41.7}


@needs_real
def test_real_empty_labels_and_sizes(report):
    empty = report.tables["Slices without a class"].set_index(["split", "no pixel of"])["ids"]
    assert empty["train", "ground-glass opacity"] == "15, 54" and empty["test", "ground-glass opacity"] == "-"
    assert empty["train", "consolidation"] == "2, 4, 5, 13, 17, 25, 29, 33, 41, 42, 46"
    assert empty["test", "consolidation"] == "62, 64, 78, 81, 83, 89, 91, 93, 96, 98"
    assert empty["train", "any infection"] == empty["test", "any infection"] == "-"
    assert report.tables["Sizes"].to_numpy().tolist() == [["train", "153-456", "221-487", 49],
                                                          ["test", "177-445", "158-507", 48]]


@needs_real
def test_real_relations_hold_everywhere_edges_too(report):
    holds = {(row.split, row.relation): row.holds
             for row in report.tables["Relations between folders"].itertuples()}
    assert holds["train", "Edge = gradient of GT is not 0"] == "50 of 50"
    assert len(holds) == 7 and all(value == ("50 of 50" if split == "train" else "48 of 48") for (split, _),
                                   value in holds.items())


@needs_real
def test_real_notices(report):
    notices = "\n".join(report.notices)
    assert "same scan on both sides of the split: test 21, 65, 91, 93, 97" in notices
    assert "prior_is_ground_truth" in notices and "not the published" not in notices
    assert "domain_shift: 1,119 of 1,600" in notices


@needs_real
def test_real_slices_are_read_in_order():
    train, test = load_covid_semiseg(REAL, "train"), load_covid_semiseg(REAL, "test")
    assert len(train) == 50 and len(test) == 48 and (train.kind, train.binary_only) == ("real", False)
    assert train.ids == sorted(train.ids, key=int) and test.ids == sorted(test.ids, key=int)
    assert sorted(train.ids + test.ids, key=int) == [str(k) for k in range(100) if k not in (22, 48)]


@needs_real
def test_real_scan_groups_and_splits():
    splits = load_splits("covid-semiseg", root=REAL)
    assert [len(each) for each in splits] == [40, 10, 48]
    assert splits.test.ids[:5] == ["6", "7", "8", "9", "18"]
    shared, certain = ({name for name, flag in zip(splits.test.ids, flags, strict=True) if flag}
                       for flags in (shares_scan_with_train(splits.test),
                                     shares_scan_with_train(splits.test, include_likely=False)))
    assert shared == {"21", "65", "91", "93", "97"} and certain == shared - {"65"}
    assert scan_group("10") == scan_group("43") and not set(splits.train.groups) & set(splits.val.groups)
    ids = {slice_id for group in SCAN_GROUPS.values() for slice_id in group.train}
    assert ids <= set(splits.train.ids + splits.val.ids)
    other = load_splits("covid-semiseg", root=REAL, split_seed=1)
    assert other.val.ids != splits.val.ids and other.test.content_hash() == splits.test.content_hash()


@needs_real
def test_real_pool_has_twenty_scans_two_windows_and_a_mirrored_part(profile):
    assert len(profile) == 1600 and profile["scan"].nunique() == 20
    dark = profile["mean_grey"] < 90
    coronacases = profile["scan"].str.startswith("coronacases")
    assert dark.sum() == 1119 and (dark == coronacases).all()
    at_left = profile["spine_at_left"]
    assert at_left[coronacases].sum() == 1119 and at_left[~coronacases].sum() == 39
    assert len(domain_shift(profile)) == 2


@needs_real
def test_real_pseudo_labels_are_probabilities_with_a_small_median_area():
    folder = find_covid_semiseg(REAL) / "TrainingSet/LungInfection-Train/Pseudo-label/GT"
    paths = sorted(folder.iterdir())
    maps = [read_pseudo_label(path) for path in paths[::4]]
    assert sum(len(np.unique(each)) > 2 for each in maps) > 0.9 * len(maps)
    assert 0.010 < np.median([(each > 127 / 255).mean() for each in maps]) < 0.020
    with pytest.raises(MaskError):
        read_mask(paths[0])


@needs_real
def test_real_pool_is_made_like_the_labelled_slices(profile):
    """Ten scans are mirrored and their greys moved, towards the labelled mean (137); ten stay as they are."""
    pool = load_unlabelled(REAL)
    images, labels, ids = pseudo_label_tensors(pool, 64, n=200)
    scans = [scan_of_name(name)[0] for name in ids]
    assert len(set(scans)) == 20 and {scans.count(scan) for scan in set(scans)} == {10}
    dark = np.array([scan.startswith("coronacases") for scan in scans])
    means = images.float().mean((1, 2, 3)).numpy()
    assert 128 < means[dark].mean() < 136 and 140 < means[~dark].mean() < 149
    assert 0.03 < (labels > 0).float().mean() < 0.06
    chosen = spread_over_scans(pool.scans, 200, 0)
    for k, is_dark, image in zip(chosen, dark, images[:, 0].numpy(), strict=True):
        stored = resize_image(pool.image(k), 64)
        if is_dark:
            forth, back = (np.corrcoef(each.ravel(), image.ravel())[0, 1]
                           for each in (stored[:, ::-1], stored))
            assert forth > 0.9 > back
        else:
            assert_array_equal(image, stored)


@needs_real
@pytest.mark.parametrize("n", [10, 20, 30])
def test_real_subsets_are_nested_and_have_the_infected_share_of_the_whole(n):
    whole, part, more = (load_splits("covid-semiseg", root=REAL, n_train=k).train for k in (None, n, n + 5))
    assert set(part.ids) < set(more.ids) <= set(whole.ids) and len(part) == n
    share = [np.mean([each.infection(k).mean() for k in range(len(each))]) for each in (part, whole)]
    assert abs(share[0] - share[1]) < 0.02


@needs_real
def test_real_splits_are_the_ones_that_published_runs_used():
    splits = load_splits("covid-semiseg", root=REAL)
    assert [part.content_hash()[:16] for part in splits] == HASHES
    assert len(load_splits("covid-semiseg", root=REAL, val_slices=0).train) == 50


@needs_real
def test_real_priors_are_the_truth():
    with pytest.warns(UserWarning, match="prior_is_ground_truth"):
        assert len(load_priors(REAL)) == 50


@needs_real
def test_real_palette_read_as_grey_gives_the_same_labels(tmp_path):
    folder = find_covid_semiseg(REAL) / "TestingSet/MultiClassInfection-Test/GT"
    for path in sorted(folder.iterdir())[:6]:
        picture = Image.open(path)
        for mode in ("L", "RGB"):
            assert_array_equal(read_labels(save(tmp_path / "m.png", picture.convert(mode))),
                               np.asarray(picture))
