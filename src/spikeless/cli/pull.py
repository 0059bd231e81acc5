"""``spikeless pull``: a version comes from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from prometheus_client import start_http_server

from spikeless.cli.options import (
    PORT,
    Duration,
    interruptible,
    json_option,
    models_option,
    print_result,
    running_servers_option,
    store_options,
    store_settings,
    tell,
)
from spikeless.errors import Unavailable
from spikeless.rollout.fleet import FleetSettings
from spikeless.store.changes import this_node
from spikeless.store.follow import FollowSettings, StoreFollower
from spikeless.store.pull import PullSettings, pull
from spikeless.store.reporting import ReportSettings


@click.command()
@click.argument("store")
@click.argument("name", required=False)
@models_option
@click.option("--version", type=int, help="The version.  [default: the newest]")
@click.option(
    "--serving-root", help="Absolute path of the repository on the server.  [default: where it is here]"
)
@click.option("--keep", type=int, help="Versions that stay, by the rules of `spikeless prune` but age.")
@running_servers_option
@store_options
@click.option("--follow", is_flag=True, help="Pull each new version, until Ctrl-C or SIGTERM.")
@click.option(
    "--poll",
    "interval",
    type=Duration(at_least=0.05),
    default="30s",
    show_default=True,
    help="With --follow: time between looks.",
)
@click.option(
    "--spread",
    type=Duration(),
    default="0s",
    show_default=True,
    help="With --follow: wait a random part of this first.",
)
@click.option("--node", help="What this machine is called in a promotion by waves.  [default: its host name]")
@click.option(
    "--report",
    type=Duration(positive=True),
    help="With --follow: say in STORE how things are here, at least so often, as in 1m.",
)
@click.option(
    "--metrics",
    default="",
    help="With --report: the servers', as in http://{host}:8501/monitoring/prometheus/metrics.",
)
@click.option("--metrics-port", type=PORT, help="With --follow: serve metrics here; 0 picks a free port.")
@click.option(
    "--metrics-host",
    default="127.0.0.1",
    show_default=True,
    help="With --metrics-port: address to listen on.",
)
@json_option
def command(
    store: str,
    name: str | None,
    models: Path,
    version: int | None,
    serving_root: str | None,
    keep: int | None,
    servers: tuple[str, ...] | None,
    follow: bool,
    interval: float,
    spread: float,
    node: str | None,
    report: float | None,
    metrics: str,
    metrics_port: int | None,
    metrics_host: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Bring the newest version of NAME, or of each model, from STORE to the repository.

    Only what no version on this disk has is fetched. Every byte is compared, the files
    that a server maps are brought into the page cache, and the version appears whole or
    not at all. What an interrupted pull has fetched, the next one uses.

    Where versions are promoted in STORE (`spikeless promote --store`), these are
    brought, too. With --servers they are promoted there as by `spikeless promote`;
    without, models.config says so to servers that start afterwards. With --report,
    `spikeless promote --waves` and `spikeless status --store` know how things are here.
    """
    settings = PullSettings(
        serving_root,
        keep,
        FleetSettings(servers) if servers else None,
        store_settings(options),
        this_node() if node is None else node,
    )
    if not follow and (spread or metrics_port is not None or report is not None):
        raise click.UsageError("--spread, --report and --metrics-port are for --follow: give that, too")
    if metrics and report is None:
        raise click.UsageError("--metrics is for --report: give that, too")
    if follow and version is not None:
        raise click.UsageError("--follow pulls the newest version: leave out --version")
    with interruptible() as interrupted:
        if not follow:
            found = pull(
                store, models, name, version, settings=settings, progress=tell, interrupted=interrupted
            )
            for result in found:
                print_result(result, as_json)
            return
        follower = StoreFollower(
            store,
            models,
            name,
            FollowSettings(interval, spread, settings, ReportSettings(report, metrics)),
            pulled=lambda result: print_result(result, as_json),
            progress=tell,
            interrupted=interrupted,
        )
        if metrics_port is not None:
            try:
                listening, _ = start_http_server(metrics_port, metrics_host, follower.registry)
            except OSError as error:
                raise Unavailable(
                    f"cannot listen on {metrics_host}:{metrics_port}: {error.strerror}"
                ) from None
            tell(f"metrics on http://{metrics_host}:{listening.server_port}/metrics")
        follower.run()
