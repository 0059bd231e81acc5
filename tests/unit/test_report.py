"""The report's numbers and words; how it looks is tested in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from bench_runs import MACHINE, made_up_run, with_failures
from rich.console import Console

from spikeless.bench import Run, report
from spikeless.bench.watch import StateChange
from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound


def rows(*runs: Run) -> dict[str, list[str]]:
    return {row.label: list(row.cells) for row in report.table(report.group(runs))}


def test_scenarios_stand_side_by_side_in_the_order_of_their_start() -> None:
    first = made_up_run("no warmup", 100)
    second = made_up_run("warmup", started="2026-01-02T03:10:00.000+00:00")
    assert [scenario.name for scenario in report.group([second, first])] == ["no warmup", "warmup"]
    cells = rows(second, first)
    assert cells["reload max"] == ["101 ms", "1.00 ms"]
    assert cells["steady p99.9"] == ["1.00 ms", "1.00 ms"]
    assert cells["spike width"] == ["90.0 ms", "0.00 ms"]
    assert cells["requests over the SLO"] == ["19", "0"]
    assert cells["failed requests"] == ["0", "0"]
    assert cells["served by"] == ["v1: 2,240, v2: 1,760"] * 2
    assert cells["private memory, peak"] == ["180 MiB", "180 MiB"]


def test_repeats_give_median_and_spread_and_the_median_run_is_drawn() -> None:
    runs = [made_up_run("warmup", height) for height in (40, 400, 80)]
    assert rows(*runs)["reload max"] == ["81.0 ms (41.0 to 401)"]
    (scenario,) = report.group(runs)
    assert scenario.summaries[scenario.shown].height_ms == pytest.approx(81)


def test_contaminated_repeats_are_left_out_and_named() -> None:
    dirty = made_up_run("warmup", 500)
    dirty = dataclasses.replace(dirty, requests={**dirty.requests, "lag": dirty.requests["lag"] + 0.01})
    runs = [made_up_run("warmup", 40), dirty]
    assert rows(*runs)["reload max"] == ["41.0 ms"]
    (contaminated,) = (note for note in report.notes(report.group(runs)) if "contaminated" in note.text)
    assert contaminated.text.startswith("2 windows contaminated")
    assert [detail.partition(" window")[0] for detail in contaminated.details] == [
        "warmup, run 2, steady",
        "warmup, run 2, reload",
    ]
    assert rows(dirty)["reload max"] == ["501 ms"], "without a clean run it is all there is"


def test_several_reloads_are_folded() -> None:
    cells = rows(made_up_run("series", *[50] * 5), made_up_run("single", 50))
    assert cells["folded reloads"] == ["5 of 5", "1 of 1"]
    assert cells["folded reload max"] == ["51.0 ms [51.0, 51.0]", "-"]
    assert cells["folded control max"] == ["1.00 ms [1.00, 1.00]", "-"]
    assert cells["folded excess max"] == ["50.0 ms [50.0, 50.0]", "-"]
    text = report.render_markdown(report.group([made_up_run("series", *[50] * 5)]))
    assert "5 versions published, one every 20 s" in text
    assert "95% intervals from 2,000 draws of whole reloads" in text


def test_fewer_than_five_reloads_have_no_interval() -> None:
    assert "folded reloads" not in rows(made_up_run("series", *[50] * 4))
    assert "[" not in report.render_markdown(report.group([made_up_run("series", *[50] * 4)]))
    pairs = [made_up_run("pairs", 40, 50), made_up_run("pairs", 60, 70)]
    assert rows(*pairs)["reload p99.9"] == ["61.0 ms (51.0 to 71.0)"]


def test_the_headline_has_an_interval_by_reload_everywhere() -> None:
    """By runs, too: each has a reload of 41 ms, or of 41 and of 81 ms."""
    scenarios = report.group([made_up_run("a", 40, 40, 40), made_up_run("a", 40, 80, 40)])
    cell = "58.5 ms [41.0, 78.5]"
    assert {row.label: row.cells[0] for row in report.table(scenarios)}["reload p99.9"] == cell
    page = report.render_html(scenarios).replace("\N{NO-BREAK SPACE}", " ")
    assert '<div class="figure spiky">58.5 ms <small>[41.0, 78.5]</small>' in page
    text = report.render_markdown(scenarios)
    assert f"| reload p99.9 | {cell} |" in text
    assert "95% interval in square brackets" in text
    assert report.group([made_up_run("same", *[50] * 5)])[0].interval == pytest.approx((51, 51))
    (singles,) = report.group([made_up_run("one each", height) for height in (10, 20, 30, 40, 50)])
    assert singles.interval is not None
    assert 10 < singles.interval[0] < 30 < 32 < singles.interval[1] < 52, "runs are drawn, too"
    half, whole = (made_up_run("x", *[height] * 5) for height in (20, 40))
    changes = report.compare(("old", [whole]), ("new", [half])).rows
    assert {row.label: row.cells[2] for row in changes}["reload p99.9"] == "0.51x"


def test_reloads_that_are_left_out_are_named_in_one_note() -> None:
    run = made_up_run("series", *[0] * 8)
    late = {**run.requests, "lag": np.where(run.requests["intended"] > 20, 0.006, 0.0)}
    (note,) = [
        note
        for note in report.notes(report.group([dataclasses.replace(run, requests=late)]))
        if "folded" in note.text
    ]
    assert note.text == (
        "7 of 8 reloads left out of the folded figures; too few are left for any with series."
    )
    assert len(note.details) == 7
    assert "run 1, reload 2: window: 100.0% of the requests left more than 5 ms late" in note.details[0]


def test_reloads_that_are_too_few_to_be_folded_need_no_note() -> None:
    run = made_up_run("pair", 0, 0)
    late = {**run.requests, "lag": np.where(run.requests["intended"] > 20, 0.006, 0.0)}
    texts = [note.text for note in report.notes(report.group([dataclasses.replace(run, requests=late)]))]
    assert not [text for text in texts if "folded" in text]


def test_the_same_note_is_there_once() -> None:
    said = "measured with glibc, because `apt-get` is missing"
    runs = [made_up_run(name, notes=(said,)) for name in ("a", "b", "b")]
    assert report.notes(report.group(runs)) == [report.Note(said[:1].upper() + said[1:])]
    assert report.render_markdown(report.group(runs)).count("measured with glibc") == 0
    assert report.render_markdown(report.group(runs)).count("Measured with glibc") == 1
    (partly,) = report.notes(report.group([runs[0], made_up_run("b")]))
    assert partly.details == ["a"], "where it does not hold for all runs, it says for which"
    page = report.render_html(report.group(runs))
    assert "because <code>apt-get</code> is missing" in page, "backticks are rendered"
    body = page[page.index("<main>") :]
    assert body.index("Measured with glibc") > body.index('id="zoom-0"'), "below the charts"


@pytest.mark.parametrize(
    ("runs", "kind", "sentence"),
    [
        (
            [made_up_run("warmup")],
            "held",
            "SLO held. While a version was swapped, 99.9% of the requests took at most 1.00 ms (SLO 10 ms), "
            "and no request failed.",
        ),
        (
            [made_up_run("cold", 80)],
            "broken",
            "SLO broken. While a version was swapped, 99.9% of the requests took at most 81.0 ms (SLO 10 "
            "ms), and no request failed.",
        ),
        (
            [made_up_run("cold", 80), made_up_run("warmup", 2)],
            "mixed",
            "SLO held with “warmup”, broken with “cold”. p99.9 during swaps is 3.00 ms with “warmup”, and "
            "81.0 ms with “cold” (SLO 10 ms), and no request failed.",
        ),
        (
            [with_failures(made_up_run("a"), 3), with_failures(made_up_run("b"), 2)],
            "broken",
            "SLO broken in every scenario. p99.9 during swaps is 1.00 ms (SLO 10 ms), and 5 requests failed.",
        ),
        (
            [made_up_run("load", publishes=(), states=())],
            "held",
            "SLO held. Without a swap, 99.9% of the requests took at most 1.00 ms (SLO 10 ms), and no "
            "request failed.",
        ),
    ],
)
def test_the_verdict_is_one_sentence(runs: list[Run], kind: str, sentence: str) -> None:
    verdict = report.judge(report.group(runs))
    assert f"{verdict.title}. {verdict.sentence}" == sentence
    assert verdict.kind == kind
    page = report.render_html(report.group(runs))
    body = page[page.index("<main>") :]
    assert body.index(verdict.title) < body.index('class="plot'), "it comes first"


def test_a_run_in_which_no_version_was_swapped_concludes_nothing() -> None:
    """Requests were slow after the publishing, but that was no swap."""
    alone = made_up_run("pinned", 55, states=(StateChange(-1.0, 1, "AVAILABLE"),))
    verdict = report.judge(report.group([alone]))
    assert (verdict.title, verdict.kind, verdict.held) == ("No version was swapped", "mixed", [None])
    assert "says nothing of a swap: `spikeless status` shows" in verdict.sentence
    cells = rows(alone)
    for label in ("reload p99.9", "reload max", "spike width", "requests over the SLO"):
        assert cells[label] == ["-"], label
    page = report.render_html(report.group([alone]))
    assert "<code>spikeless status</code> shows" in page
    assert "Publishing boston under load" in page
    both = report.judge(report.group([alone, made_up_run("swap", 80)]))
    assert (both.title, both.kind, both.held) == ("SLO broken", "broken", [None, False])
    assert "81.0 ms" in both.sentence
    assert "published with “pinned” was not seen AVAILABLE" in both.sentence


def test_card_table_markdown_and_terminal_show_one_number() -> None:
    scenarios = report.group([*(made_up_run("cold", height) for height in (79, 195)), made_up_run("warm")])
    cells = {row.label: row.cells for row in report.table(scenarios)}
    assert cells["reload p99.9"][0] == "138 ms (80.0 to 196)"
    page = report.render_html(scenarios).replace("\N{NO-BREAK SPACE}", " ")
    assert '<div class="figure spiky">138 ms <small>(80.0 to 196)</small>' in page
    assert "<td>138 ms (80.0 to 196)</td>" in page
    assert "| reload p99.9 | 138 ms (80.0 to 196) | 1.00 ms |" in report.render_markdown(scenarios)
    console = Console(record=True, width=200, file=io.StringIO())
    report.show(scenarios, console)
    text = console.export_text()
    assert "138 ms (80.0 to 196)" in text
    assert "138 ms with “cold”" in report.judge(scenarios).sentence
    assert "folded" not in text, "advanced rows are left to the page"


def test_several_scenarios_are_one_chart() -> None:
    runs = [made_up_run(name, height) for name, height in (("stock", 80), ("warm", 20), ("mapped", 1))]
    page = report.render_html(report.group(runs))
    data = json.loads(
        page.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    )
    assert data["ladder"]["name"] == ["stock", "warm", "mapped"]
    assert data["ladder"]["ms"] == [81, 21, 2]
    assert data["ladder"]["held"] == [False, False, True]
    assert data["ladder"]["reloads"] == [[81], [21], [2]]
    assert data["ladder"]["interval"] == [None] * 3, "of one reload each"
    assert '<div class="figure' not in page, "it takes the place of the cards"
    assert '"ladder": null' in report.render_html(report.group(runs[:2]))


def test_every_version_is_named_on_its_lane() -> None:
    """Lanes are shared by versions that do not overlap."""
    page = report.render_html(report.group([made_up_run("series", 1, 1, 1)]))
    data = json.loads(
        page.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    )
    lanes = [[part["version"] for part in lane["segments"]] for lane in data["runs"][0]["tracks"]]
    assert [sorted(set(lane)) for lane in lanes] == [[1, 3], [2, 4]]
    assert "v1, ..." not in page


def test_the_page_links_its_raw_results(tmp_path: Path) -> None:
    made_up_run().save(tmp_path / "raw.npz")
    page = report.write([tmp_path / "raw.npz"], tmp_path / "out").read_text()
    assert '<a href="../raw.npz">../raw.npz</a>' in page
    encoded = page.partition("data:text/markdown;base64,")[2].partition('"')[0]
    assert base64.b64decode(encoded).decode() == (tmp_path / "out" / "summary.md").read_text()


def test_results_of_one_machine_are_compared() -> None:
    before = [made_up_run("swap", height) for height in (79, 195)]
    after = [made_up_run("swap", height) for height in (3, 4)]
    comparison = report.compare(("old", before), ("new", after))
    assert comparison.columns == ("old", "new", "new relative to old")
    cells = {row.label: list(row.cells) for row in comparison.rows}
    assert cells["reload p99.9"] == ["138 ms (80.0 to 196)", "4.50 ms (4.00 to 5.00)", "0.03x"]
    assert cells["steady p99.9"] == ["1.00 ms", "1.00 ms", "same"]
    again = report.compare(("old", before), ("new", [made_up_run("swap", 100), made_up_run("swap", 300)]))
    assert {row.label: row.cells[2] for row in again.rows}["reload max"] == "1.46x, ranges overlap"
    text = report.render_markdown(comparison.scenarios, comparison)
    assert "| reload p99.9 | 138 ms (80.0 to 196) | 4.50 ms (4.00 to 5.00) | 0.03x |" in text
    assert "What changed" in report.render_html(comparison.scenarios, comparison)


def test_scenarios_of_the_same_name_are_compared() -> None:
    before = [made_up_run("cold", 80), made_up_run("warm", 2), made_up_run("other")]
    after = [made_up_run("warm", 4), made_up_run("cold", 40)]
    comparison = report.compare(("a", before), ("b", after))
    assert [one.name for one in comparison.scenarios] == ["cold, a", "cold, b", "warm, a", "warm, b"]
    maxima = [(row.group, *row.cells[:2]) for row in comparison.rows if row.label == "reload max"]
    assert maxima == [("cold", "81.0 ms", "41.0 ms"), ("warm", "3.00 ms", "5.00 ms")]


def test_what_cannot_be_compared_is_refused() -> None:
    other = dataclasses.replace(MACHINE, cpu="another processor")
    sides = ("a", [made_up_run()]), ("b", [made_up_run(machine=other)])
    with pytest.raises(FailedPrecondition, match=r"a processor.* / another processor.*--force"):
        report.compare(*sides)
    forced = report.compare(*sides, force=True)
    (serious,) = (note for note in report.notes(forced.scenarios) if note.serious)
    assert "different machines" in serious.text
    page = report.render_html(forced.scenarios, forced)
    body = page[page.index("<main>") :]
    assert body.index("different machines") < body.index('class="plot'), "nobody overlooks it"
    one, two = ([made_up_run(name) for name in names] for names in ("ab", "cd"))
    with pytest.raises(InvalidArgument, match="no scenario in common"):
        report.compare(("a", one), ("b", two))
    with pytest.raises(InvalidArgument, match="both results are called a"):
        report.compare(("a", [made_up_run()]), ("a", [made_up_run()]))


def test_failures_are_named_by_code() -> None:
    assert rows(with_failures(made_up_run(), 3))["errors"] == ["3 UNAVAILABLE"]
    assert rows(made_up_run())["errors"] == ["none"]


def test_runs_of_different_machines_are_not_to_be_compared() -> None:
    other = dataclasses.replace(MACHINE, cpu="another processor")
    runs = [made_up_run(), made_up_run("other", machine=other)]
    assert any("different machines" in note.text for note in report.notes(report.group(runs)))


def test_markdown_states_what_was_measured() -> None:
    text = report.render_markdown(report.group([made_up_run("a|b")]))
    assert "\n| | a\\|b |\n|---|---:|\n" in text
    assert "- engine: embedded 0.1.0" in text
    assert "- allocator: jemalloc (libjemalloc.so.2)" in text
    assert "- generator's floor: p50 0.30, p99 0.60, p99.9 1.50" in text
    assert "commit 0123456789ab" in text
    assert "A window counts as contaminated when" in text


def test_names_cannot_break_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script>"
    page = report.render_html(report.group([made_up_run(name)]))
    assert "<script>alert(1)" not in page


def test_pages_load_nothing() -> None:
    page = report.render_html(report.group([made_up_run()]))
    own = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "http://" not in own
    assert "https://" not in own


def test_a_run_without_publishing_is_reported() -> None:
    cells = rows(made_up_run(publishes=(), states=(), floor=None))
    assert cells["reload max"] == ["-"]
    assert "boston under load" in report.render_html(report.group([made_up_run(publishes=(), states=())]))


def test_nothing_is_written_on_bad_input(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        report.write([tmp_path / "nowhere.npz"], tmp_path / "out")
    with pytest.raises(InvalidArgument, match="no results"):
        report.write([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
