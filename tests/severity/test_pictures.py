"""Single pictures: what may be said of one slice, masks of 0 and 255, and pictures that lie on their side."""
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_cases import clinic, picture_folder, quick_pictures  # noqa: F401  (fixtures)

from covidsev.severity.cases import process_case, process_cases, turn_upright
from covidsev.severity.inputs import Options, check_options
from covidsev.core import ConfigError, GeometryError, MaskError


def test_a_slice_has_a_partial_score_and_no_ct_ss_in_any_line(clinic, tmp_path):
    scans, masks = picture_folder(clinic, tmp_path / "jane"), picture_folder(clinic, tmp_path / "masks", mask=True)
    lines = []
    options = Options(infection=masks / "Jane_07.png", window=(-600, 1500), level=0.5)
    batch = process_cases(scans / "Jane_07.png", tmp_path / "a", options, echo=lines.append)
    row = batch.rows[0]
    assert f"partial score {row['partial']} of {row['partial_max']}, bounds {row['low']} to {row['high']}" in lines[0]
    assert "no CT-SS" in lines[0] and lines[0].count("CT-SS") == 1 and row["partial"] == row["low"]
    process_cases(scans / "Jane_07.png", tmp_path / "b", replace(options, level=None), echo=lines.append)
    assert "slice extent score" in lines[1] and "CT-SS" not in lines[1]


def test_masks_of_0_and_255_are_a_note_and_no_warning(clinic, tmp_path):
    scans, masks = picture_folder(clinic, tmp_path / "jane"), picture_folder(clinic, tmp_path / "masks", mask=True)
    options = Options(infection=masks / "Jane_07.png", window=(-600, 1500), level=0.5)
    batch = process_cases(scans / "Jane_07.png", tmp_path / "a", options)
    result = json.loads((tmp_path / "a" / "Jane_07" / "severity.json").read_text())
    assert result["notes"] == ["mask_values: 0/255 read as 0/1"] and "mask_values" not in batch.rows[0]["warnings"]
    assert not [text for text in result["warnings"] if "mask_values" in text]
    page = (tmp_path / "a" / "Jane_07" / "report.html").read_text()
    assert page.count("mask_values") == 1 and "Noted while reading: mask_values: 0/255 read as 0/1." in page
    Image.fromarray(np.asarray(Image.open(masks / "Jane_07.png")) // 255).save(masks / "Jane_07.png")
    assert process_case(scans / "Jane_07.png", tmp_path / "b", options)["notes"] == []
    Image.fromarray(np.asarray(Image.open(masks / "Jane_07.png")) * 7).save(masks / "Jane_07.png")
    with pytest.raises(MaskError, match=r"(?s)7: \d+ px.*--label-map infection:.*--binarize infection:"):  # one odd value
        process_case(scans / "Jane_07.png", tmp_path / "c", options)


def lay(source, target, axes):
    """The pictures of a folder, turned so that their rows and columns run as `axes` says."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        picture = np.ascontiguousarray(turn_upright(np.asarray(Image.open(path)), axes, back=True))
        Image.fromarray(picture).save(target / path.name)
    return target


PLACES = ("run_id", "input", "files", "case_id")


@pytest.mark.parametrize("axes", ["LP", "AR"])
def test_pictures_that_lie_on_their_side_have_the_result_of_upright_ones(clinic, tmp_path, axes):
    """COVID-SemiSeg lies like LP: one slice and a stack, with given masks and with a network; masks lie as they came."""
    parts = {"scans": picture_folder(clinic, tmp_path / "jane"), "masks": picture_folder(clinic, tmp_path / "masks", mask=True)}
    lying = {name: lay(folder, tmp_path / f"{name}-{axes}", axes) for name, folder in parts.items()}
    options = Options(infection=parts["masks"], window=(-600, 1500))
    upright = process_case(parts["scans"], tmp_path / "a", options)
    turned = process_case(lying["scans"], tmp_path / "b", replace(options, infection=lying["masks"], picture_axes=axes))
    assert upright["ct_ss"] > 0 and turned["input"]["orientation"] == axes
    assert {name: value for name, value in turned.items() if name not in PLACES} == \
        {name: value for name, value in upright.items() if name not in PLACES}
    name = "Jane_07.png"
    network = Options(weights=clinic / "single.safetensors", phantom=True, window=(-600, 1500), task="segment")
    process_case(parts["scans"] / name, tmp_path / "c", network)
    process_case(lying["scans"] / name, tmp_path / "d", replace(network, picture_axes=axes))
    masks = [np.asarray(Image.open(tmp_path / out / "Jane_07" / "infection.png")) for out in "cd"]
    assert masks[0].any() and np.array_equal(turn_upright(masks[1], axes), masks[0])
    written = np.asarray(Image.open(tmp_path / "b" / lying["scans"].name / "lungs" / name))
    assert np.array_equal(turn_upright(written, axes), np.asarray(Image.open(tmp_path / "a" / "jane" / "lungs" / name)))


def test_a_lying_picture_is_suspected_and_only_pictures_are_turned(clinic, tmp_path):
    scans, masks = picture_folder(clinic, tmp_path / "jane"), picture_folder(clinic, tmp_path / "masks", mask=True)
    lying, wrong = lay(scans, tmp_path / "scans-LP", "LP"), lay(masks, tmp_path / "masks-LP", "LP")
    options = Options(infection=wrong / "Jane_07.png", window=(-600, 1500))
    said = process_case(lying / "Jane_07.png", tmp_path / "a", options)["warnings"]
    assert [text for text in said if text.startswith("picture_lies") and "--picture-axes LP" in text]
    for good in (replace(options, picture_axes="LP"), replace(options, infection=masks / "Jane_07.png")):
        folder = lying if good.picture_axes == "LP" else scans
        assert "picture_lies" not in str(process_case(folder / "Jane_07.png", tmp_path / "b", good)["warnings"])
    with pytest.raises(GeometryError, match=r"(?s)image and mask differ in shape.*mask \(80, 70\), image \(80, 80\)"):
        Image.fromarray(np.zeros((80, 70), np.uint8)).save(tmp_path / "small.png")
        process_case(lying / "Jane_07.png", tmp_path / "c", replace(options, infection=tmp_path / "small.png"))
    with pytest.raises(ConfigError, match="(?s)only pictures can be turned.*orientation RAS.*leave out --picture-axes"):
        process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "d", Options(infection=clinic / "masks" / "anna.nii.gz",
                                                                               picture_axes="LP"))
    with pytest.raises(ConfigError, match="(?s)picture axes.*PA"):
        check_options(Options(picture_axes="PA"))
