"""Sets, layouts, splits, leaks, the pool; and the known answers of the real COVID-SemiSeg, where it is."""
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from PIL import Image

from covidsev.core import (ConfigError, DataMissingError, GeometryError, IntensityError, LeakageError, MaskError,
                           ReadError, data_root)
from covidsev.data.datasets import (KNOWN_SHARED_GROUPS, LABELLED_PEAKS, SCAN_GROUPS, ScanRule, SliceSet,
                                    check_disjoint, find_covid_semiseg, grey_peaks, group_folds, harmonise, load_covid_semiseg,
                                    load_phantom, load_splits, load_unlabelled, mask_edge, nested_subset, phantom_pool,
                                    phantom_pseudo_labels, pool_tensors, pseudo_label_tensors,
                                    scan_of_name, scan_rule, shares_scan_with_train, spread_over_scans, to_tensors,
                                    write_covid_semiseg)
from covidsev.data.pictures import read_mask, resize_image


LABELS = np.random.default_rng(0).choice(3, (48, 40), p=[0.7, 0.2, 0.1]).astype(np.uint8)


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


# --- sets, splits, leaks ----------------------------------------------------------------------------------

def test_phantom_splits_are_separate_repeatable_and_marked():
    first = load_splits("phantom", size=64, n_train=5, n_test=3, seed=1)
    again = load_splits("phantom", size=64, n_train=5, n_test=3, seed=1)
    assert [len(each) for each in first] == [5, 3] and {each.kind for each in first} == {"phantom"}
    assert [each.content_hash() for each in first] == [each.content_hash() for each in again]
    other = load_splits("phantom", size=64, n_train=5, n_test=3, seed=2)
    assert not {each.content_hash() for each in first} & {each.content_hash() for each in other}
    assert first.train.images[0].shape == (64, 64) and first.train.groups[0] == first.train.groups[1]
    assert not any(shares_scan_with_train(first.test))


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


def test_tensors_hold_all_slices_once(tmp_path):
    images, labels = to_tensors(slices(["a", "b", "c"]), 64)
    assert tuple(images.shape) == tuple(labels.shape) == (3, 1, 64, 64)
    assert str(images.dtype) == str(labels.dtype) == "torch.uint8"
    assert set(labels.unique().tolist()) == {0, 1, 2}


# --- subsets, and the unlabelled pool ---------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=8, max_size=60), st.integers(2, 6), st.integers(0, 10**6))
def test_folds_are_whole_groups_and_about_equal(numbers, k, seed):
    whole = slices([str(i) for i in range(len(numbers))], [f"g{n}" for n in numbers])
    if len(set(numbers)) < k:
        with pytest.raises(ConfigError, match="folds of whole groups"):
            group_folds(whole, k, seed)
        return
    folds = group_folds(whole, k, seed)
    assert folds.shape == (len(numbers),) and set(folds) <= set(range(k))
    assert len(set(zip(numbers, folds))) == len(set(numbers))  # a group has one fold
    largest = max(numbers.count(n) for n in numbers)
    assert np.bincount(folds, minlength=k).max() <= -(-len(numbers) // k) + largest - 1
    assert np.array_equal(folds, group_folds(whole, k, seed))


def test_folds_are_alike_in_infected_share():
    labels = [np.zeros((40, 40), np.uint8) for _ in range(50)]
    for index, label in enumerate(labels):
        label.flat[:30 * index] = 1
    whole = replace(slices([str(k) for k in range(50)]), labels=labels, images=labels)
    shares = np.array([label.mean() for label in labels])
    dealt = [group_folds(whole, 5, seed) for seed in range(10)]
    for folds in dealt:
        assert np.bincount(folds).tolist() == [10] * 5
        assert np.ptp([shares[folds == k].mean() for k in range(5)]) < 0.03 < shares.std()
    assert len({tuple(folds) for folds in dealt}) == 10


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
    splits = load_splits("covid-semiseg", root=root)
    assert splits.train.ids == ["0", "1", "2", "10"]
    fewer = [load_splits("covid-semiseg", root=root, n_train=n).train.ids for n in (1, 2, 3)]
    assert set(fewer[0]) < set(fewer[1]) < set(fewer[2]) < set(splits.train.ids)
    for data, n in (("covid-semiseg", 5), ("covid-semiseg", 0), ("phantom", 0), ("phantom", -2)):
        with pytest.raises(ConfigError, match=f"n_train = {n}"):
            load_splits(data, root=root, n_train=n, size=64)


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
    splits = load_splits("phantom", size=64, n_train=6, n_test=6, seed=1)
    check_disjoint(pool=load_phantom("pool", 6, 64, 1), **splits._asdict())


# --- the real data ----------------------------------------------------------------------------------------

REAL = data_root() and data_root() / "covid-semiseg"
HASHES = ["d2e02f4254e13cf2", "e186c547697062b1"]  # all training slices, all test slices
needs_real = pytest.mark.skipif(not REAL or not (REAL / "Dataset").is_dir(), reason="no real data")


@needs_real
def test_real_slices_are_read_in_order():
    train, test = load_covid_semiseg(REAL, "train"), load_covid_semiseg(REAL, "test")
    assert len(train) == 50 and len(test) == 48 and (train.kind, train.binary_only) == ("real", False)
    assert train.ids == sorted(train.ids, key=int) and test.ids == sorted(test.ids, key=int)
    assert sorted(train.ids + test.ids, key=int) == [str(k) for k in range(100) if k not in (22, 48)]


@needs_real
def test_real_scan_groups_and_splits():
    splits = load_splits("covid-semiseg", root=REAL)
    assert [len(each) for each in splits] == [50, 48]
    assert [part.content_hash()[:16] for part in splits] == HASHES
    assert splits.test.ids[:5] == ["6", "7", "8", "9", "18"]
    shared, certain = ({name for name, flag in zip(splits.test.ids, flags, strict=True) if flag}
                       for flags in (shares_scan_with_train(splits.test),
                                     shares_scan_with_train(splits.test, include_likely=False)))
    assert shared == {"21", "65", "91", "93", "97"} and certain == shared - {"65"}
    assert {slice_id for group in SCAN_GROUPS.values() for slice_id in group.train} <= set(splits.train.ids)
    folds = group_folds(splits.train, 5)
    shares = np.array([splits.train.infection(k).mean() for k in range(50)])
    assert np.bincount(folds).tolist() == [10] * 5 and len(set(zip(splits.train.groups, folds))) == 45
    assert np.ptp([shares[folds == k].mean() for k in range(5)]) < 0.02
    one, two = (load_splits("covid-semiseg", root=REAL, n_train=30, seed=seed) for seed in (1, 2))
    assert one.train.ids != two.train.ids and one.test.content_hash() == two.test.content_hash() == splits.test.content_hash()


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
def test_real_edges_follow_the_gradient_rule():
    folder = REAL / "Dataset/TrainingSet/LungInfection-Train/Doctor-label"
    for path in sorted((folder / "Edge").iterdir()):
        assert_array_equal(read_mask(path), mask_edge(read_mask(folder / "GT" / path.name)))


@needs_real
def test_real_pool_has_twenty_scans_and_its_dark_part_is_mirrored():
    pool = load_unlabelled(REAL)
    assert len(pool) == 1600 and len(set(pool.scans)) == 20 and len(set(pool.groups)) == 18
    rules = {scan: scan_rule([pool.image(k) for k, other in enumerate(pool.scans) if other == scan][::8])
             for scan in set(pool.scans)}
    for scan, rule in rules.items():
        assert (rule.mirrored, rule.peaks is not None) == (scan.startswith("coronacases"),) * 2, scan
