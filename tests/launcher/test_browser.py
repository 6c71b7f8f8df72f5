"""The page in a real browser: it works by mouse and keyboard, and text from data stays text."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.report import LABELS, browser, make_run
from launcher.report import main
from launcher.report.drawing import cjk_font

EVIL = ["<script>alert(1)</script>", "</table></script><h1>", "<img src=x onerror=alert(2)>&lt;"]
N = 3000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two runs, one of them without a single right answer to the evil texts."""
    folder = tmp_path_factory.mktemp("browser")
    letters = np.array(list("天地人你我他哈一二三"))
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(letters, 6)) for _ in range(N)]
    texts[:3] = EVIL
    labels = ["<b>动画</b>", *LABELS[1:]]
    runs = [
        make_run(folder / name, N, seed=seed, skill=skill, labels=labels, texts=texts)
        for seed, (name, skill) in enumerate([("丁<option>", -9.0), ("甲", 1.0)])
    ]
    assert main([*map(str, runs), "--out", str(folder / "out")]) == 0
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def opened(page: Path) -> Iterator[Any]:
    with browser() as driver:
        if driver is None:
            pytest.skip("no chromium with chromedriver and selenium on this machine")
        driver.get(page.as_uri())
        yield driver
        # Nothing went wrong, was blocked, or asked for from elsewhere.
        assert [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"] == []


@pytest.fixture
def one(opened: Any) -> Callable[[str], Any]:
    """Finds an element; the page is as it was when it was opened."""
    opened.refresh()
    return lambda selector: opened.find_element("css selector", selector)


def rows(driver: Any) -> list[list[str]]:
    """The cells of the rows that are in the document."""
    cells: list[list[str]] = driver.execute_script(
        'return [...document.querySelectorAll(".grid-body > *")].map('
        "(row) => [...row.children].map((cell) => cell.textContent))"
    )
    return cells


def test_text_stays_text(opened: Any, one: Callable[[str], Any]) -> None:
    assert not opened.execute_script(
        "return document.querySelectorAll('main img, b, h1').length > 1"
    )
    for text in EVIL:
        field = one(".filters [name=text]")
        field.clear()
        field.send_keys(text)
        assert [row[0] for row in rows(opened)] == [text]
        assert one(".detail .chat").text == text
    assert one("[name=gold]").text.split("\n")[1] == "<b>动画</b>"
    assert "丁<option>" in one("[name=run]").text


def test_wrong_predictions_are_filtered_and_sorted(opened: Any, one: Callable[[str], Any]) -> None:
    shown = one(".filters output")
    total = opened.execute_script("return JSON.parse(document.getElementById('data').textContent)")
    wrong = len(total[0][0]["runs"][0]["rows"])
    assert shown.text == f"{wrong:,} of {wrong:,} wrong, {N:,} examples"
    assert 10 < len(rows(opened)) < 60 < wrong, "only rows in view may be in the document"

    margins = [float(row[5]) for row in rows(opened)]
    assert margins == sorted(margins, reverse=True)
    by_gold = one(".grid-head [role=columnheader]:nth-child(5) button")
    by_gold.click()
    by_gold.click()
    header = one(".grid-head [role=columnheader]:nth-child(5)")
    assert header.get_attribute("aria-sort") == "ascending"
    shares = [float(row[4]) for row in rows(opened)]
    assert shares == sorted(shares)

    one("[name=text]").send_keys("天地")
    one("[name=gold] option:nth-child(3)").click()
    found = rows(opened)
    assert found and all("天地" in row[0] and row[1] == LABELS[1] for row in found)
    counted = int(shown.text.split(" ")[0])
    assert int(one(".grid").get_attribute("aria-rowcount")) == counted + 1 < wrong

    one("[name=run] option:nth-child(2)").click()
    other = len(total[0][0]["runs"][1]["rows"])
    assert f"of {other:,} wrong" in shown.text and other != wrong


def test_the_keyboard_is_enough(opened: Any, one: Callable[[str], Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    def active() -> Any:
        return opened.switch_to.active_element

    def tab_to(selector: str) -> None:
        wanted = one(selector)
        for _ in range(120):
            if active() == wanted:
                return
            active().send_keys(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by the tabulator key")

    one("body").send_keys(Keys.TAB)
    assert active().text == "Skip to the tables"
    tab_to("table[data-sortable] thead button")
    active().send_keys(Keys.ENTER)
    header = one("table[data-sortable] thead th")
    assert header.get_attribute("aria-sort") == "ascending"
    names = [cell.text for cell in opened.find_elements("css selector", "#leaderboard tbody th")]
    assert names == ["丁<option>", "甲", "majority class", "chance"]

    tab_to("[name=text]")
    active().send_keys("天")
    tab_to(".grid-head [role=columnheader]:nth-child(1) button")
    active().send_keys(Keys.SPACE)
    opened.execute_script("document.querySelector('.grid').focus()")
    assert active() == one(".grid")
    chosen = 'return document.querySelector(".grid-body [aria-selected=true]").ariaRowIndex'
    for key, place in ((Keys.ARROW_DOWN, 3), (Keys.ARROW_DOWN, 4), (Keys.ARROW_UP, 3)):
        active().send_keys(key)
        assert opened.execute_script(chosen) == str(place)
    active().send_keys(Keys.END)
    last = one(".grid").get_attribute("aria-rowcount")
    assert opened.execute_script(chosen) == last
    assert one(".grid").get_attribute("aria-activedescendant") == f"error-{int(last) - 2}"
    assert one(".detail .chat").text == rows(opened)[-1][0]


def test_light_and_dark(opened: Any, one: Callable[[str], Any], tmp_path: Path) -> None:
    """By the system's wish and by the button; Chinese text is drawn, and not as boxes."""
    image = pytest.importorskip("PIL.Image")

    def brightness(name: str) -> float:
        opened.execute_script("document.querySelector('#leaderboard').scrollIntoView()")
        opened.save_screenshot(str(tmp_path / f"{name}.png"))
        return float(np.asarray(image.open(tmp_path / f"{name}.png").convert("L")).mean())

    def prefer(scheme: str) -> None:
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)

    prefer("light")
    assert brightness("light") > 200
    prefer("dark")
    assert brightness("dark") < 60
    one(".theme").click()
    assert brightness("button") > 200
    opened.execute_script("localStorage.clear()")
    prefer("light")

    if cjk_font() is None:
        pytest.skip("no Chinese font on this machine")
    # A box looks the same whatever the character is.
    opened.execute_script("document.querySelector('.grid').scrollIntoView()")
    pictures = []
    for text in ("天", "地"):
        opened.execute_script(
            "document.querySelector('.detail .chat').textContent = arguments[0]", text
        )
        shot = image.open(io.BytesIO(one(".detail .chat").screenshot_as_png)).convert("L")
        pictures.append(np.asarray(shot)[:, :40])
    assert (pictures[0] != pictures[1]).any() and pictures[0].std() > 10
