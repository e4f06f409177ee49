"""Reports: no name gets out of its cell, nothing missing reads as 0, one slice has no CT-SS, files stand alone."""
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from covidsev.severity import reports
from covidsev.core import ConfigError
from covidsev.data.scans import Scan
from covidsev.severity.score import partition_regions, score_scan

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}&lt;"
ALLOWED = set("html head meta title style body header main footer section div h1 h2 h3 p strong span ul li figure "
              "img figcaption table caption thead tbody tr th td dl dt dd a details summary svg defs pattern clippath g rect "
              "path use text tspan ellipse".split())
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where a tag is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def make_scan(shape, kind="volume", unit="HU") -> Scan:
    values = np.random.default_rng(0).uniform(*((-1000, 100) if unit == "HU" else (0, 255)), shape)
    return Scan(values.astype(np.float32), kind, unit, "made", "0" * 64, spacing_mm=(1.5, 1.0, 3.0)[: len(shape)])


@pytest.fixture(scope="module")
def lungs() -> np.ndarray:
    labels = np.zeros((48, 30, 24), np.uint8)
    labels[27:45, 4:26, 2:22], labels[3:21, 4:26, 2:22] = 1, 2
    return labels


@pytest.fixture(scope="module")
def cases(lungs) -> dict[str, dict]:
    """One result of every kind of input, as plain data that went through JSON."""
    scan, infection = make_scan(lungs.shape), np.zeros_like(lungs)
    infection[:40, :14, :12] = 1
    flat, plane, spots = make_scan((30, 48), "slice"), lungs[..., 10].T[::-1, ::-1], infection[..., 10].T[::-1, ::-1]
    slab = np.s_[:, :, 8:14]
    grey = make_scan(lungs.shape, unit="grey")
    lobes = np.where(lungs == 1, 1, np.where(lungs == 2, 4, 0))
    lobes[..., :12][lungs[..., :12] == 1], lobes[..., :12][lungs[..., :12] == 2] = 3, 5
    lobes[27:45, 15:26, 12:15] = 2
    found = {
        "volume": score_scan(scan, infection, lungs), "healthy": score_scan(scan, infection * 0, lungs),
        "full": score_scan(scan, lungs > 0, lungs), "grey": score_scan(grey, infection, lungs),
        "one lung": score_scan(scan, infection, np.where(lungs == 1, lungs, 0)),
        "lobes": score_scan(scan, infection, lungs, lobes=lobes),
        "cut off": score_scan(make_scan(lungs[slab].shape), infection[slab], lungs[slab]),
        "slice": score_scan(flat, spots, plane, z=0.5), "unknown height": score_scan(flat, spots, plane)}
    return {name: json.loads(json.dumps({**each.to_dict(), "case_id": name})) for name, each in found.items()}


@pytest.fixture(scope="module")
def shown() -> list[reports.Shown]:
    return [reports.Shown(title, np.zeros((4, 6, 3), np.uint8)) for title in ("slice 1 of 9", "coronal")]


KINDS = ("volume", "healthy", "full", "grey", "one lung", "lobes", "cut off", "slice", "unknown height")
PARTS = ("one lung", "cut off", "slice", "unknown height")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_case_has_a_page_that_stands_alone(cases, shown, kind):
    text = reports.case_html(cases[kind], shown, {"lungs": "#F0E442"})
    page = Page(text)
    assert set(page.tags) <= ALLOWED
    loads = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data")
             and not value.startswith("#")]
    assert len(loads) == 2 and all(value.startswith("data:image/png;base64,") for value in loads)
    assert not re.search(r"https?:|url\([^#]|@import|<script|javascript:", text)
    assert page.words.count("not a medical device") == 2 and kind in page.words
    style = text[text.index("<style>"):text.index("</style>")]
    assert '"Segoe UI"' in style and "&" not in style  # escaped quotes would fall back to the browser's own font


@pytest.mark.parametrize("kind", KINDS)
def test_a_dash_has_a_reason_and_nothing_missing_is_zero(cases, kind):
    case = cases[kind]
    lines = reports.score_lines(case) + reports.measure_lines(case)
    assert all((line.value == "–") == bool(line.why) for line in lines)
    assert "not computed" not in {line.why for line in lines}
    page = Page(reports.case_html(case)).words
    for reason in reports.missing_lines(case):
        assert reason in page


@pytest.mark.parametrize("kind", PARTS)
def test_what_was_not_seen_whole_has_no_ct_ss(cases, kind):
    case = cases[kind]
    titles = [card.title for card in reports.answers(case)]
    page = Page(reports.case_html(case))
    assert "CT-SS" not in titles and "/ 40" not in page.words
    values = {line.name: line.value for line in reports.score_lines(case)}
    assert {values["CT-SS, with the floor"], values["CT-SS, strict"], values["Pan score"]} == {"–"}
    if case["bounds"]:
        assert f"would be {case['bounds'][0]} to {case['bounds'][1]}" in page.words


def test_a_sum_over_regions_of_lungs_that_are_cut_off_is_not_shown(cases):
    """All 20 are "seen" there, so that their sum would read as a CT-SS."""
    case = cases["cut off"]
    assert case["n_observed"] == 20 and case["partial"] is not None
    assert [card.answer for card in reports.answers(case)][:2] == ["not decidable", "–"]
    words = Page(reports.batch_html([row(severe=None, ct_ss=None, low=None, high=None, partial=21)], [])).words
    assert "21" not in words


def test_both_totals_and_the_share_are_at_the_top(cases):
    for case in (cases[kind] for kind in KINDS if kind not in PARTS):
        severe, score, share = reports.answers(case)
        assert score.answer == f"{case['ct_ss']} / 40" and f"{case['ct_ss_strict']} / 40" in score.note
        assert severe.answer == ("yes" if case["ct_ss"] > 19.5 else "no")
        assert share.answer == reports.share_text(case["po"])


def test_a_strict_score_that_disagrees_is_said(lungs):
    """One stray voxel in each region makes the strict score severe, and the other one 0."""
    stray = np.zeros_like(lungs)
    stray.flat[np.unique(partition_regions(lungs), return_index=True)[1][1:]] = 1
    case = score_scan(make_scan(lungs.shape), stray, lungs)
    assert (case.n_regions_involved, case.n_lobes_involved, case.bilateral) == (0, 0, False)
    severe, score, share = reports.answers(case.to_dict())
    assert (score.answer, severe.answer) == ("0 / 40", "no") and share.answer != "0.0 %"
    assert "the strict score says severe" in severe.note and "20 / 40" in score.note


def test_a_method_of_regions_is_called_an_approximation_unless_lobes_were_given(cases):
    for kind in KINDS:
        said = "Geometric approximation" in Page(reports.case_html(cases[kind])).words
        assert said == (cases[kind]["method"] in ("geometric", "slice")), kind


def texts_replaced(value, text):
    """Every string below `value` replaced, but for what steers the page."""
    if isinstance(value, dict):
        return {name: each if name in ("schema", "method") else texts_replaced(each, text) for name, each in value.items()}
    if isinstance(value, list):
        return [texts_replaced(each, text) for each in value]
    return text if isinstance(value, str) else value


@settings(max_examples=15)
@given(st.one_of(st.just(EVIL), st.text(min_size=1, max_size=30),
                 st.text("<>&\"'/=;\0\r\n\t-!", min_size=1, max_size=12)))
def test_no_text_changes_the_tags_of_a_page(cases, text):
    case = cases["one lung"] | {"lungs": {"method": "m"}, "model": {"sha256": "s"}, "files": {"f": "h"}, "severe": None}
    plain, hostile = (Page(reports.case_html(texts_replaced(case, each) | {"files": {each: each}})) for each in ("x", text))
    for drawn in (lambda page: [tag for tag in page.tags if tag != "tspan"],  # a long name takes more lines
                  lambda page: [value for tag, _, value in page.attributes if tag != "tspan"]):
        assert drawn(hostile) == drawn(plain)


def test_hostile_names_are_shown_to_the_letter(cases):
    case = cases["volume"] | {"case_id": EVIL, "warnings": [EVIL], "model": {EVIL: EVIL}, "severe": None}
    page = Page(reports.case_html(case, [reports.Shown(EVIL, np.zeros((4, 6, 3), np.uint8))], {EVIL: "red"}))
    assert set(page.tags) <= ALLOWED and not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.texts.count(EVIL) >= 5
    assert [value for _, name, value in page.attributes if name == "alt" and EVIL in value]


def test_warnings_come_before_the_answers(cases):
    page = reports.case_html(cases["one lung"])
    assert 0 < page.index("single_lung") < page.index("not decidable") < page.index('id="scores"')


def test_pages_are_accessible(cases, shown):
    for text in (reports.case_html(cases["volume"], shown), reports.batch_html([], [])):
        page = Page(text)
        assert ("html", "lang", "en") in page.attributes
        assert page.tags.count("h1") == page.tags.count("main") == page.tags.count("title") == 1
        assert page.tags.count("caption") == page.tags.count("table")
        scopes = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
        assert len(scopes) == page.tags.count("th") and set(scopes) <= {"row", "col"}
        identifiers = [value for _, name, value in page.attributes if name == "id"]
        assert len(identifiers) == len(set(identifiers))
        assert {value for _, name, value in page.attributes if name == "aria-labelledby"} <= set(identifiers)
        assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
        assert "@media print" in text


def luminance(colour: str) -> float:
    levels = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_numbers_on_coloured_regions_can_be_read():
    """The WCAG ratio for small text is 4.5."""
    for score, colour in reports.SCORE_COLOURS.items():
        text, back = luminance("#FFFFFF" if score == 2 else "#111111"), luminance(colour)
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) > 4.5


def test_bad_results_are_refused(cases):
    for result, words in (({}, "not a severity result"), *((cases["full"] | {"model": {"sha256": "0"}, "severe": severe},
                          "whose error was not measured") for severe in (True, False))):  # no verdict without one
        pytest.raises(ConfigError, reports.case_html, result).match(words)


def test_a_drawn_mask_is_shown_with_its_measured_error(cases):
    case = cases["full"] | {"model": {"card": {"licence": "CC BY-NC-SA 4.0", "measured": {
        "on": "7 scans", "share_mae": 0.03, "ct_ss_limits": [-4.0, 5.0]}}}}
    words = Page(reports.case_html(case)).words
    for text in ("Severe yes", "How wrong may this be?", "On 7 scans", "CC BY-NC-SA 4.0", "0.03", "−4.00, 5.00"):
        assert text in words
    words = Page(reports.case_html(cases["full"] | {"model": {"sha256": "0"}, "severe": None})).words
    assert "Severe not decidable" in words and "was not measured" in words


def test_the_score_says_its_margin_and_is_cautious_about_thick_slices(cases):
    assert reports.answers(cases["healthy"])[1].note.startswith("19.5 below the threshold")
    for spacing, words in (([1, 1, 5.0], "slices of 5.0 mm"), (None, "thickness of the slices is not known")):
        assert words in reports.answers(cases["full"] | {"input": {"spacing": spacing}})[1].note
    assert "slices" not in reports.answers(cases["full"] | {"input": {"spacing": [1, 1, 3.0]}})[1].note


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagram_hatches_what_was_not_seen_and_names_every_part(cases, kind):
    case = cases[kind]
    parts = case["sectors"] or case["regions"]
    page = Page(reports.case_html(case))
    fills = [value for tag, name, value in page.attributes if (tag, name) == ("rect", "fill")]
    assert fills.count("url(#unseen)") == sum(part["score"] is None for part in parts)
    drawing = " ".join(page.words.split("What was used")[0].split())
    for part in parts:
        assert part["name"].split()[-1] in drawing
    assert " R L 0: none" in drawing


def test_the_right_lung_is_at_the_left_of_the_diagram(cases):
    text = reports.case_html(cases["volume"])
    places = {name.split()[0]: float(x) for x, name in re.findall(r'<tspan x="([\d.]+)" y="[\d.]+">(\d+ [^<]+)', text)}
    assert max(places[str(k)] for k in range(1, 11)) < min(places[str(k)] for k in range(11, 21))
    assert places["4"] < places["5"] and places["9"] < places["7"] and places["17"] < places["19"]  # lateral is outside


def test_pictures_of_any_scan(lungs):
    infection = (lungs > 0).astype(np.uint8)
    volume, grey, flat = make_scan(lungs.shape), make_scan(lungs.shape, unit="grey"), make_scan((30, 48), "slice")
    for scan, mask, lung, n in ((volume, infection, lungs, 9), (grey, infection, lungs, 9),
                                (flat, infection[..., 9].T, lungs[..., 9].T, 2)):
        shown = reports.case_pictures(scan, mask, lung)
        assert len(shown) >= n and len({each.title for each in shown}) == len(shown)  # no slice twice
        assert all(each.picture.dtype == np.uint8 and each.picture.shape[2] == 3 for each in shown)
        assert len(reports.case_pictures(scan, mask * 0, lung * 0)) >= 2
    sheet = reports.contact_sheet(shown)
    assert reports.png_of(sheet).startswith(b"\x89PNG") and np.array_equal(sheet, reports.contact_sheet(shown))
    assert set(reports.colour_names(infection)) == {"infection", "lungs"}
    assert "lungs, weight-free" in reports.colour_names(infection, lungs)


def test_the_view_from_the_front_has_the_scores(lungs):
    scan, infection = make_scan(lungs.shape), np.zeros_like(lungs)
    infection[:40, :14, :12] = 1
    scored = score_scan(scan, infection, lungs)
    shown = reports.case_pictures(scan, infection, lungs, parts=scored.parts)
    front = next(each.picture for each in shown if "highest region score" in each.title)
    scores = {region["score"] for region in scored.regions}
    expected = {tuple(bytes.fromhex(reports.SCORE_COLOURS[score][1:])) for score in scores}
    assert {*map(tuple, front.reshape(-1, 3).tolist())} - {(255, 255, 255)} <= expected and max(scores) == 2


@given(st.integers(-1200, 400))
def test_every_voxel_is_in_one_bar_of_the_histogram(value):
    lungs = np.ones((3, 4, 2), np.uint8)
    scan = Scan(np.full(lungs.shape, value, np.float32), "volume", "HU", "made", "0" * 64)
    found = reports.hu_histogram(scan, lungs * 0, lungs)
    k = (min(max(value, -1000), 199) + 1000) // 25
    assert sum(found["lung"]) == found["lung"][k] == 24 and sum(found["lesion"]) == 0


def row(**values) -> dict:
    plain = {"case_id": "a", "ct_ss": 1, "ct_ss_strict": 1, "severe": False, "low": 1, "high": 1, "po": 0.1,
             "po_right": 0.1, "partial": 1, "partial_max": 40, "warnings": "", "method": "geometric"}
    return {**dict.fromkeys(("po_left", "pan25", "mosmed_class", "slice_extent_score")), **plain, **values}


def links_of(text: str) -> list[str]:
    return [value for tag, name, value in Page(text).attributes if (tag, name) == ("a", "href")]


def test_batch_is_sorted_by_severity():
    rows = [row(case_id="mild"), row(case_id="part", severe=None, ct_ss=None, low=3), row(case_id="worst", severe=True, ct_ss=39),
            row(case_id="bad", severe=True, ct_ss=20), row(case_id="mild2", po=0.2)]
    assert [link.split("/")[1] for link in links_of(reports.batch_html(rows, []))] == ["worst", "bad", "part", "mild2", "mild"]


def test_batch_puts_failures_first_with_their_remedy():
    message = str(ConfigError("cannot be read", file="x", fix="fetch it again"))
    text = reports.batch_html([row()], [{"case": EVIL, "error": "ReadError", "message": message}])
    page = Page(text)
    assert set(page.tags) <= ALLOWED and EVIL in page.texts
    assert page.words.index("fetch it again") < page.words.index("Not severe") and "do: fetch" not in page.words
    assert "No case has a result." in Page(reports.batch_html([], [])).words


@given(st.text(min_size=1, max_size=20).filter(lambda name: name not in (".", "..")))
def test_batch_links_stay_in_the_folder(name):
    (link,) = links_of(reports.batch_html([row(case_id=name)], []))
    start, folder, page = link.split("/")
    assert (start, page) == (".", "report.html") and folder and not re.search(r"[\s:?#\\<>\"']", folder)


def test_batch_takes_the_rows_of_real_results(lungs):
    plane = lungs[..., 10].T[::-1, ::-1]
    results = [score_scan(make_scan(lungs.shape), lungs > 0, lungs, case_id="full"),
               score_scan(make_scan((30, 48), "slice"), plane > 0, plane, case_id="flat")]
    words = Page(reports.batch_html([each.row() for each in results], [])).words
    assert "40 / 40 (strict 40)" in words and "slice extent score 16 / 16" in words


@given(st.floats(0, 1))
def test_shares_never_read_as_something_else(share):
    text = reports.share_text(share)
    value = float(text.strip("< %"))
    assert (text == "0.0 %") == (share == 0) and (text == "100.0 %") == (share == 1)
    assert (value >= 50 and text != "< 50.0 %") == (share >= 0.5)
    assert abs(value - 100 * share) <= 0.1


def test_missing():
    assert reports.share_text(None) == reports.number_text(None) == "–"


CELLS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20),
                  st.text("=+-@\t\r\n\"',;|", max_size=6))


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "=c"]), CELLS, min_size=1), min_size=1, max_size=4))
def test_csv_reads_back_and_no_text_is_a_formula(rows):
    lines = list(csv.reader(io.StringIO(reports.csv_text(rows), newline="")))
    assert len(lines) == len(rows) + 1 and len({len(line) for line in lines}) == 1
    columns = list(dict.fromkeys(name for each in rows for name in each))
    assert lines[0] == ["'=c" if name == "=c" else name for name in columns]
    for each, line in zip(rows, lines[1:]):
        for name, cell in zip(columns, line):
            value = each.get(name)
            if isinstance(value, (int, float)):
                assert cell == repr(value)
            else:
                text = (value or "").replace("\r\n", "\n").replace("\r", "\n")
                assert cell in (text, "'" + text) and not cell.startswith(tuple("=+-@\t\r\n"))


def test_csv_keeps_numpy_numbers_and_nested_values():
    text = reports.csv_text([{"a": np.float64(-0.1), "b": np.int64(-3), "c": [1, 2], "d": True}])
    assert list(csv.reader(io.StringIO(text)))[1] == ["-0.1", "-3", "[1, 2]", "True"]
