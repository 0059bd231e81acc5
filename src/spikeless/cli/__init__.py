"""The ``spikeless`` command: one module per sub-command, imported when it is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from spikeless import __version__
from spikeless.errors import SpikelessError, missing_extra, nearest

#: Sub-command -> the module of this package that defines a click command ``command``,
#: and its short help.
COMMANDS: dict[str, str] = {
    "train": "Train one of the models in training/ and export it.",
    "warmup": "Build, inspect and verify warmup files.",
    "publish": "Make a SavedModel a version that servers pick up.",
    "follow": "Publish what an alias of MLflow names, whenever it moves.",
    "push": "Put a version into a store that many machines pull from.",
    "pull": "Bring versions from a store to this machine, once or as they appear.",
    "map": "Map a model's parameters from files instead of restoring them.",
    "keep": "Keep the mapped parameters of served versions in memory.",
    "inspect": "Show the variables of a SavedModel: mapped, restored or dropped.",
    "capture": "Relay calls to a server and record a sample of them.",
    "promote": "Give callers another version, after checking it on the servers.",
    "rollback": "Give callers the version from before.",
    "status": "Show the repository and its servers side by side.",
    "prune": "Remove old versions that nobody needs any more.",
    "serve": "Serve models with the embedded engine.",
    "exporter": "Export version states and memory of a server to Prometheus.",
    "bench": "Measure latency under load while a version is swapped.",
    "report": "Turn raw results into a page and a table.",
    "demo": "Do all of it once, without a warmup file and with one.",
}


#: Options by names that they had, or have in other programs -> what it is here.
_OTHER_NAMES = {
    "--target": "--server",
    "--seconds": "--duration",
    "--slo-ms": "--slo-latency",
    "--warm-seconds": "--settle",
    **dict.fromkeys(("--model-name", "--model_name", "--name"), "name"),
}

_COMPLETION = """\b
Completion of commands and options, in ~/.bashrc:
  eval "$(_SPIKELESS_COMPLETE=bash_source spikeless)"
In ~/.zshrc the same with zsh_source; for fish:
  _SPIKELESS_COMPLETE=fish_source spikeless > ~/.config/fish/completions/spikeless.fish
"""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"spikeless.cli.{cmd_name}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name without importing any of them."""
        commands = [CompletionItem(name, help=text) for name, text in COMMANDS.items()]
        found = [item for item in commands if item.value.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _quiet_tensorflow(ctx: click.Context, parameter: click.Parameter, verbose: bool) -> None:
    """Before TensorFlow is loaded: it reads the variable only then."""
    if verbose:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_COMPLETION)
@click.version_option(__version__, prog_name="spikeless")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_quiet_tensorflow,
    help="Show what TensorFlow logs.",
)
def cli() -> None:
    """Swap a TensorFlow Serving model under live traffic without anyone noticing."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command; exit with 0, with 1 after an error, with 2 for wrong usage."""
    with _sigterm_unwinds():
        _run(arguments)


def _run(arguments: list[str] | None) -> NoReturn:
    try:
        result: Any = cli.main(args=arguments, prog_name="spikeless", standalone_mode=False)
    except SpikelessError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        _fail(missing)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except click.ClickException as error:
        _with_name_here(error).show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("spikeless: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)


def _with_name_here(error: click.ClickException) -> click.ClickException:
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = {name for parameter in error.ctx.command.params for name in parameter.opts}
        wanted = _OTHER_NAMES.get(error.option_name, "")
        for name in {wanted, f"{wanted}s"} & known:
            right = name if name.startswith("-") else f"the argument {name.upper()}"
            return click.UsageError(f"no such option {error.option_name}: did you mean {right}?", error.ctx)
    return error


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end the command by an exception: what it started is stopped."""

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        print("spikeless: terminated", file=sys.stderr)
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: object) -> NoReturn:
    print(f"spikeless: error: {error}", file=sys.stderr)
    sys.exit(1)
