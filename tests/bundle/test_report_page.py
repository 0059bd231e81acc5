"""The report in a real browser: light, dark and at phone width."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_runs import made_up_run, with_failures
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

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


def unfold(browser: webdriver.Chrome, part: str) -> None:
    """Open a part of the page and wait until its charts are drawn."""
    browser.find_element(By.CSS_SELECTOR, f"#{part} > summary").click()
    drawn = f"return [...document.querySelectorAll('#{part} .plot')].every(plot => plot.data || plot.hidden)"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(drawn))


def lanes_of(browser: webdriver.Chrome, plot: str) -> dict[str, list[str]]:
    """The names of the versions on each lane of a chart."""
    script = f"return document.getElementById('{plot}').data.find(trace => trace.mode === 'text')"
    names = browser.execute_script(script)
    lanes: dict[str, list[str]] = {}
    for lane, name in zip(names["y"], names["text"], strict=True):
        lanes.setdefault(lane, []).append(name)
    return {lane: sorted(versions) for lane, versions in lanes.items()}


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
    if size == "phone":
        assert browser.execute_script(f"{root}.scrollHeight") < 6000


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
    assert text.count("SLO held with “warmup”, broken with “no warmup”.") == 1
    assert "and 5 requests failed" in text
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
        with_failures(made_up_run("no warmup", 80, 40, 60, 50, 70), 2),
        made_up_run("warmup", 2, 3, 2, 2, 3, started="2026-01-02T03:10:00.000+00:00"),
    ]
    page = write(runs, tmp_path)
    for size, scheme in (("phone", "dark"), ("wide", "light")):
        show(browser, page, size, scheme)
        assert browser.execute_script("return document.getElementById('fold-0').data") is None, "folded away"
        unfold(browser, "folds")
        assert log_of(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert "Swapping boston 5 times under load" in browser.find_element(By.TAG_NAME, "main").text
    data = "return document.getElementById('fold-0').data"
    reload, _, control, _ = browser.execute_script(f"{data}.map(trace => trace.y)")
    assert len(reload) == 5 * 480, "every request of all reloads"
    assert len(control) == pytest.approx(5 * 480, abs=1), "and of their controls, one at the edge"
    assert max(reload) == 81
    assert max(control) == 1
    tops = browser.execute_script(
        "return [0, 1].map(i => document.getElementById('fold-' + i).layout.yaxis.range[1])"
    )
    assert tops[0] == tops[1]
    # The timeline has every publishing, and six versions share two lanes, each named.
    marks = (
        "return document.getElementById('timeline-0').layout.shapes.filter(shape => shape.name === 'publish')"
    )
    assert browser.execute_script(f"{marks}.length") == 5
    assert lanes_of(browser, "timeline-0") == {"0": ["v1", "v3", "v5"], "1": ["v2", "v4", "v6"]}
    assert lanes_of(browser, "zoom-0") == {"0": ["v3"], "1": ["v4"]}
    zoom = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#zoom-0 .annotation-text")]
    assert zoom == ["publish v4", "v4 available", "v3 ended"], "the reload with the median spike"


@pytest.fixture(scope="module")
def ladder_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven scenarios with a long series each."""
    heights = {"stock": 150, "+ warmup": 50, "+ load/unload threads": 45, "+ jemalloc": 50, "+ mapped": 6}
    heights |= {"+ optimised": 12, "+ loads yield": 2}
    runs = [
        made_up_run(name, *[height] * 5, started=f"2026-01-02T03:1{number}:00.000+00:00")
        for number, (name, height) in enumerate(heights.items())
    ]
    return write(runs, tmp_path_factory.mktemp("ladder"))


@pytest.mark.parametrize(("size", "most"), [("wide", 3500), ("phone", 6500)])
def test_a_ladder_is_one_chart(browser: webdriver.Chrome, ladder_page: Path, size: str, most: int) -> None:
    show(browser, ladder_page, size, "light")
    assert log_of(browser) == []
    root = "return document.documentElement"
    assert browser.execute_script(f"{root}.scrollWidth") <= SIZES[size][0]
    assert browser.execute_script(f"{root}.scrollHeight") < most, "more scenarios do not make it longer"
    chart = browser.execute_script("return document.getElementById('ladder').layout")
    assert chart["xaxis"]["type"] == "log"
    assert chart["yaxis"]["ticktext"][0] == "stock"
    assert chart["yaxis"]["range"][0] > chart["yaxis"]["range"][1], "from top to bottom"
    assert "SLO 10 ms" in [note["text"] for note in chart["annotations"]]
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('#timeline-0 .annotation-text')]"
        ".map(text => text.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    boxes.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(boxes)), "labels have room"
    titles = [card.text for card in browser.find_elements(By.CSS_SELECTOR, "#ladder .ytick text")]
    assert titles == chart["yaxis"]["ticktext"], "every rung is named"
    lines = browser.execute_script(
        "return document.getElementById('ladder').data.filter(one => one.mode === 'lines').length"
    )
    assert lines == 7, "five reloads each: each has an interval"


@pytest.mark.parametrize("size", SIZES)
def test_the_marks_of_a_logarithmic_axis_do_not_overlap(
    browser: webdriver.Chrome, ladder_page: Path, size: str
) -> None:
    show(browser, ladder_page, size, "light")
    browser.find_element(By.CSS_SELECTOR, "[data-scale=log]").click()
    kind = "return document.getElementById('timeline-1').layout.yaxis.type"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(kind) == "log")
    for plot, axis, start, extent in (
        ("ladder", "xtick", "x", "width"),
        ("timeline-0", "ytick", "y", "height"),
    ):
        boxes = browser.execute_script(
            f"return [...document.querySelectorAll('#{plot} .{axis} text')]"
            ".map(text => text.getBoundingClientRect())"
            f".map(box => [box.{start}, box.{start} + box.{extent}])"
        )
        boxes.sort()
        assert len(boxes) >= 3, plot
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(boxes)), (plot, boxes)


def test_a_reader_chooses_the_scenarios(browser: webdriver.Chrome, ladder_page: Path) -> None:
    show(browser, ladder_page, "wide", "light")
    choice = browser.find_element(By.CSS_SELECTOR, "[data-side='1']")
    assert choice.get_property("value") == "6", "first and last at the start"
    highest = "return Math.max(...document.getElementById('timeline-1').data[0].y.slice(20))"
    assert browser.execute_script(highest) == 3
    Select(choice).select_by_visible_text("+ warmup")
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(highest) == 51)
    values = "return [...document.querySelectorAll('[data-side=\"1\"]')].map(choice => choice.value)"
    assert set(browser.execute_script(values)) == {"1"}, "all charts of that side follow"


@pytest.mark.parametrize(
    ("form", "begin"), [("svg", "data:image/svg+xml,"), ("png", "data:image/png;base64,")]
)
def test_the_main_chart_can_be_downloaded(
    browser: webdriver.Chrome, ladder_page: Path, tmp_path: Path, form: str, begin: str
) -> None:
    show(browser, ladder_page, "wide", "dark")
    content = browser.execute_async_script(f"picture('ladder', '{form}').then(arguments[0])")
    assert content.startswith(begin)
    if form == "svg":
        assert "loads%20yield" in content or "loads yield" in content
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    browser.find_element(By.CSS_SELECTOR, f"[data-download=ladder][data-format={form}]").click()
    file = tmp_path / f"ladder.{form}"
    WebDriverWait(browser, 60).until(lambda _: file.exists() and file.stat().st_size > 1000)


def test_paper_is_white_and_has_the_facts(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, "wide", "dark")
    facts = "return [...document.querySelectorAll('[data-print]')].map(part => part.open)"
    assert browser.execute_script(facts) == [False, False]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert luminance(browser, "return getComputedStyle(document.body).color") < 120
        scheme = "return getComputedStyle(document.documentElement).colorScheme"
        assert browser.execute_script(scheme) == "light"
        hidden = "return getComputedStyle(document.querySelector('.links')).display"
        assert browser.execute_script(hidden) == "none"
        browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert browser.execute_script(facts) == [True, True]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert log_of(browser) == []


def test_a_run_without_publishing_is_drawn(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = made_up_run("load only", publishes=(), states=(), floor=None)
    none = {name: values[:0] for name, values in run.samples.items()}
    show(browser, write([dataclasses.replace(run, samples=none)], tmp_path), "phone", "light")
    assert log_of(browser) == []
    assert browser.find_elements(By.CSS_SELECTOR, "#timeline-0 .scatterlayer .trace")
    assert not browser.find_elements(By.ID, "zoom-0")


def test_the_page_is_not_large(page: Path) -> None:
    assert page.stat().st_size < 6_000_000
