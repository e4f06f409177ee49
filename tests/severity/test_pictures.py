"""Single pictures: what may be said of one slice, masks of 0 and 255, and pictures that lie on their side."""
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_cases import picture_folder

from covidsev.core import ConfigError, GeometryError, MaskError, read_json
from covidsev.severity.cases import process_case, process_cases, turn_upright
from covidsev.severity.inputs import Options, check_options

NAME = "Jane_07.png"


@pytest.fixture
def jane(anna, tmp_path):
    """Folders of the slices of a patient and of their masks, and the options for them."""
    scans, masks = picture_folder(anna.scan, tmp_path / "jane"), picture_folder(anna.mask, tmp_path / "masks", mask=True)
    return scans, masks, Options(infection=masks / NAME, window=(-600, 1500))


def save(array, path):
    Image.fromarray(np.ascontiguousarray(array)).save(path)
    return path


def test_a_slice_has_a_partial_score_and_no_ct_ss_in_any_line(jane, tmp_path):
    scans, _, options = jane
    lines = []
    row = process_cases(scans / NAME, tmp_path / "a", replace(options, level=0.5), echo=lines.append).rows[0]
    assert f"partial score {row['partial']} of {row['partial_max']}, bounds {row['low']} to {row['high']}" in lines[0]
    assert "no CT-SS" in lines[0] and lines[0].count("CT-SS") == 1 and row["partial"] == row["low"]
    process_cases(scans / NAME, tmp_path / "b", options, echo=lines.append)
    assert "slice extent score" in lines[1] and "CT-SS" not in lines[1]


def test_masks_of_0_and_255_are_a_note_and_no_warning(jane, tmp_path):
    scans, masks, options = jane
    batch = process_cases(scans / NAME, tmp_path / "a", options)
    result = read_json(tmp_path / "a" / "Jane_07" / "severity.json")
    assert result["notes"] == ["mask_values: 0/255 read as 0/1"] and "mask_values" not in batch.rows[0]["warnings"]
    assert not [text for text in result["warnings"] if "mask_values" in text]
    page = (tmp_path / "a" / "Jane_07" / "report.html").read_text()
    assert page.count("mask_values") == 1 and "Noted while reading: mask_values: 0/255 read as 0/1." in page
    plain = np.asarray(Image.open(masks / NAME)) // 255
    save(plain, masks / NAME)
    assert process_case(scans / NAME, tmp_path / "b", options)["notes"] == []
    save(plain * 7, masks / NAME)
    with pytest.raises(MaskError, match=r"(?s)7: \d+ px.*--label-map infection:.*--binarize infection:"):  # one odd value
        process_case(scans / NAME, tmp_path / "c", options)


def lay(source, target, axes):
    """The pictures of a folder, turned so that their rows and columns run as `axes` says."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        save(turn_upright(np.asarray(Image.open(path)), axes, back=True), target / path.name)
    return target


PLACES = ("run_id", "input", "files", "case_id")


@pytest.mark.parametrize("axes", ["LP", "AR"])
def test_pictures_that_lie_on_their_side_have_the_result_of_upright_ones(jane, network, tmp_path, axes):
    """COVID-SemiSeg lies like LP: one slice and a stack, with given masks and with a network; masks lie as they came."""
    scans, masks, options = jane
    lying, lying_masks = (lay(folder, tmp_path / f"{folder.name}-{axes}", axes) for folder in (scans, masks))
    upright = process_case(scans, tmp_path / "a", replace(options, infection=masks))
    turned = process_case(lying, tmp_path / "b", replace(options, infection=lying_masks, picture_axes=axes))
    assert upright["ct_ss"] > 0 and turned["input"]["orientation"] == axes
    for name in turned.keys() - set(PLACES):
        assert turned[name] == upright[name], name
    network = replace(network, window=(-600, 1500), task="segment")
    process_case(scans / NAME, tmp_path / "c", network)
    process_case(lying / NAME, tmp_path / "d", replace(network, picture_axes=axes))
    for up, down in (("c/Jane_07/infection.png", "d/Jane_07/infection.png"),
                     (f"a/jane/lungs/{NAME}", f"b/{lying.name}/lungs/{NAME}")):
        one, other = (np.asarray(Image.open(tmp_path / path)) for path in (up, down))
        assert one.any() and np.array_equal(turn_upright(other, axes), one)


def test_a_lying_picture_is_suspected_and_only_pictures_are_turned(jane, anna, tmp_path):
    scans, masks, options = jane
    lying, wrong = lay(scans, tmp_path / "scans-LP", "LP"), lay(masks, tmp_path / "masks-LP", "LP")
    given = replace(options, infection=wrong / NAME)
    said = process_case(lying / NAME, tmp_path / "a", given)["warnings"]
    assert [text for text in said if text.startswith("picture_lies") and "--picture-axes LP" in text]
    for folder, good in ((lying, replace(given, picture_axes="LP")), (scans, options)):
        assert "picture_lies" not in str(process_case(folder / NAME, tmp_path / "b", good)["warnings"])
    small = save(np.zeros((80, 70), np.uint8), tmp_path / "small.png")
    for path, wrong, error, words in (
            (lying / NAME, replace(options, infection=small), GeometryError,
             r"image and mask differ in shape.*mask \(80, 70\), image \(80, 80\)"),
            (anna.scan, anna.options(picture_axes="LP"), ConfigError,
             "only pictures can be turned.*orientation RAS.*leave out --picture-axes")):
        pytest.raises(error, process_case, path, tmp_path / "c", wrong).match(f"(?s){words}")
    pytest.raises(ConfigError, check_options, Options(picture_axes="PA")).match("(?s)picture axes.*PA")
