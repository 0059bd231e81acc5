"""The ways to serve that are compared: one entry for each rung of the ladder.

`spikeless bench ladder` and ``benchmarks/mapping.py`` both read `RUNGS`. Adding an
entry adds a rung to the choices of ``--rung``, to the runs, and to the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spikeless import launch
from spikeless.mapping import MapSettings

#: One thread loads and one unloads, so that a load does not take the threads that
#: answer requests.
LOAD_THREADS = ("--num_load_threads=1", "--num_unload_threads=1")


@dataclass(frozen=True)
class Rung:
    """One way to prepare and serve a model."""

    #: Its name on the command line and in file names.
    key: str
    #: Its name in tables: what it adds to the rung before.
    title: str
    #: Flags of the server, in TensorFlow Serving's words.
    flags: Sequence[str] = ()
    #: One of `spikeless.launch.ALLOCATORS`; ``benchmarks/mapping.py`` uses glibc's
    #: throughout.
    allocator: str = "glibc"
    #: How the model is mapped beforehand; None: it is served as exported.
    mapping: MapSettings | None = None
    #: Whether versions are loaded apart from requests, by a preloaded library.
    isolate: bool = False
    #: What that library leaves out, of `spikeless.launch.ISOLATE_PARTS`.
    isolate_without: Sequence[str] = ()
    #: `spikeless.launch.EMBEDDED` or `TENSORFLOW_SERVING`: the only engine that it is
    #: for; None: both.
    engine: str | None = None
    #: Whether it is a rung of `spikeless bench ladder`.
    on_ladder: bool = True
    #: Its name in the results of ``benchmarks/mapping.py``; None: not measured there.
    kind: str | None = None

    @property
    def optimized(self) -> bool:
        """Whether the graph is optimised beforehand, and no more by the server."""
        return self.mapping is not None and self.mapping.optimize

    @property
    def has_engine(self) -> bool:
        """Whether it is for the engine that is measured here."""
        embedded = launch.chosen_engine() == launch.EMBEDDED
        return self.engine in (None, launch.EMBEDDED if embedded else launch.TENSORFLOW_SERVING)

    @property
    def lacking(self) -> str | None:
        """What keeps it from being run on this machine, or None."""
        if self.allocator == "jemalloc" and not launch.jemalloc_installed():
            return launch.JEMALLOC_REMEDY
        if not self.has_engine:
            return f"it is for {self.engine} only"
        # Images bring the library.
        if self.isolate and launch.chosen_engine() != launch.DOCKER and not launch.isolate_installed():
            return launch.isolate_remedy()
        return None

    def serving(self, settings: launch.LaunchSettings, directory: Path) -> launch.LaunchSettings:
        """A server's settings with this rung's flags; its files go into `directory`."""
        settings = dataclasses.replace(
            settings,
            flags=(*settings.flags, *self.flags),
            isolate=self.isolate,
            environment={launch.ISOLATE_WITHOUT_VARIABLE: ",".join(self.isolate_without)},
        )
        return launch.unoptimizing(settings, directory) if self.optimized else settings


_MAPPED, _OPTIMIZED = MapSettings(), MapSettings(optimize=True)
_YIELD = (*LOAD_THREADS, "--load_threads_yield")

#: From the lowest. The models always have warmup files; the first rung switches warming
#: off.
RUNGS = (
    Rung("stock", "stock", ("--enable_model_warmup=false",)),
    Rung("warmup", "+ warmup"),
    Rung("threads", "+ load/unload threads", LOAD_THREADS, kind="stock"),
    Rung("jemalloc", "+ jemalloc", LOAD_THREADS, "jemalloc"),
    Rung("mapped", "+ mapped", LOAD_THREADS, "jemalloc", _MAPPED, kind="mapped"),
    Rung(
        "mapped-yielding",
        "mapped, loads yield",
        _YIELD,
        "jemalloc",
        _MAPPED,
        engine=launch.EMBEDDED,
        on_ladder=False,
        kind="yielding",
    ),
    Rung("optimized", "+ optimised", LOAD_THREADS, "jemalloc", _OPTIMIZED, kind="tuned"),
    Rung("yielding", "+ loads yield", _YIELD, "jemalloc", _OPTIMIZED, engine=launch.EMBEDDED, kind="tuned"),
    Rung(
        "isolated",
        "+ isolated",
        LOAD_THREADS,
        "jemalloc",
        _OPTIMIZED,
        isolate=True,
        engine=launch.TENSORFLOW_SERVING,
    ),
)
LADDER = tuple(rung for rung in RUNGS if rung.on_ladder)
#: The names in the results of ``benchmarks/mapping.py``.
KINDS = tuple(dict.fromkeys(rung.kind for rung in RUNGS if rung.kind))


def kinds() -> dict[str, Rung]:
    """The rung of each kind that the engine here can serve; of several, the highest."""
    return {rung.kind: rung for rung in RUNGS if rung.kind and rung.has_engine}
