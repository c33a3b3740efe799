"""The page of a run: its numbers, and what a person does with it in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import a_model
from explainability import CLASS_NAMES, FAMILIES

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

COMMINUTED, SIMPLE = CLASS_NAMES
HOSTILE = "<Img src=x onerror=alert(1)>&\"' #50%?.png"
MARKUP = '</script></td><script>alert("notes")</script>{cards}'
SIMILAR = "train/a (1).jpg (Simple Fracture, 0.997); train/b.jpg (Comminuted Fracture, 0.990)"
THUMBNAILS = {"train/a (1).jpg": b"\xff\xd8a", "train/b.jpg": b"\xff\xd8b", "train/unused.jpg": b"\xff\xd8c"}
OTHER = {"family": FAMILIES["efficientnet"], "architecture": "tf_efficientnetv2_s.in21k_ft_in1k"}
MODELS = [a_model(), a_model(**OTHER, checkpoint=Path("efficientnetv2_s_best.pth"))]
EMPTY = dict.fromkeys(tool.table_columns(MODELS, ["gradcam"]), "")


def a_row(file: str, truth: str, *said: tuple[str, float], **told: str) -> dict[str, str]:
    """A row of the table, of what the two models said."""
    row = EMPTY | {"file": file, "true_class": truth, "agree": tool.yes_or_no(said[0][0] == said[1][0])}
    row["map_agreement"] = f"{said[0][1] * said[1][1]:.6f}"
    for key, (predicted, confidence) in zip(FAMILIES, said):
        row |= {f"{key}_predicted": predicted, f"{key}_confidence": f"{confidence:.6f}"}
        row[f"{key}_correct"] = tool.yes_or_no(predicted == truth) if truth else ""
    return row | {"outputs": json.dumps([f"comparison_{Path(file).stem}.png"])} | told


RIGHT = a_row("a/right.png", SIMPLE, (SIMPLE, 0.99), (SIMPLE, 0.98), convnext_border="0.5")
DOUBTFUL = a_row("a/doubtful.png", SIMPLE, (COMMINUTED, 0.6), (COMMINUTED, 0.7), convnext_border="0.1")
DIFFER = a_row("a/differ.png", SIMPLE, (COMMINUTED, 0.61), (SIMPLE, 0.75))
SURE = a_row("a/sure.png", SIMPLE, (COMMINUTED, 0.97), (COMMINUTED, 0.6))
SUREST = a_row("a/surest.png", COMMINUTED, (SIMPLE, 0.6), (SIMPLE, 0.999), convnext_heat_in_box="0.25")
FLAGS = {"efficientnet_flags": "border", "efficientnet_ig_flags": "focus", "pair_flags": "map_agreement"}
FLAGGED = a_row("b/right.png", COMMINUTED, (COMMINUTED, 0.9), (COMMINUTED, 0.91), **FLAGS, notes=MARKUP)
FAILED = EMPTY | {"file": "a/bad.png", "true_class": SIMPLE, "error": "a/bad.png: cut short"}
ROWS = [RIGHT, DOUBTFUL, DIFFER, SURE, SUREST, FLAGGED, FAILED]


def observations(count: int) -> list[tool.Observation]:
    heat = np.zeros((7, 7), np.float32)
    heat[1, 5] = 1
    values = {key: 0.0 for key, check in tool.CHECKS.items() if check.about == "map"}
    return [tool.Observation(SIMPLE, heat, False, values) for _ in range(count)]


def page(rows: list[dict[str, str]] = ROWS, **seen: list[tool.Observation]) -> str:
    return tool.report_page(rows, MODELS, seen, ["method gradcam", "torch 2.10"], THUMBNAILS)


def lines_of(text: str) -> list[list[str]]:
    """The table by class."""
    table = text.partition("</caption>")[2].partition("</table>")[0]
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("</tr>")[:-1]]


def files_of(text: str) -> list[str]:
    return re.findall(r'<tr data-file="(.*?)"', text)


# ------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------


def test_wilson_interval_by_hand():
    # (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    assert tool.wilson_interval(8, 10) == pytest.approx((0.490163, 0.943317), abs=1e-5)
    assert tool.wilson_interval(10, 10) == pytest.approx((0.722460, 1), abs=1e-5)


def test_each_models_accuracy_and_mean_map():
    first, second = re.findall("<section><h2>.*?</section>", page(convnext=observations(5)))
    assert "33.3% of 6 right (95 % interval 9.7% to 70.0%)" in first
    assert "50.0% of 6 right (95 % interval 18.8% to 81.2%)" in second
    assert "<p>convnextv2_base.fcmae_ft_in22k_in1k, convnext_v2_improved_best.pth; Validation acc" in first
    (code,) = re.findall('src="data:image/png;base64,(.*?)" alt="Mean map of 5 images"', first)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    assert pixels[28, 100, 0] > 100 > pixels[28, 100, 2] and pixels[100, 28, 2] > 100 > pixels[100, 28, 0]
    assert "Mean map" not in second


def test_confidence_against_what_is_right_or_counted_by_hand():
    def bars(text: str) -> list[list[str]]:
        paths = re.findall('<path d="(.*?)"', text)
        return [re.findall(r"M(\d+ 100v-(?!0\.0)[\d.]+)", path) for path in paths]

    said = (SIMPLE, SIMPLE, SIMPLE, COMMINUTED)
    rows = [a_row(f"{n}.png", SIMPLE, (name, 0.65), (SIMPLE, 0.99)) for n, name in enumerate(said)]
    rows.append(a_row("sure.png", SIMPLE, (COMMINUTED, 0.95), (SIMPLE, 0.99)))
    text = page(rows)
    assert bars(text) == [["60 100v-75.0"], ["90 100v-100.0"]] and "<line " in text
    assert f"calibration error {(abs(4 * 0.65 - 3) + 0.95) / 5:.3f}" in text
    unknown = [row | {"true_class": "", "convnext_correct": "", "efficientnet_correct": ""} for row in rows]
    unknown[0]["convnext_confidence"] = "0.88"
    text = page(unknown)
    assert bars(text)[0] == ["60 100v-100.0", "80 100v-33.3", "90 100v-33.3"] and "<line " not in text
    assert "the highest bar is 3" in text and "No true class is known" in text


def test_table_by_class_by_hand():
    head, *lines = lines_of(page())
    assert head == [
        "Model", "Class", "Images", "as Comminuted Fracture", "as Simple Fracture", "⚠ border", "⚠ focus",
        "⚠ map agreement", "on border", "on dark", "on markers", "in box",
    ]  # fmt: skip
    assert lines == [
        ["ConvNeXt V2", COMMINUTED, "2", "1", "1", "0", "0", "1", "–", "–", "–", "25%"],
        ["ConvNeXt V2", SIMPLE, "4", "3", "1", "0", "0", "0", "30%", "–", "–", "–"],
        ["EfficientNetV2-S", COMMINUTED, "2", "1", "1", "1", "1", "1", "–", "–", "–", "–"],
        ["EfficientNetV2-S", SIMPLE, "4", "2", "2", "0", "0", "0", "–", "–", "–", "–"],
    ]
    assert re.findall('data-share="(.*?)"', page())[2:4] == ["0.750", "0.250"]
    unknown = lines_of(page([a_row("a.png", "", (SIMPLE, 0.9), (COMMINUTED, 0.8))]))[1:]
    assert ["".join(line[2:5]) for line in unknown] == ["000", "101", "110", "000"]


def test_images_that_one_model_was_not_asked_about_do_not_count_for_it():
    asked_one = RIGHT | {"agree": "", "file": "a/one.png"} | {name: "" for name in EMPTY if name[:3] == "eff"}
    text = page([RIGHT, asked_one])
    assert "100.0% of 2 right" in text and "100.0% of 1 right" in text
    assert "The models agree on 1 of 1 images" in text and lines_of(text)[4][2] == "1"


def test_page_says_what_was_run_and_begins_with_what_to_look_at():
    text = page([*ROWS, RIGHT | {"file": "a/unlike.png", "convnext_flags": "unlike"}])
    assert "<p>7 explained · 1 failed · 2 flagged · The models agree on 6 of 7 images · Maps share " in text
    assert '<p class="muted">method gradcam · torch 2.10</p>' in text and "Not for diagnosis." in text
    order = ["a/unlike", "a/surest", "a/sure", "a/differ", "a/doubtful", "b/right", "a/right", "a/bad"]
    assert files_of(text) == [f"{name}.png" for name in order]
    assert {"a/right.png", "b/right.png", "sure.png"} < set(re.findall(r'">([\w/.]+)</a></p>', text))


def test_the_same_rows_give_the_same_bytes_and_no_markup():
    rows = [row | {"file": f"{n}/{HOSTILE}\udcf6", "true_class": MARKUP} for n, row in enumerate(ROWS)]
    rows[0]["outputs"] = json.dumps([f"comparison_{HOSTILE}", "map_r\udcf6ntgen.npy"])
    text = page(rows)
    assert text.encode() == page(rows).encode() and text.count("<script") == 1
    assert MARKUP not in text and HOSTILE not in text and "<Img src=x" not in text
    links = re.findall(r'(?:href|src)="(?!data:)(.*?)"', text)
    assert [unquote(link, errors="surrogateescape") for link in links if "%" in link][1:] == [
        f"comparison_{HOSTILE}", f"comparison_{HOSTILE}", "map_r\udcf6ntgen.npy"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "outputs, look, told",
    (
        (
            ["gradcam_a.png", "comparison_a.svg", "map_a.npy"],
            "cards",
            '="Open right.png"><img src="comparison_a',
        ),
        (
            ["gradcam_a.pdf", "map_a.npy"],
            "cards",
            '<td><p class="name"><a href="gradcam_a.pdf">right.png</a>',
        ),
        (["heatmap_a.png", "map_a.npy"], "lines", '<td><p class="name">right.png</p>'),
    ),
)
def test_figures_are_shown_pdf_is_linked_and_without_either_there_is_a_table(outputs, look, told):
    text = page([RIGHT | {"outputs": json.dumps(outputs)}])
    assert told in text and f'<table class="{look}">' in text


def test_similar_cases_are_pictures_that_stand_in_the_page_once():
    text = page([RIGHT | {"efficientnet_similar": SIMILAR}, DOUBTFUL | {"efficientnet_similar": SIMILAR}])
    rules = dict(re.findall(r"\.(case-\w+) { content: url\(data:image/jpeg;base64,(.*?)\) }", text))
    assert list(rules.values()) == ["/9hh", "/9hi"]
    told = [(text, name) for name, text in zip(rules, SIMILAR.split("; "))]
    assert re.findall('<span title="(.*?)" class="(.*?)">', text) == 2 * told
    assert text.count("<p>Most similar to EfficientNetV2-S</p>") == 2


# ------------------------------------------------------------------------------------------
# A whole run
# ------------------------------------------------------------------------------------------


def test_run_over_images_ends_with_its_page(tiny_arguments, tmp_path, xray, capsys):
    folder, out = tmp_path / "simple_fracture", tmp_path / "figures"
    folder.mkdir()
    shutil.copy(xray, folder / "doe_left.png")
    Image.open(xray).rotate(90).save(folder / "doe_right.png")

    def run(*options: str) -> str:
        assert tool.main([f"--image={folder}", *tiny_arguments, *options]) == 0
        return (out / "report.html").read_text(encoding="utf-8")

    first = run()
    assert "Report: " in capsys.readouterr().out
    pictures = re.findall('<button aria-label="Open doe_.*?"><img src="(.*?)"', first)
    assert sorted(pictures) == ["comparison_doe_left.png", "comparison_doe_right.png"]
    (out / "comparison_doe_left.png").unlink()
    text = run("--skip-existing")
    assert len(files_of(text)) == 2 and "Mean map of 1 images" in text
    assert run() == first
    shutil.rmtree(out)
    text = run("--anonymous", "--no-figures")
    assert "doe" not in text and len(files_of(text)) == 2 and '<table class="lines">' in text


# ------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------

SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,1000")
PICTURES = """return Promise.all([...document.querySelectorAll("#list img")].map(image => {
    image.loading = "eager";
    return image.decode().then(() => image.naturalWidth); }))"""
FETCH = "const done = arguments[0]; fetch('https://example.org').then(() => done(1), () => done('refused'));"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Path:
    """The page of 60 images: 40 right, 12 wrong, 4 disagreements, 3 of hostile names and one that failed."""
    folder = tmp_path_factory.mktemp("report")
    rows = [a_row(f"simple/{n}.png", SIMPLE, (SIMPLE, 0.6 + n / 100), (SIMPLE, 0.7)) for n in range(40)]
    rows += [a_row(f"comminuted/{n}.png", COMMINUTED, (SIMPLE, 0.8), (SIMPLE, 0.7)) for n in range(100, 112)]
    rows += [a_row(f"simple/{n}.png", SIMPLE, (SIMPLE, 0.8), (COMMINUTED, 0.7)) for n in range(200, 204)]
    for name in (HOSTILE, "50%25.png", "ä ö.png"):
        told = {"notes": MARKUP, "convnext_flags": "border", "convnext_similar": SIMILAR}
        rows.append(a_row(f"simple/{name}", SIMPLE, (SIMPLE, 0.8), (SIMPLE, 0.7), **told))
    picture = Image.fromarray(np.full((90, 120, 3), 200, np.uint8))
    for row in rows:
        picture.save(folder / json.loads(row["outputs"])[0])
    (folder / "report.html").write_text(page([*rows, FAILED], convnext=observations(24)), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def opened(browser, sixty):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(sixty.as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def text_of(browser, place: str) -> str:
    return browser.find_element("id", place).text


def names(browser) -> list[str]:
    script = "return [...document.querySelectorAll('#list .name')].map(name => name.textContent)"
    return browser.execute_script(script)


def click(browser, text: str) -> None:
    browser.find_element("xpath", f"//label[contains(., '{text}')]").click()


def press(browser, key: str, times: int = 1) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(getattr(Keys, key) * times)


def choose(browser, name: str, place: int) -> None:
    """The choice at this place of a list, by keyboard, which the page notices as it does a person's."""
    browser.execute_script(f"document.querySelector('[name={name}]').focus()")
    press(browser, "HOME")
    press(browser, "ARROW_DOWN", place)


def test_filters_combine_and_tell_how_many_they_have(opened):
    assert [label.text for label in opened.find_elements("css selector", "label")] == [
        "wrong 16", "models disagree 4", "failed 1", "⚠ Attention on image borders 3",
        f"{COMMINUTED} 12", f"{SIMPLE} 48",
    ]  # fmt: skip
    assert text_of(opened, "count") == "60 of 60 images"
    click(opened, "wrong")
    assert text_of(opened, "count") == "16 of 60 images"
    click(opened, SIMPLE)
    assert set(names(opened)) == {f"{n}.png" for n in range(200, 204)}
    choose(opened, "model", 1)
    assert text_of(opened, "count") == "0 of 60 images"  # there the other model is wrong
    click(opened, SIMPLE)
    assert text_of(opened, "count") == "12 of 60 images"


def test_search_orders_and_hostile_names(opened):
    opened.find_element("name", "name").send_keys("img SRC")
    assert names(opened) == [HOSTILE] and MARKUP in text_of(opened, "list")
    press(opened, "BACKSPACE", len("img SRC"))
    for place, first in ((1, "0.png"), (2, "0.png"), (0, "200.png"), (3, "bad.png")):
        choose(opened, "order", place)
        assert names(opened)[0] == first
    assert [name for name in names(opened) if name[0].isdigit()][12:15] == ["0.png", "1.png", "2.png"]
    assert opened.execute_script(PICTURES) == [120] * 59


def test_opening_going_on_escape_and_the_address(opened):
    click(opened, "models disagree")
    opened.execute_script("document.querySelectorAll('#list button')[1].focus()")
    press(opened, "ENTER")
    assert text_of(opened, "place") == "2 of 4"
    for told in ("201.png", "comparison_201.png", "true: Simple", "✗ wrong, EfficientNetV2-S: Comminuted"):
        assert told in text_of(opened, "frame")
    assert text_of(opened, "frame").index("✗ wrong") < text_of(opened, "frame").index("comparison_201.png")
    press(opened, "ARROW_RIGHT")
    picture = opened.find_element("css selector", "#frame img")
    assert picture.get_attribute("src").endswith("comparison_202.png")
    address = opened.current_url
    press(opened, "ESCAPE")
    assert not opened.find_element("id", "large").is_displayed()
    assert "image=" not in opened.current_url and "only=disagree" in opened.current_url
    opened.get("about:blank")
    opened.get(address)
    assert text_of(opened, "count") == "4 of 60 images" and text_of(opened, "place") == "3 of 4"
    press(opened, "ARROW_LEFT", 3)
    assert text_of(opened, "place") == "1 of 4" and "200.png" in text_of(opened, "frame")
    opened.find_element("id", "close").click()
    opened.find_element("css selector", "#list img").click()
    assert text_of(opened, "place") == "1 of 4"


def test_the_buttons_stay_in_view_and_only_the_picture_changes_its_size(opened):
    small = {"width": 360, "height": 240, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", small)
    opened.find_element("css selector", "#list button").click()
    heights = "const {scrollHeight, clientHeight} = document.getElementById(arguments[0]); "
    heights += "return scrollHeight - clientHeight"
    assert opened.execute_script(heights, "large") <= 0 < opened.execute_script(heights, "frame")
    for place, kind in ((".name", None), ("button", "whole"), ("button", "")):
        opened.execute_script("document.querySelector(arguments[0]).click()", f"#frame {place}")
        assert opened.find_element("id", "frame").get_dom_attribute("class") == kind
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_requested_from_elsewhere(opened):
    time.sleep(0.2)
    log = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [each["params"] for each in log if each["method"] == "Network.requestWillBeSent"]
    assert sent and all(each["request"]["url"].startswith(("file:", "data:")) for each in sent)
    assert opened.execute_async_script(FETCH) == "refused"
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", (360, 1280, 2560))
def test_nothing_is_wider_than_the_window_cells_are_shaded_and_cases_pictured(opened, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    case = opened.find_element("css selector", "[class^=case]")
    assert wide <= width and "/9hh" in case.value_of_css_property("content")
    cells = opened.find_elements("css selector", "[data-share]")[:2]
    assert len({cell.value_of_css_property("background-color") for cell in cells}) == 2


@pytest.mark.parametrize("told, look", (({}, "cards"), ({"outputs": "[]"}, "lines")))
def test_five_thousand_images_open_and_those_out_of_view_cost_nothing(browser, tmp_path, told, look):
    rows = [a_row(f"a/{n}.png", SIMPLE, (SIMPLE, 0.8), (SIMPLE, 0.7), **told) for n in range(4999)]
    (tmp_path / "report.html").write_text(page([*rows, FAILED]), encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    assert text_of(browser, "count") == "5000 of 5000 images"
    row = browser.find_element("css selector", f"table.{look} tr")
    assert row.value_of_css_property("content-visibility") == "auto"
    assert all(image.get_attribute("loading") == "lazy" for image in row.find_elements("tag name", "img"))
    browser.execute_script("document.querySelector('#list').lastChild.scrollIntoView()")
    assert browser.find_element("css selector", f"table.{look} tr:last-child .name").text == "bad.png"
    click(browser, "failed")
    assert "✗ a/bad.png: cut short" in text_of(browser, "list") and names(browser) == ["bad.png"]
    browser.get_log("browser")  # its pictures are not there
