"""``spikeless promote``: give callers another version, once it is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    Duration,
    change_options,
    check_only_of_a_store,
    fleet_settings,
    interruptible,
    label_option,
    print_result,
    store_option,
    tell,
)
from spikeless.rollout.probes import ComparisonSettings
from spikeless.rollout.promotion import PromotionSettings, promote
from spikeless.rollout.soak import SoakSettings


@click.command()
@click.argument("name")
@click.argument("version", type=int)
@label_option
@store_option
@click.option("--canary", is_flag=True, help="Only serve it as NAME-canary; requests to NAME never reach it.")
@click.option(
    "--soak", type=Duration(), default="0s", help="Watch it so long, as in 10m, before the last steps."
)
@click.option(
    "--metrics", default="", help="Watch these, as in http://{host}:8501/monitoring/prometheus/metrics."
)
@click.option(
    "--max-p99-ratio", default=1.5, show_default=True, help="Its p99 over that of the stable version."
)
@click.option(
    "--comparison-requests", default=200, show_default=True, help="Requests that each of the two is sent."
)
@click.option(
    "--keep-previous/--unload-previous", default=True, help="Keep the last version loaded, to go back."
)
@click.option("--takes-unlabelled", is_flag=True, help="It may take requests that name no label.")
@click.option("--serving-root", help="Where servers see the repository, when models.config is new.")
@change_options
def command(
    name: str,
    version: int,
    models: Path,
    store: str | None,
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Make VERSION the version that callers of NAME get.

    It is loaded as NAME-canary first, asked its warmup and golden requests there, and
    compared with the stable version; then it is added to NAME, and the label moves. If
    anything fails on any server, all is put back. models.config is written at each
    step. Progress goes to standard error. Repeat the command when it was killed: it
    resumes where it was.

    With --store, nothing is asked here: the store says from now on that VERSION, which
    is in it, is promoted, and each machine that follows it (`spikeless pull --follow
    --servers`) does the above by itself.

    Servers that read models.config need --allow_version_labels_for_unavailable_models
    to start with labels.
    """
    if store is not None:
        from spikeless.store import promotions

        check_only_of_a_store()
        with interruptible() as interrupted:
            outcome = promotions.promote(
                store,
                name,
                version,
                label=options["label"],
                reason=options["reason"],
                dry_run=dry_run,
                interrupted=interrupted,
            )
        print_result(outcome, as_json)
        return
    fleet = fleet_settings(options)
    settings = PromotionSettings(
        label=options["label"],
        canary=options["canary"],
        keep_previous=options["keep_previous"],
        takes_unlabelled=options["takes_unlabelled"],
        serving_root=options["serving_root"],
        comparison=ComparisonSettings(options["comparison_requests"], max_p99_ratio=options["max_p99_ratio"]),
        soak=SoakSettings(options["soak"], metrics=options["metrics"]),
        reason=options["reason"],
    )
    with interruptible() as interrupted:
        outcome = promote(models, name, version, fleet, settings, tell, interrupted, dry_run=dry_run)
    print_result(outcome, as_json)
