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

import explainability
from conftest import a_model
from explainability import CHECKS, CLASS_NAMES, FAMILIES, Model, Observation, report_page, wilson_interval

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

COMMINUTED, SIMPLE = CLASS_NAMES
HOSTILE = "<img src=x onerror=alert(1)>&\"' #50%?.png"
MARKUP = '</script><script>alert("notes")</script>'


def models() -> list[Model]:
    other = {"family": FAMILIES["efficientnet"], "architecture": "tf_efficientnetv2_s.in21k_ft_in1k"}
    return [a_model(), a_model(**other, checkpoint=Path("efficientnetv2_s_best.pth"))]


def a_row(
    file: str, truth: str, first: tuple[str, float], second: tuple[str, float], **told: str
) -> dict[str, str]:
    """A row of the table, of what the two models said."""
    row = {"file": file, "true_class": truth, "agree": "yes" if first[0] == second[0] else "no"}
    row["map_agreement"] = f"{first[1] * second[1]:.6f}"
    for key, (said, confidence) in zip(FAMILIES, (first, second)):
        correct = "yes" if said == truth else "no"
        row |= {f"{key}_predicted": said, f"{key}_confidence": f"{confidence:.6f}"}
        row |= {f"{key}_correct": correct if truth else "", f"{key}_flags": ""}
    return row | {"notes": "", "error": "", "outputs": json.dumps([f"comparison_{Path(file).stem}.png"])} | told


RIGHT = a_row("a/right.png", SIMPLE, (SIMPLE, 0.99), (SIMPLE, 0.98), convnext_border="0.5", convnext_in_box="yes")
DOUBTFUL = a_row("a/doubtful.png", SIMPLE, (COMMINUTED, 0.6), (COMMINUTED, 0.7), convnext_border="0.1")
DIFFER = a_row("a/differ.png", SIMPLE, (COMMINUTED, 0.61), (SIMPLE, 0.75))
SURE = a_row("a/sure.png", SIMPLE, (COMMINUTED, 0.97), (COMMINUTED, 0.6))
SUREST = a_row("a/surest.png", COMMINUTED, (SIMPLE, 0.6), (SIMPLE, 0.999), convnext_heat_in_box="0.25")
FLAGGED = a_row(
    "b/right.png", COMMINUTED, (COMMINUTED, 0.9), (COMMINUTED, 0.91), efficientnet_flags="border, focus", notes=MARKUP
)
FAILED = {"file": "a/bad.png", "true_class": SIMPLE, "error": "a/bad.png: cut short"}
ROWS = [RIGHT, DOUBTFUL, DIFFER, SURE, SUREST, FLAGGED, FAILED]


def observations(count: int) -> list[Observation]:
    heat = np.zeros((7, 7), np.float32)
    heat[1, 5] = 1
    values = {key: 0.0 for key, check in CHECKS.items() if check.about == "map"}
    return [Observation(SIMPLE, heat, False, values) for _ in range(count)]


THUMBNAILS = {"train/a (1).jpg": b"\xff\xd8a", "train/b.jpg": b"\xff\xd8b", "train/unused.jpg": b"\xff\xd8c"}


def page(rows: list[dict[str, str]] = ROWS, **seen: list[Observation]) -> str:
    return report_page(rows, models(), seen, ["method gradcam", "torch 2.10"], THUMBNAILS)


def data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def texts(node: object) -> list[str]:
    """The texts of a node of the page, in order."""
    if isinstance(node, str):
        return [node]
    return [text for child in node[2:] for text in texts(child)]


def found(node: object, tag: str) -> list[list]:
    """The nodes of this tag in a node of the page."""
    if isinstance(node, str):
        return []
    return [node for _ in range(node[0] == tag)] + [each for child in node[2:] for each in found(child, tag)]


# ------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------


def test_wilson_interval_by_hand():
    # (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    assert wilson_interval(8, 10) == pytest.approx((0.490163, 0.943317), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.722460, 1), abs=1e-5)


def test_each_models_accuracy_and_calibration_error_by_hand():
    first, second = found(["div", {}, *data(page())["places"]["about"]], "section")[:2]
    assert "33.3% of 6 right (95 % interval 9.7% to 70.0%)" in texts(first)
    assert "50.0% of 6 right (95 % interval 18.8% to 81.2%)" in texts(second)
    # tenths 0.6: three wrong at 0.6033; 0.9: 0.99 and 0.9 right, 0.97 wrong
    error = (3 * 0.6033333 + 3 * abs(0.9533333 - 2 / 3)) / 6
    assert f"Share right by confidence, both 0 to 100 %; calibration error {error:.3f}" in texts(first)


def test_bars_are_as_high_as_the_share_that_is_right_or_the_count():
    rows = [
        a_row(f"{n}.png", SIMPLE, (said, 0.65), (SIMPLE, 0.99))
        for n, said in enumerate((SIMPLE, SIMPLE, SIMPLE, COMMINUTED))
    ]
    known = found(data(page(rows))["places"]["about"][-1], "path")
    assert [each[1]["d"] for each in known] == ["M60 100v-75.0h9v75.0z", "M90 100v-100.0h9v100.0z"]
    for row in rows[:3]:
        row["true_class"] = row["convnext_correct"] = row["efficientnet_correct"] = ""
    unknown = [row | {"true_class": "", "convnext_correct": "", "efficientnet_correct": ""} for row in rows]
    unknown[0]["convnext_confidence"] = "0.88"
    first, _ = found(data(page(unknown))["places"]["about"][-1], "path")
    assert first[1]["d"] == "M60 100v-100.0h9v100.0zM80 100v-33.3h9v33.3z"
    assert "Images by confidence, 0 to 100 %; the highest bar is 3" in texts(data(page(unknown))["places"]["about"][-1])


def test_table_by_class_by_hand():
    (table,) = found(data(page())["places"]["about"][-1], "table")
    lines = [[texts(cell)[0] for cell in line[2:]] for line in table[2:] if line[0] == "tr"]
    assert lines[0] == [
        "Model", "Class", "Images", "as Comminuted Fracture", "as Simple Fracture", "⚠ border", "⚠ focus",
        "on border", "on dark", "on markers", "in box",
    ]  # fmt: skip
    assert lines[1:] == [
        ["ConvNeXt V2", COMMINUTED, "2", "1", "1", "0", "0", "–", "–", "–", "25%"],
        ["ConvNeXt V2", SIMPLE, "4", "3", "1", "0", "0", "30%", "–", "–", "–"],
        ["EfficientNetV2-S", COMMINUTED, "2", "1", "1", "1", "1", "–", "–", "–", "–"],
        ["EfficientNetV2-S", SIMPLE, "4", "2", "2", "0", "0", "–", "–", "–", "–"],
    ]
    assert [cell[1]["share"] for cell in table[5][5:7]] == [0.75, 0.25]


def test_without_a_true_class_images_count_with_the_predicted_one():
    (table,) = found(data(page([a_row("a.png", "", (SIMPLE, 0.9), (COMMINUTED, 0.8))]))["places"]["about"][-1], "table")
    counts = [[texts(cell)[0] for cell in line[2:]][2:5] for line in table[3:]]
    assert [line for line in counts if line[0] != "Images"] == [["0", "0", "0"], ["1", "0", "1"], ["1", "1", "0"], ["0", "0", "0"]]


def test_images_come_in_the_order_in_which_to_look():
    names = [row["file"] for row in data(page())["rows"]]
    assert names == [
        "a/surest.png", "a/sure.png", "a/differ.png", "a/doubtful.png", "b/right.png", "a/right.png", "a/bad.png",
    ]  # fmt: skip


def test_mean_map_is_told_with_the_count_of_images_that_it_covers():
    about = data(page(convnext=observations(5)))["places"]["about"]
    (image,) = found(["div", {}, *about], "img")
    assert image[1]["alt"] == "Mean map of 5 images" and image[1]["src"].startswith("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image[1]["src"].partition(",")[2]))))
    assert pixels[28, 100, 0] > 100 > pixels[28, 100, 2] and pixels[100, 28, 2] > 100 > pixels[100, 28, 0]


def test_page_says_what_was_run_and_whether_the_models_agree():
    said = texts(["div", {}, *data(page())["places"]["about"]])
    told = "6 explained · 1 failed · 1 flagged · The models agree on 5 of 6 images · Maps share "
    assert said[1].startswith(told) and said[2] == "method gradcam · torch 2.10"
    assert "convnextv2_base.fcmae_ft_in22k_in1k, convnext_v2_improved_best.pth; Validation accuracy: 98.32%" in said


def test_the_same_rows_give_the_same_bytes_and_no_markup():
    text = page()
    assert text == page() and MARKUP not in text and text.count("<script") == 2
    assert text.encode()


def test_images_of_one_name_are_told_apart():
    names = [row["caption"].partition(" · ")[0] for row in data(page())["rows"]]
    assert {"a/right.png", "b/right.png", "sure.png"} < set(names)


def test_figure_links_are_percent_encoded():
    files = [f"comparison_{HOSTILE}", "comparison_r\udcf6ntgen.png"]
    for file, link in zip(files, ("%3Cimg%20src%3Dx", "r%F6ntgen.png")):
        row = data(page([RIGHT | {"outputs": json.dumps([file])}]))["rows"][0]
        assert link in row["picture"] and ":" not in row["picture"] and '"' not in row["picture"]


# ------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_arguments, tmp_path, xray):
    """Explain two images of one patient's folder; the page that comes of it."""
    for name in ("doe_left.png", "doe_right.png"):
        path = tmp_path / "simple_fracture" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(xray, path)
    Image.open(path).rotate(90).save(path)

    def run(*options: str) -> str:
        assert explainability.main([f"--image={tmp_path / 'simple_fracture'}", *tiny_arguments, *options]) == 0
        return (tmp_path / "figures" / "report.html").read_text()

    return run


def test_run_over_images_ends_with_its_page(run, tmp_path, capsys):
    rows = data(run())["rows"]
    assert "Report: " in capsys.readouterr().out
    assert sorted(row["picture"] for row in rows) == ["comparison_doe_left.png", "comparison_doe_right.png"]
    assert all((tmp_path / "figures" / unquote(row["picture"])).is_file() for row in rows)
    first = (tmp_path / "figures" / "report.html").read_bytes()
    (tmp_path / "figures" / "comparison_doe_left.png").unlink()
    text = run("--skip-existing")
    assert len(data(text)["rows"]) == 2 and "Mean map of 1 images" in text
    assert run().encode() == first


def test_anonymous_page_has_no_name(run):
    text = run("--anonymous", "--no-figures")
    assert "doe" not in text and len(data(text)["rows"]) == 2


@pytest.mark.parametrize("option, is_linked", (("--no-figures", False), ("--format=pdf", True)))
def test_page_without_pictures(run, option, is_linked):
    rows = data(run(option, "--model=convnext"))["rows"]
    assert [row["picture"] for row in rows] == ["", ""]
    assert [row["isDrawn"] for row in rows] == [is_linked] * 2
    links = [link[1]["href"] for link in found(["div", {}, *rows[0]["cells"][0]], "a")]
    assert links == (["gradcam_convnext_doe_left.pdf"] if is_linked else [])


# ------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1280,1000"):
        options.add_argument(flag)
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
        rows.append(a_row(f"simple/{name}", SIMPLE, (SIMPLE, 0.8), (SIMPLE, 0.7), notes=MARKUP, convnext_flags="border"))
    rows.append({"file": "simple/bad.png", "true_class": SIMPLE, "error": "simple/bad.png: cut short"})
    picture = Image.fromarray(np.full((90, 120, 3), 200, np.uint8))
    for row in rows[:-1]:
        picture.save(folder / json.loads(row["outputs"])[0])
    (folder / "report.html").write_text(page(rows, convnext=observations(24)))
    return folder / "report.html"


@pytest.fixture
def opened(browser, sixty):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(sixty.as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def count(browser) -> str:
    return browser.find_element("id", "count").text


def click(browser, text: str) -> None:
    browser.find_element("xpath", f"//label[contains(., '{text}')]").click()


def choose(browser, name: str, place: int) -> None:
    """The choice at this place of a list, by keyboard, which the page notices as it does a person's."""
    from selenium.webdriver.common.keys import Keys

    browser.find_element("name", name).send_keys(Keys.HOME + Keys.ARROW_DOWN * place)


def names(browser) -> list[str]:
    script = "return [...document.querySelectorAll('#list .name')].map(name => name.textContent)"
    return browser.execute_script(script)


def press(browser, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(getattr(Keys, key)).perform()


def test_filters_combine_and_tell_how_many_they_have(opened):
    labels = [label.text for label in opened.find_elements("css selector", "label")]
    assert labels == ["wrong 16", "models disagree 4", "failed 1", "⚠ Attention on image borders 3", f"{COMMINUTED} 12", f"{SIMPLE} 48"]
    assert count(opened) == "60 of 60 images"
    click(opened, "wrong")
    assert count(opened) == "16 of 60 images"
    click(opened, SIMPLE)
    assert count(opened) == "4 of 60 images" and set(names(opened)) == {f"{n}.png" for n in range(200, 204)}
    choose(opened, "model", 1)
    assert count(opened) == "0 of 60 images"  # there the other model is wrong
    click(opened, SIMPLE)
    assert count(opened) == "12 of 60 images"


def test_search_and_orders(opened):
    opened.find_element("name", "name").send_keys("IMG")
    assert names(opened) == [HOSTILE]
    for _ in range(3):
        press(opened, "BACKSPACE")
    for place, first in ((1, "0.png"), (2, "0.png"), (0, "200.png"), (3, "100.png")):  # look first, confidence, agreement, name
        choose(opened, "order", place)
        assert names(opened)[0] == first
    assert [name for name in names(opened) if name[0].isdigit()][12:16] == ["0.png", "1.png", "2.png", "3.png"]


def test_opening_going_on_escape_and_the_address(opened, sixty):
    click(opened, "models disagree")
    opened.find_elements("css selector", "article button")[1].click()
    dialog, caption = opened.find_element("id", "large"), opened.find_element("id", "caption")
    assert caption.text.startswith("2 of 4: 201.png · true: Simple Fracture · ConvNeXt V2: Simple Fracture, 80.0%")
    press(opened, "ARROW_RIGHT")
    assert caption.text.startswith("3 of 4: 202.png")
    assert opened.find_element("css selector", "#frame img").get_attribute("src").endswith("comparison_202.png")
    address = opened.current_url
    press(opened, "ESCAPE")
    assert not dialog.is_displayed() and "image=" not in opened.current_url and "only=disagree" in opened.current_url
    opened.get("about:blank")
    opened.get(address)
    assert count(opened) == "4 of 60 images"
    assert opened.find_element("id", "caption").text.startswith("3 of 4: 202.png")
    for _ in range(3):
        press(opened, "ARROW_LEFT")
    assert opened.find_element("id", "caption").text.startswith("1 of 4: 200.png")


def test_keyboard_opens_an_image(opened):
    opened.execute_script("document.querySelector('article button').focus()")
    press(opened, "ENTER")
    assert opened.find_element("id", "large").is_displayed()


def test_hostile_names_are_text_and_their_pictures_load(opened):
    opened.find_element("name", "name").send_keys("img src")
    assert names(opened) == [HOSTILE] and MARKUP in opened.find_element("id", "list").text
    for _ in "img src":
        press(opened, "BACKSPACE")
    script = """
        const images = [...document.querySelectorAll("#list img")];
        images.forEach(image => { image.loading = "eager"; });
        return Promise.all(images.map(image => image.decode().then(() => image.naturalWidth)));
    """
    assert opened.execute_script(script) == [120] * 59


def test_nothing_is_requested_from_elsewhere(opened):
    time.sleep(0.2)
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    refused = opened.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org').then(() => done('sent'), () => done('refused'));"
    )
    assert refused == "refused"
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", (360, 1280, 2560))
def test_nothing_is_wider_than_the_window(opened, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width


def test_five_thousand_images_open_within_two_seconds(browser, sixty):
    rows = [a_row(f"simple/{n}.png", SIMPLE, (SIMPLE, 0.8), (SIMPLE, 0.7)) for n in range(5000)]
    big = sixty.with_name("big.html")
    big.write_text(page(rows))
    browser.get(big.as_uri())
    spent = "const [time] = performance.getEntriesByType('navigation'); return time.loadEventEnd / 1000"
    assert count(browser) == "5000 of 5000 images" and browser.execute_script(spent) < 2
    wait = "const done = arguments[0], look = () => names().length === 5000 ? done() : setTimeout(look, 50);"
    browser.execute_async_script(f"const names = () => document.querySelectorAll('#list .name'); {wait} look();")
    browser.execute_script("document.querySelector('#list').lastChild.scrollIntoView()")
    assert browser.find_element("css selector", "#list > :last-child .name").is_displayed()
    browser.get_log("browser")  # its pictures are not there


def test_table_where_there_are_no_figures(browser, tmp_path):
    rows = [row | {"outputs": "[]"} for row in ROWS]
    (tmp_path / "report.html").write_text(page(rows))
    browser.get((tmp_path / "report.html").as_uri())
    assert len(browser.find_elements("css selector", "table#list tr")) == 7
    click(browser, "failed")
    assert "✗ a/bad.png: cut short" in browser.find_element("css selector", "table#list").text


def test_similar_cases_are_small_pictures_that_stand_in_the_page_once():
    similar = "train/a (1).jpg (Simple Fracture, 0.997); train/b.jpg (Comminuted Fracture, 0.990)"
    told = data(page([{**RIGHT, "efficientnet_similar": similar}, {**DOUBTFUL, "efficientnet_similar": similar}]))
    assert told["cases"] == {label: f"data:image/jpeg;base64,{code}" for label, code in (("train/a (1).jpg", "/9hh"), ("train/b.jpg", "/9hi"))}
    for row in told["rows"]:
        ((tag, _, words, _, *pictures),) = row["cells"][-1]
        assert tag == "p" and words == "Most similar to EfficientNetV2-S"
        assert [(each[0], each[1]["case"]) for each in pictures] == [("img", "train/a (1).jpg"), ("img", "train/b.jpg")]
        assert pictures[1][1]["alt"] == pictures[1][1]["title"] == "train/b.jpg (Comminuted Fracture, 0.990)"
