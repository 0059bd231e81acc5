"""The report in a real browser: light, dark and at phone width."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_runs import made_up_run, with_failures
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from spikeless.bench import Run, report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = {"wide": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium or chromedriver: on Debian run `apt-get install chromium chromium-driver`",
    ),
    pytest.mark.xdist_group("browser"),
]


def log_of(browser: webdriver.Chrome) -> Any:
    """What the browser wrote to its console since it was last asked."""
    return browser.get_log("browser")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenarios: the first with a spike and failures, the second repeated."""
    directory = tmp_path_factory.mktemp("report")
    runs = [
        with_failures(made_up_run("no warmup", 80, rate=1000), 5),
        made_up_run("warmup", 2, rate=1000, started="2026-01-02T03:10:00.000+00:00"),
        made_up_run("warmup", 3, rate=1000, started="2026-01-02T03:20:00.000+00:00"),
    ]
    return write(runs, directory)


def write(runs: list[Run], directory: Path) -> Path:
    paths = []
    for number, run in enumerate(runs):
        paths.append(directory / f"{number}.npz")
        run.save(paths[-1])
    return report.write(paths, directory / "out")


def show(browser: webdriver.Chrome, page: Path, size: str, scheme: str) -> None:
    """Open the page and wait until everything is drawn for that colour scheme."""
    width, height = SIZES[size]
    emulate(browser, scheme)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
    )
    log_of(browser)  # Forget what was before.
    browser.get(page.as_uri())
    wait_drawn(browser, scheme)


def emulate(browser: webdriver.Chrome, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_drawn(browser: webdriver.Chrome, scheme: str) -> None:
    script = "return document.documentElement.dataset.drawn"
    WebDriverWait(browser, 120).until(lambda driver: driver.execute_script(script) == scheme)


def luminance(browser: webdriver.Chrome, script: str) -> float:
    """Of a CSS colour ``rgb(...)`` that the script returns, from 0 (black) to 255."""
    numbers = browser.execute_script(script).partition("(")[2].strip(")").split(",")[:3]
    return sum(float(number) for number in numbers) / 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable(browser: webdriver.Chrome, page: Path, size: str, scheme: str) -> None:
    show(browser, page, size, scheme)
    assert log_of(browser) == []

    root = "return document.documentElement"
    assert browser.execute_script(f"{root}.scrollWidth") <= SIZES[size][0], "nothing is wider than the page"
    page_colour = luminance(browser, "return getComputedStyle(document.body).backgroundColor")
    text_colour = luminance(browser, "return getComputedStyle(document.body).color")
    axis_colour = luminance(browser, "return getComputedStyle(document.querySelector('.xtick text')).fill")
    if scheme == "light":
        assert page_colour > 200 > 120 > max(text_colour, axis_colour)
    else:
        assert page_colour < 60 < 120 < min(text_colour, axis_colour)

    columns = {card.location["x"] for card in browser.find_elements(By.CSS_SELECTOR, "section .card")}
    assert len(columns) == (2 if size == "wide" else 1), "scenarios side by side, or below each other"


def test_the_swap_is_drawn(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, "wide", "light")
    for index in (0, 1):
        for plot in (f"timeline-{index}", f"zoom-{index}"):
            element = browser.find_element(By.ID, plot)
            assert element.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace"), plot
            labels = [text.text for text in element.find_elements(By.CSS_SELECTOR, ".annotation-text")]
            assert "publish v2" in labels
            assert len(element.find_elements(By.CSS_SELECTOR, ".shapelayer path")) >= 4, (
                "the marks and the SLO"
            )
    zoom = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#zoom-0 .annotation-text")]
    assert zoom == ["publish v2", "v2 available", "v1 ended"]
    # Every request over the SLO is a point: 71 of the stall, and the slow start.
    points = "return document.getElementById('timeline-0').data.filter(trace => trace.mode === 'markers')"
    assert browser.execute_script(f"{points}[0].x.length") == 71 + 20
    assert browser.execute_script(f"{points}[1].text") == ["UNAVAILABLE"] * 5
    # Both scenarios have one scale: the spike and its absence can be compared by eye.
    tops = browser.execute_script(
        "return [0, 1].map(i => document.getElementById('timeline-' + i).layout.yaxis.range[1])"
    )
    assert tops[0] == tops[1]
    assert 80 < tops[0] < 100, "the slow start of 150 ms does not set it"
    shapes = browser.execute_script(f"{points}[0].marker.symbol")
    assert shapes.count("triangle-up") == 20, "it is marked at the top"
    text = browser.find_element(By.TAG_NAME, "main").text
    assert "Swapping boston 1" in text
    assert "5 of 20,000 failed" in text
    assert "Medians over repeats" in text


def test_the_scale_and_the_colours_follow(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, "wide", "light")
    browser.find_element(By.CSS_SELECTOR, "[data-scale=log]").click()
    kind = "return document.getElementById('timeline-0').layout.yaxis.type"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(kind) == "log")
    emulate(browser, "dark")
    wait_drawn(browser, "dark")
    assert luminance(browser, "return getComputedStyle(document.querySelector('.xtick text')).fill") > 120
    assert log_of(browser) == []


def test_a_series_is_folded(browser: webdriver.Chrome, tmp_path: Path) -> None:
    runs = [
        with_failures(made_up_run("no warmup", 80, 40, 60), 2),
        made_up_run("warmup", 2, 3, 2, started="2026-01-02T03:10:00.000+00:00"),
    ]
    page = write(runs, tmp_path)
    for size, scheme in (("phone", "dark"), ("wide", "light")):
        show(browser, page, size, scheme)
        assert log_of(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert "Swapping boston 3 times under load" in browser.find_element(By.TAG_NAME, "main").text
    data = "return document.getElementById('fold-0').data"
    reload, _, control, _ = browser.execute_script(f"{data}.map(trace => trace.y)")
    assert len(reload) == len(control) == 3 * 480, "every request of all reloads, and of their controls"
    assert max(reload) == 81
    assert max(control) == 1
    tops = browser.execute_script(
        "return [0, 1].map(i => document.getElementById('fold-' + i).layout.yaxis.range[1])"
    )
    assert tops[0] == tops[1]
    # The timeline has every publishing, and the four versions share two tracks.
    marks = (
        "return document.getElementById('timeline-0').layout.shapes.filter(shape => shape.name === 'publish')"
    )
    assert browser.execute_script(f"{marks}.length") == 3
    tracks = browser.execute_script("return document.getElementById('timeline-0').layout.yaxis2.tickvals")
    assert tracks == ["v1, ...", "v2, ..."]
    zoom = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#zoom-0 .annotation-text")]
    assert zoom == ["publish v4", "v4 available", "v3 ended"], "the reload with the median spike"


def test_a_run_without_publishing_is_drawn(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = made_up_run("load only", publishes=(), states=(), floor=None)
    none = {name: values[:0] for name, values in run.samples.items()}
    show(browser, write([dataclasses.replace(run, samples=none)], tmp_path), "phone", "light")
    assert log_of(browser) == []
    assert browser.find_elements(By.CSS_SELECTOR, "#timeline-0 .scatterlayer .trace")
    assert not browser.find_elements(By.CSS_SELECTOR, ".zoom")


def test_the_page_is_not_large(page: Path) -> None:
    assert page.stat().st_size < 6_000_000
