"""Many reloads folded into one and compared with windows without a reload.

In: the runs of one scenario and their summaries. Out: a `Fold`. A spike of a few
milliseconds touches so few requests that a single reload says little. So the requests
of all reloads are put together, and so are those of as many control windows of the same
lengths. Requests of one reload are not independent, so intervals come from drawing
whole reloads, each with its control, at random with replacement (the cluster bootstrap
with percentile intervals; Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikeless.bench.analysis import Reload, Summary, Window, latencies
from spikeless.bench.run_file import Run

#: The share of the requests that do not exceed a figure -> its name.
FIGURES = {0.5: "p50", 0.99: "p99", 0.999: "p99.9", 1.0: "max"}
#: An interval from fewer would pretend to know what it does not.
FEWEST_RELOADS = 5
DRAWS = 2000
CONFIDENCE = 0.95
SEED = 1

INTERVAL_RULE = (
    f"From {FEWEST_RELOADS} reloads on, the reload p99.9 has a {CONFIDENCE:.0%} interval in square brackets: "
    f"{DRAWS:,} times runs are drawn with replacement, and of each drawn run its reloads; the median of the "
    f"runs is taken each time (bootstrap, seed {SEED})."
)
FOLD_RULES = (
    f"Folded figures, from {FEWEST_RELOADS} reloads on: the requests of all reloads together, counted from "
    "the moment of publishing, and those of as many control windows of the same lengths, each from the "
    "middle of the quiet time before its reload. A reload is left out, with its control, when it was not "
    "seen to end, or when its window or control is contaminated, empty or missing. A server that takes the "
    "processors makes the generator late and so contaminates windows: see how many reloads are left before "
    f"comparing. The excess is reload minus control. In brackets: {CONFIDENCE:.0%} intervals from {DRAWS:,} "
    f"draws of whole reloads with their controls (bootstrap, seed {SEED}); that of a maximum cannot exceed "
    "what was measured."
)


@dataclass(frozen=True)
class Estimate:
    """A figure, in milliseconds or a factor, and the interval of `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fold:
    """The reloads of a scenario together.

    The figures have the names in `FIGURES`. There are none when fewer than
    `FEWEST_RELOADS` reloads can be used.
    """

    #: The reloads that are used, each with the index of its run.
    pairs: Sequence[tuple[int, Reload]]
    #: Why each of the others is not.
    left_out: Sequence[str]
    #: Name of a figure -> its value in milliseconds.
    reload: dict[str, Estimate]
    control: dict[str, Estimate]
    excess: dict[str, Estimate]
    #: Reload relative to control, a factor.
    ratio: dict[str, Estimate]

    @property
    def enough(self) -> bool:
        """Whether there are figures."""
        return len(self.pairs) >= FEWEST_RELOADS

    @property
    def seconds(self) -> float:
        """Length of the longest window."""
        return max((swap.window.end - swap.window.begin for _, swap in self.pairs), default=0.0)


def fold(runs: Sequence[Run], summaries: Sequence[Summary]) -> Fold:
    """The reloads of these runs together."""
    pairs: list[tuple[int, Reload]] = []
    left_out = []
    for number, summary in enumerate(summaries):
        for position, swap in enumerate(summary.reloads, start=1):
            why = unfit(swap)
            if why is None:
                pairs.append((number, swap))
            else:
                left_out.append(f"run {number + 1}, reload {position}: {why}")
    if len(pairs) < FEWEST_RELOADS:
        return Fold(pairs, left_out, {}, {}, {}, {})
    controls = [latencies(runs[number], swap.control) for number, swap in pairs if swap.control is not None]
    counts = _draws(len(pairs))
    reload, control = _quantiles(_windows(runs, pairs), counts), _quantiles(controls, counts)
    return Fold(
        pairs=pairs,
        left_out=left_out,
        reload=_estimates(reload),
        control=_estimates(control),
        excess=_estimates(reload - control),
        ratio=_estimates(reload / control),
    )


def relative(before: Sequence[Run], old: Fold, after: Sequence[Run], new: Fold) -> dict[str, Estimate]:
    """The figures of the reloads of `new` relative to those of `old`, as factors.

    Each fold comes with its runs. The intervals draw from both, independently. There
    are no figures where one of them has too few reloads.
    """
    if not (old.enough and new.enough):
        return {}
    figures = [
        _quantiles(_windows(runs, fold.pairs), _draws(len(fold.pairs), seed))
        for runs, fold, seed in ((before, old, SEED + 1), (after, new, SEED))
    ]
    return _estimates(figures[1] / figures[0])


def _windows(runs: Sequence[Run], pairs: Sequence[tuple[int, Reload]]) -> list[NDArray[np.float64]]:
    """The latencies of each reload."""
    return [latencies(runs[number], swap.window) for number, swap in pairs]


def median_interval(
    runs: Sequence[Run], summaries: Sequence[Summary], figure: str = "p99.9"
) -> tuple[float, float] | None:
    """An interval of `CONFIDENCE` for the median of the runs' reload figures.

    It belongs to the figure of the same name in ``Summary.reload``, in milliseconds.
    Runs are drawn at random with replacement, and of each drawn run its reloads. None
    when there are fewer than `FEWEST_RELOADS` reloads.
    """
    of_runs = []
    for run, summary in zip(runs, summaries, strict=True):
        windows = [latencies(run, swap.window) for swap in summary.counted]
        if windows := [window for window in windows if len(window)]:
            of_runs.append(windows)
    if sum(map(len, of_runs)) < FEWEST_RELOADS:
        return None
    column = list(FIGURES.values()).index(figure)
    drawn = np.stack(
        [
            _quantiles(windows, _draws(len(windows), SEED + number)[1:])[:, column]
            for number, windows in enumerate(of_runs)
        ]
    )
    chosen = np.random.default_rng(SEED).integers(len(of_runs), size=(len(of_runs), DRAWS))
    # A run that is drawn twice has other reloads each time.
    others = (np.arange(DRAWS) + np.arange(len(of_runs))[:, np.newaxis]) % DRAWS
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn[chosen, others], axis=0), [tail, 1 - tail])
    return float(low), float(high)


def unfit(swap: Reload) -> str | None:
    """Why a reload cannot be used, or None."""
    if swap.incomplete:
        return "; ".join(swap.incomplete)
    if swap.control is None:
        return "the quiet time before it is shorter than its window"
    for name, window in (("window", swap.window), ("control", swap.control)):
        why = _unfit_window(window)
        if why is not None:
            return f"{name}: {why}"
    return None


def _unfit_window(window: Window) -> str | None:
    if not window.requests:
        return "no request"
    return "; ".join(window.contaminated) or None


def _draws(reloads: int, seed: int = SEED) -> NDArray[np.int64]:
    """How often each reload is drawn, of shape ``[1 + DRAWS, reloads]``.

    The first draw has each reload once.
    """
    random = np.random.default_rng(seed)
    drawn = random.multinomial(reloads, np.full(reloads, 1 / reloads), size=DRAWS)
    return np.vstack([np.ones((1, reloads), np.int64), drawn])


def _quantiles(windows: Sequence[NDArray[np.float64]], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The figures of `FIGURES` for each draw, of shape ``[draws, figures]``.

    They are defined as in `spikeless.bench.analysis.percentile`.
    """
    owner = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
    values = np.concatenate(windows)
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    figures = np.empty((len(counts), len(FIGURES)))
    for number, count in enumerate(counts):
        reached = np.cumsum(count[owner])
        # Less a little, so that a rounding error does not ask for one request too many.
        needed = np.ceil(np.array(list(FIGURES)) * reached[-1] - 1e-6)
        figures[number] = values[np.searchsorted(reached, needed)]
    return figures


def _estimates(figures: NDArray[np.float64]) -> dict[str, Estimate]:
    """From the figures of all draws, the first of which has every reload once."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures[1:], [tail, 1 - tail], axis=0)
    return {
        name: Estimate(float(figures[0, column]), float(low[column]), float(high[column]))
        for column, name in enumerate(FIGURES.values())
    }
