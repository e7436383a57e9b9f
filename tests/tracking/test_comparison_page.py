"""The page of a comparison in a real browser: it draws, at once and without a network, and says what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.tracking.comparison import Run, write_results
from lightning_peft.tracking.comparison.page import page

from .made_up import comparison, layer_norms, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, to look at the page in")
HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for all tests of this file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Looked:
    """A page that was opened, and what the browser had to say of it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def colours(self) -> int:
        """How many distinct ones the screenshot has."""
        from PIL import Image

        image = Image.open(BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        return len(image.getcolors(maxcolors=2**24) or [])

    def overlapping(self) -> list[tuple[str, str]]:
        """Labels of points that lie on each other in a plot."""
        found: list[tuple[str, str]] = self.page.evaluate(
            """() => [...document.querySelectorAll('.plot')].flatMap((plot) => {
                const texts = [...plot.querySelectorAll('.textpoint text')];
                const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
                return boxes.flatMap(([name, a], index) => boxes.slice(0, index)
                    .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
                    .map(([other]) => [name, other]));
            })"""
        )
        return found


@in_a_browser
@pytest.mark.parametrize(("width", "scheme", "touch"), [(1280, "light", False), (390, "dark", True)])
def test_the_page_draws_every_plot(browser: Any, tmp_path: Path, width: int, scheme: str, touch: bool) -> None:
    write_results(comparison(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.html", "results.json", "results.md"}
    looked = Looked(browser, tmp_path / "results.html", width, color_scheme=scheme, has_touch=touch)
    assert looked.said == []
    assert looked.requests == [(tmp_path / "results.html").as_uri()]
    assert looked.colours() > 500
    assert looked.page.title() == "6 methods compared by val_accuracy"
    plots = looked.page.locator(".plot")
    names = [plots.nth(index).get_attribute("aria-label") for index in range(plots.count())]
    curves = ["val_accuracy on the validation data", "Training loss"]
    assert names == ["Trained parameters", "Time", "Memory", *curves, "LoRA", "IA3", "Houlsby"]
    for index in range(3):
        plot = plots.nth(index)
        # a marker, a name and error bars for each method, and the front
        assert plot.locator(".points path.point").count() == 6
        assert plot.locator(".textpoint").count() >= 4
        assert plot.locator(".errorbar").count() == 6
        assert plot.locator(".lines path.js-line").count() >= 1
    assert plots.nth(3).locator(".fills path").count() >= 6
    assert plots.nth(3).locator(".points path.point").count() == 6 * 6
    assert plots.nth(4).locator(".lines path.js-line").count() >= 6
    for index in range(5, 8):
        assert plots.nth(index).locator(".hm image").count() == 1
    assert looked.overlapping() == []
    # nothing is wider than the screen, but for the table, which scrolls in its own frame
    assert looked.page.evaluate("document.documentElement.scrollWidth") == width
    text = looked.page.locator("main").inner_text()
    for part in ("Best quality\nfull fine-tuning", "Smallest that is as good\nIA3", "BitFit, seed 2", "torch 2.13"):
        assert part in text
    # a chip hides its method everywhere
    looked.page.locator(".chip", has_text="LoRA").click()
    assert plots.nth(0).locator(".points path.point").count() == 5
    assert looked.page.locator(".chip", has_text="LoRA").get_attribute("aria-pressed") == "false"
    looked.page.locator(".chip", has_text="LoRA").click()
    assert plots.nth(0).locator(".points path.point").count() == 6
    assert looked.said == []


@in_a_browser
def test_names_from_files_are_text_and_nothing_more(browser: Any, tmp_path: Path) -> None:
    made = report(norms={f"a.0.{HOSTILE}": 1.0, "a.1.b": 2.0})
    runs = [Run(HOSTILE, 0, made), Run("broken", 0, None, f"ValueError: {HOSTILE}")]
    labels, facts = [HOSTILE, "broken"], {"model": HOSTILE}
    path = tmp_path / "page.html"
    path.write_text(page(comparison(runs=runs, labels=labels, facts=facts, command=HOSTILE)), encoding="utf-8")
    looked = Looked(browser, path)
    assert looked.said == []
    assert looked.page.title() == "2 methods compared by val_accuracy"
    assert looked.count("main img") == 0
    assert looked.page.locator("tbody td").first.inner_text() == HOSTILE
    assert looked.requests == [path.as_uri()]


@in_a_browser
def test_many_methods_and_one_run_are_drawn_too(browser: Any, tmp_path: Path) -> None:
    labels = [f"Method{index}" for index in range(17)]
    runs = [
        Run(label, 0, report(0.6 + 0.01 * (index % 5), trainable=10 ** (3 + index % 4), norms=layer_norms(32)))
        for index, label in enumerate(labels)
    ]
    path = tmp_path / "page.html"
    path.write_text(page(comparison(runs=runs, labels=labels)), encoding="utf-8")
    looked = Looked(browser, path)
    assert (looked.said, looked.overlapping()) == ([], [])
    assert looked.count(".plot") == 5 + 17
    one = comparison(
        runs=[Run("LoRA", 0, report(peak_memory=None, points=1)), Run("IA3", 0, None)], labels=["LoRA", "IA3"]
    )
    path.write_text(page(one), encoding="utf-8")
    looked = Looked(browser, path)
    assert looked.said == []
    assert looked.count(".plot") == 4
    text = looked.page.locator("main").inner_text()
    assert "There is no plot of memory, which no run here has measured." in text
    assert "Not run yet: IA3 (seed 0)." in text


def test_without_any_run_the_page_says_so() -> None:
    made = page(comparison(runs=[Run("LoRA", 0, None, "ValueError: no")], labels=["LoRA"]))
    assert "No run has ended well yet." in made
    assert made.count('class="plot"') == 0
