"""The command line's frame. Commands return what they found; `command` prints it, as tables or as one JSON object.

Standard output belongs to the result; progress, logs and errors go to standard error. Exit status: 0 done, 1 failed
(something is not there, damaged or impossible here), 2 bad usage (an option's value cannot work, or does nothing).

Nothing here imports torch before a command works: help and typing errors come at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from remoe_adapt import __version__
from remoe_adapt._support import check_file, write_csv
from remoe_adapt.cli import options as opt
from remoe_adapt.cli.options import CommandLines, CommandResult
from remoe_adapt.cli.rules import check_options
from remoe_adapt.errors import ConfigError, RemoeError, UncacheableError

app = typer.Typer(
    name="remoe",
    help="A dial between quality and expert reuse for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profiles_app = typer.Typer(help="Device profiles: list, show, check.", no_args_is_help=True)
export_app = typer.Typer(help="The same adapter for other engines: vLLM, PEFT, llama.cpp.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks, each against its named baselines.", no_args_is_help=True)
app.add_typer(profiles_app, name="profiles")
app.add_typer(bench_app, name="bench")
app.add_typer(export_app, name="export")


_Command = TypeVar("_Command", bound=Callable[..., CommandResult])
_Speaker = TypeVar("_Speaker", bound=Callable[..., CommandLines])


def command(
    group: typer.Typer, name: str, csv_rows: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] | None = None
) -> Callable[[_Command], _Command]:
    """Registers a function as the command `name`; it returns (JSON object, what to show).

    "ok": False in the object means exit status 1.

    csv_rows: what --csv writes of the object, for a command that has the option.
    """

    def register(function: _Command) -> _Command:
        def run(ctx: typer.Context, **kwargs: Any) -> None:
            as_json, csv = kwargs["as_json"], kwargs.get("csv")
            # Libraries that print must not break the one JSON object.
            keep_clean = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            with _exit_status(), keep_clean:
                _check(ctx, kwargs)
                if csv is not None:
                    check_file(csv, "--csv", (".csv",))
                result, shown = function(**kwargs)
            if int(os.environ.get("RANK", "0")):
                return  # of several processes of a launcher one speaks
            if as_json:
                print(json.dumps(result, default=str))
            else:
                # Where nobody looks, in a pipe or a file, a table keeps its columns whatever the terminal's width.
                console = Console(width=None if sys.stdout.isatty() else 160)
                for renderable in shown:
                    console.print(Text(renderable) if isinstance(renderable, str) else renderable)
            if csv is not None and csv_rows is not None:
                with _exit_status():
                    write_csv(csv, csv_rows(result))
            if result.get("ok") is False:
                raise typer.Exit(1)

        group.command(name)(_with_context(run, function))
        return function

    return register


def lines(group: typer.Typer, name: str) -> Callable[[_Speaker], _Speaker]:
    """Registers a command that says things while it runs: each (JSON object, text) is a line, printed at once."""

    def register(function: _Speaker) -> _Speaker:
        def run(ctx: typer.Context, **kwargs: Any) -> None:
            with _exit_status():
                _check(ctx, kwargs)
                for event, text in function(**kwargs):
                    print(json.dumps(event, default=str) if kwargs["as_json"] else text, flush=True)

        group.command(name)(_with_context(run, function))
        return function

    return register


def _with_context(run: Callable[..., None], function: Callable[..., Any]) -> Callable[..., None]:
    """`run` with the options and the help of `function`; typer hands it the context beside them."""
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    functools.update_wrapper(run, function)
    # typer reads annotations as objects, and `from __future__ import annotations` left strings.
    signature = inspect.signature(function, eval_str=True)
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=[*keywords, context])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, "ctx": typer.Context}
    return run


def _check(ctx: typer.Context, values: Mapping[str, Any]) -> None:
    spelled = {parameter.name: parameter for parameter in ctx.command.params}

    def given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")

    name = ctx.command_path.partition(" ")[2]
    for hint in check_options(name, values, given, lambda option: spelled[option].opts[0]):
        note(f"note: {hint}")


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except (RemoeError, OSError) as error:
        note(f"error: {error}")
        # A model that cannot be cached is no typing error: the same command may work for another one.
        usage = isinstance(error, ConfigError) and not isinstance(error, UncacheableError)
        raise typer.Exit(2 if usage else 1) from error
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def _root(version: opt.Version = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def note(text: str) -> None:
    """A line for the user beside the result, at once."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def live_text(shown: bool, status: Callable[[], str]) -> Iterator[Callable[[str], None] | None]:
    """Streams text to standard output, with the status in a line below it where both streams are terminals."""
    if not shown:
        yield None
        return
    at_terminal = sys.stdout.isatty() and sys.stderr.isatty()

    def write(piece: str) -> None:
        if at_terminal:
            print("\x1b[J", end="", file=sys.stderr, flush=True)  # erase the old line: text may grow into it
        print(piece, end="", flush=True)
        if at_terminal:
            # Make room below, save the place, write the line, go back (ANSI: IND, CUU, DECSC, EL, DECRC).
            line = status()[: shutil.get_terminal_size().columns - 1]
            print(f"\x1bD\x1b[A\x1b7\n\r\x1b[2K{line}\x1b8", end="", file=sys.stderr, flush=True)

    yield write
    print(flush=True)
    print(f"\x1b[J{status()}" if at_terminal else status(), file=sys.stderr, flush=True)
