"""``spikeless promote``: give callers another version, once it is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    Duration,
    Ratio,
    change_options,
    check_needs_store,
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

#: Parameters of promotions in waves.
_OF_WAVES = ("waves", "first", "max_p99", "max_silent", "interval")


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
    "--max-error-rate",
    type=Ratio(),
    default="0.1%",
    show_default=True,
    help="Share of real requests that may fail beyond the share with the version before.",
)
@click.option(
    "--comparison-requests", default=200, show_default=True, help="Requests that each of the two is sent."
)
@click.option(
    "--keep-previous/--unload-previous", default=True, help="Keep the last version loaded, to go back."
)
@click.option("--takes-unlabelled", is_flag=True, help="It may take requests that name no label.")
@click.option("--serving-root", help="Where servers see the repository, when models.config is new.")
@click.option(
    "--waves",
    help="With --store: how many machines have it after each wave, as in 1,10%,100%.  [default: all at once]",
)
@click.option("--wave", "first", help="With --store: machines of a wave before these, NODE[,NODE...].")
@click.option("--max-p99", type=Duration(positive=True), help="With --waves: the p99 of each machine.")
@click.option(
    "--max-silent", type=click.IntRange(0), default=0, help="With --waves: machines that may be silent."
)
@click.option(
    "--poll",
    "interval",
    type=Duration(at_least=0.05),
    default="5s",
    show_default=True,
    help="With --waves: time between looks at what machines report.",
)
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
    --servers`) does the above by itself. With --waves, some machines do first; when
    one of them fails, has more errors or a higher p99 than allowed, or is silent, all
    return to the version before, and the command fails. Repeated after a kill, it goes
    on. Machines report when they follow with --report.

    Servers that read models.config need --allow_version_labels_for_unavailable_models
    to start with labels.
    """
    if store is None:
        check_needs_store(*_OF_WAVES)
    elif options["waves"] is not None or options["first"] is not None:
        _in_waves(store, name, version, as_json, dry_run, options)
        return
    else:
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
        soak=SoakSettings(
            options["soak"], metrics=options["metrics"], max_error_rate=options["max_error_rate"]
        ),
        reason=options["reason"],
    )
    with interruptible() as interrupted:
        outcome = promote(models, name, version, fleet, settings, tell, interrupted, dry_run=dry_run)
    print_result(outcome, as_json)


def _in_waves(
    store: str, name: str, version: int, as_json: bool, dry_run: bool, options: dict[str, Any]
) -> None:
    from spikeless.store.health import HealthLimits
    from spikeless.store.waves import ALL, WaveSettings, promote_in_waves

    check_only_of_a_store(*_OF_WAVES, "soak", "max_error_rate", "load_timeout", "patience")
    settings = WaveSettings(
        sizes=tuple(part.strip() for part in (options["waves"] or ALL).split(",")),
        first=tuple(sorted(part.strip() for part in options["first"].split(","))) if options["first"] else (),
        limits=HealthLimits(
            soak=options["soak"],
            max_error_rate=options["max_error_rate"],
            max_p99=options["max_p99"],
            load_timeout=options["load_timeout"],
            patience=options["patience"],
        ),
        max_silent=options["max_silent"],
        interval=options["interval"],
    )
    with interruptible() as interrupted:
        outcome = promote_in_waves(
            store,
            name,
            version,
            settings,
            label=options["label"],
            reason=options["reason"],
            dry_run=dry_run,
            progress=tell,
            interrupted=interrupted,
        )
    print_result(outcome, as_json)
