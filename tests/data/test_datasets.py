"""Sets, layouts, splits, leaks, the pool; and the known answers of the real COVID-SemiSeg, where it is."""
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from PIL import Image

from covidsev.core import (ConfigError, DataMissingError, GeometryError, IntensityError, MaskError, ReadError,
                           data_root)
from covidsev.data.datasets import (
    LABELLED_PEAKS, SCAN_GROUPS, ScanRule, SliceSet, find_covid_semiseg, grey_peaks, group_folds, harmonise,
    load_covid_semiseg, load_phantom, load_splits, load_unlabelled, mask_edge, nested_subset,
    phantom_pseudo_labels, pool_tensors, pseudo_label_tensors, scan_of_name, scan_rule, shares_scan_with_train,
    spread_over_scans, to_tensors, write_covid_semiseg)
from covidsev.data.pictures import read_mask, resize_image


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def slices(ids, groups=None, seed=0):
    draw = np.random.default_rng(seed)
    images = [draw.integers(0, 256, (40, 36 + k), dtype=np.uint8) for k in range(len(ids))]
    labels = [draw.choice(3, image.shape, p=[0.8, 0.1, 0.1]).astype(np.uint8) for image in images]
    return SliceSet("toy", "phantom", list(ids), images, labels, list(groups or ids))


def tree(tmp_path):
    """A small data set in the layout of COVID-SemiSeg; returns (Dataset folder, train, test)."""
    train, test = slices(["0", "1", "10", "2"], seed=1), slices(["6", "7"], seed=2)
    return write_covid_semiseg(tmp_path / "covid-semiseg" / "Dataset", train=train, test=test), train, test


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
    pytest.raises(ConfigError, load_covid_semiseg, dataset, "trian").match("did you mean 'train'")


def test_unpacked_zips_are_roots_for_what_they_hold(tmp_path):
    dataset, train, _ = tree(tmp_path)
    multi, flat = dataset / "TrainingSet" / "MultiClassInfection-Train", tmp_path / "flat"
    assert_array_equal(load_covid_semiseg(multi, "train").labels[0], train.labels[0])
    pytest.raises(DataMissingError, load_covid_semiseg, multi, "test").match("no test slices")
    flat.mkdir()
    for name in ("TrainingSet/LungInfection-Train", "TestingSet/LungInfection-Test"):
        os.rename(dataset / name, flat / name.split("/")[1])
    assert load_covid_semiseg(flat, "train").binary_only and len(load_covid_semiseg(flat, "test")) == 2


def test_missing_data_names_the_command_and_never_gives_the_phantom(tmp_path):
    with pytest.raises(DataMissingError, match="(?s)covidsev data get covid-semiseg.*COVIDSEV_DATA"):
        load_splits("covid-semiseg", root=tmp_path)
    pytest.raises(DataMissingError, load_unlabelled, tree(tmp_path)[0]).match("no unlabelled")


def test_shapes_that_differ_are_refused_with_both_shapes(tmp_path):
    dataset, _, _ = tree(tmp_path)
    save(dataset / "TrainingSet/MultiClassInfection-Train/Imgs/2.png", np.zeros((40, 50), np.uint8))
    shapes = r"(?s)slice 2 differ in shape.*image \(40, 50\), mask \(40, 39\)"
    pytest.raises(GeometryError, load_covid_semiseg, dataset, "train").match(shapes)


# --- sets, names ----------------------------------------------------------------------------------

def test_content_hash_sees_every_part():
    base = slices(["a", "b"])
    (first, second), (label, other) = base.images, base.labels
    sets = [base, base.subset([1, 0]), *(replace(base, **change) for change in (
        {"groups": ["a", "c"]}, {"ids": ["a", "c"]}, {"images": [first, second ^ 1]},
        {"labels": [label, other * 0]}))]
    assert len({each.content_hash() for each in sets}) == len(sets)


def test_scan_names():
    name = "Data-1_radiopaedia_org_covid-19-pneumonia-14_85914_0-dcm_12"
    assert scan_of_name(name) == ("radiopaedia:14_85914_0", "radiopaedia:14")
    assert scan_of_name("mine") == ("mine", "mine")


# --- edges -----------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(2, 9), st.integers(2, 9))))
def test_edge_equals_the_gradient_rule_whichever_side_is_the_mask(mask):
    expected = np.any([part != 0 for part in np.gradient(mask.astype(float))], axis=0)
    before = mask.copy()
    for edge in (mask_edge(mask), mask_edge(~mask)):
        assert edge.dtype == bool and np.array_equal(edge, expected)
    assert_array_equal(mask, before)


# --- subsets, and the unlabelled pool ---------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=8, max_size=60), st.integers(2, 6), st.integers(0, 10**6))
def test_folds_are_whole_groups_and_about_equal(numbers, k, seed):
    whole = slices([str(i) for i in range(len(numbers))], [f"g{n}" for n in numbers])
    if len(set(numbers)) < k:
        pytest.raises(ConfigError, group_folds, whole, k, seed).match("folds of whole groups")
        return
    folds = group_folds(whole, k, seed)
    assert folds.shape == (len(numbers),) and set(folds) <= set(range(k))
    assert len(set(zip(numbers, folds))) == len(set(numbers))  # a group has one fold
    largest = max(numbers.count(n) for n in numbers)
    assert np.bincount(folds, minlength=k).max() <= -(-len(numbers) // k) + largest - 1
    assert np.array_equal(folds, group_folds(whole, k, seed))


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
        pytest.raises(ConfigError, nested_subset, whole, n, seed).match("training slices")


def test_no_limit_means_all_training_slices_in_their_order(tmp_path):
    root, _, _ = tree(tmp_path)
    ids = [load_splits("covid-semiseg", root=root, n_train=n).train.ids for n in (1, 2, 3, None)]
    assert set(ids[0]) < set(ids[1]) < set(ids[2]) < set(ids[3]) and ids[3] == ["0", "1", "2", "10"]
    for data, n in (("covid-semiseg", 5), ("covid-semiseg", 0), ("phantom", 0), ("phantom", -2)):
        pytest.raises(ConfigError, load_splits, data, root=root, n_train=n, size=64).match(f"n_train = {n}")


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
    for wrong in (len(scans) + 1, -1):
        pytest.raises(ConfigError, spread_over_scans, scans, wrong, seed).match("unlabelled slices")


def chest(size=64, spine="right", level=LABELLED_PEAKS):
    """A drawing: lungs, soft tissue, and a bright spine at one side."""
    picture = np.full((size, size), level[1], np.uint8)
    picture[8:-8, 8:-14], picture[size // 2 - 6:size // 2 + 6, -8:] = level[0], 255
    return picture if spine == "right" else np.ascontiguousarray(picture[:, ::-1])


def make_pool(tmp_path, per_scan=3):
    """Two scans in the layout of the pool: one dark with the spine at the left, one as the labelled ones."""
    root, _, _ = tree(tmp_path)
    part = root / "TrainingSet/LungInfection-Train/Pseudo-label"
    names = {"Data-1_coronacases_org_003_{}": chest(spine="left", level=(14, 98)),
             "Data-1_radiopaedia_org_covid-19-pneumonia-36_86526_0-dcm_{}": chest()}
    for folder in ("Imgs", "GT"):
        (part / folder).mkdir(parents=True)
    for name, number in itertools.product(names, range(per_scan)):
        soft = np.where(names[name] == 255, 128, 127).astype(np.uint8)
        for folder, picture in (("Imgs", names[name]), ("GT", soft)):
            save(part / folder / f"{name.format(number)}.png", picture)
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
    assert set(labels.unique().tolist()) == {0, 1} and len(ids) == 4
    assert ((images == 255) == (labels == 1)).all()  # 128 is infection, 127 is not
    assert (pool_tensors(pool, 64, n=4, seed=2)[0] == images).all()


def test_a_rule_is_undecided_between_the_votes():
    left, right = chest(spine="left"), chest()
    assert scan_rule([left, left, left, right]) == ScanRule(False, None)  # three quarters are not more
    assert scan_rule([left] * 4 + [right]) == ScanRule(True, None)
    rule = scan_rule([chest(level=(14, 98))])
    assert harmonise(np.array([[14, 98]], np.uint8), rule).tolist() == [list(LABELLED_PEAKS)]
    pytest.raises(IntensityError, scan_rule, [np.full((40, 40), 7, np.uint8)]).match("one grey value")


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(32, 40), st.integers(32, 40))), st.booleans())
def test_harmonising_keeps_shape_type_and_the_order_of_greys(picture, mirrored):
    assume(len(np.unique(picture)) > 1)
    lung, tissue = grey_peaks(np.bincount(picture.ravel(), minlength=256))
    out = harmonise(picture, ScanRule(mirrored, (lung, tissue)))
    assert lung < tissue and out.shape == picture.shape and out.dtype == np.uint8
    out = out[:, ::-1] if mirrored else out
    order = np.argsort(picture.ravel(), kind="stable")
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("fault, error, words", [
    (lambda path: path.parent.rename(path.parent.with_name("Maps")), DataMissingError, "no pseudo labels"),
    (lambda path: path.rename(path.with_name("stray.png")), MaskError, "_0 has no mask; stray has no image"),
    (lambda path: save(path.with_suffix(".jpg"), chest()), MaskError, "_0 is there 2 times"),
    (lambda path: save(path, chest(96)), GeometryError, "differ in shape"),
    (lambda path: path.write_bytes(b"<html>"), ReadError, "not a picture"),
    (lambda path: save(path, np.zeros((64, 64), np.uint16)), ReadError, "16-bit")])
def test_pseudo_labels_that_cannot_be_used_are_named(tmp_path, fault, error, words):
    root, part = make_pool(tmp_path)
    fault(part / "GT" / "Data-1_coronacases_org_003_0.png")
    pytest.raises(error, pseudo_label_tensors, load_unlabelled(root), 64).match(words)
    assert len(pool_tensors(load_unlabelled(root), 64)[1]) == 6  # the images need no maps


def test_a_damaged_slice_of_the_pool_is_named_and_an_empty_pool_is_no_pool(tmp_path):
    root, part = make_pool(tmp_path)
    bad = part / "Imgs" / "Data-1_coronacases_org_003_1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    pytest.raises(ReadError, pool_tensors, load_unlabelled(root), 64).match("003_1")
    for path in (part / "Imgs").iterdir():
        path.unlink()
    pytest.raises(ConfigError, pool_tensors, load_unlabelled(root), 64).match("a pool with slices")


def test_the_phantom_pool_is_repeatable_and_its_labels_are_the_truth_moved():
    (images, labels, ids), again, other = (phantom_pseudo_labels(6, 64, seed=seed) for seed in (1, 1, 2))
    assert (images == again[0]).all() and ids == again[2] and not (images == other[0]).flatten(1).all(1).any()
    truth = to_tensors(load_phantom("pool", 6, 64, 1), 64)[1] > 0
    assert_array_equal(np.roll(labels.numpy() > 0, (-2, -2), (2, 3)), truth.numpy())


# --- the real data ----------------------------------------------------------------------------------------

REAL = data_root() and data_root() / "covid-semiseg"
HASHES = ["d2e02f4254e13cf2", "e186c547697062b1"]  # all training slices, all test slices
needs_real = pytest.mark.skipif(not REAL or not (REAL / "Dataset").is_dir(), reason="no real data")


@needs_real
def test_real_scan_groups_and_splits():
    train, test = splits = load_splits("covid-semiseg", root=REAL)
    assert [part.content_hash()[:16] for part in splits] == HASHES
    assert [(len(each), each.kind, each.binary_only) for each in splits] == [(50, "real", False), (48, "real", False)]
    assert all(part.ids == sorted(part.ids, key=int) for part in splits) and test.ids[:3] == ["6", "7", "8"]
    assert sorted(train.ids + test.ids, key=int) == [str(k) for k in range(100) if k not in (22, 48)]
    shared, certain = ({name for name, flag in zip(test.ids, flags, strict=True) if flag} for flags in (
        shares_scan_with_train(test), shares_scan_with_train(test, include_likely=False)))
    assert shared == {"21", "65", "91", "93", "97"} and certain == shared - {"65"}
    assert {slice_id for group in SCAN_GROUPS.values() for slice_id in group.train} <= set(train.ids)
    folds = group_folds(train, 5)
    shares = np.array([train.infection(k).mean() for k in range(50)])
    assert np.bincount(folds).tolist() == [10] * 5 and len(set(zip(train.groups, folds))) == 45
    assert np.ptp([shares[folds == k].mean() for k in range(5)]) < 0.02
    for n in (10, 20, 30):  # nested, with the infected share of the whole
        part, more = nested_subset(train, n, 0), nested_subset(train, n + 5, 0)
        assert set(part) < set(more) and len(part) == n
        assert abs(shares[part].mean() - shares.mean()) < 0.02
    assert nested_subset(train, 30, 1) != nested_subset(train, 30, 2)


@needs_real
def test_real_pool_is_made_like_the_labelled_slices():
    """Ten scans are mirrored and their greys moved, towards the labelled mean (137); ten stay as they are."""
    pool = load_unlabelled(REAL)
    images, labels, ids = pseudo_label_tensors(pool, 64, n=200)
    scans = [scan_of_name(name)[0] for name in ids]
    assert len(set(scans)) == 20 and {scans.count(scan) for scan in set(scans)} == {10}
    dark = np.array([scan.startswith("coronacases") for scan in scans])
    means = images.float().mean((1, 2, 3)).numpy()
    assert 128 < means[dark].mean() < 136 and 140 < means[~dark].mean() < 149
    assert 0.03 < (labels > 0).float().mean() < 0.06
    for k, is_dark, image in zip(spread_over_scans(pool.scans, 200, 0), dark, images[:, 0].numpy(), strict=True):
        stored = resize_image(pool.image(k), 64)
        if is_dark:
            forth, back = (np.corrcoef(each.ravel(), image.ravel())[0, 1] for each in (stored[:, ::-1], stored))
            assert forth > 0.9 > back
        else:
            assert_array_equal(image, stored)


@needs_real
def test_real_edges_follow_the_gradient_rule():
    folder = REAL / "Dataset/TrainingSet/LungInfection-Train/Doctor-label"
    for path in sorted((folder / "Edge").iterdir()):
        assert_array_equal(read_mask(path), mask_edge(read_mask(folder / "GT" / path.name)))

