"""How a command answers: with tables for people or JSON for programs, and with an exit code."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import typer
from rich.console import Console, RenderableType
from transformers.utils import logging

from ..errors import AdaPruneError, AdapterFileError, AdapterNotFoundError, BaseMismatchError, PushError, TaskError


EXIT_CODES = {
    AdapterNotFoundError: 3,
    TaskError: 3,
    AdapterFileError: 4,
    BaseMismatchError: 5,
    PushError: 6,
    AdaPruneError: 1,
}
EXIT_CODES_HELP = (
    "Exit codes: 0 done; 1 refused, for the reason given; 2 wrong usage; 3 no such adapter, base, task or data within "
    "reach; 4 a damaged adapter, or one of another method; 5 another base; 6 the Hub refused or the connection broke, "
    "and nothing was changed there. Reasons go to stderr; with --json, all but those of 2 as a JSON object."
)


class Answer(NamedTuple):
    """What a command found: `data` for programs, `tables` for people."""

    data: dict[str, Any]
    tables: Sequence[RenderableType]


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Print what a command returns, and turn the errors that it raises on purpose into messages and exit codes.

    The command takes `as_json`. If that is set, one JSON object is all that goes to stdout.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = kwargs["as_json"]
        try:
            with _quietly(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                answer = command(*args, **kwargs)
        except (AdaPruneError, OSError, ImportError) as error:
            # The last two: no place to write, or an extra that is not installed.
            code = next((code for cls, code in EXIT_CODES.items() if isinstance(error, cls)), 1)
            reason = {"error": type(error).__name__, "message": str(error), "exit_code": code}
            typer.echo(json.dumps(reason) if as_json else f"error: {error}", err=True)
            raise typer.Exit(code) from None
        if as_json:
            typer.echo(json.dumps(answer.data, indent=2))
        else:
            # What stands in an adapter is text, whoever has written it: no markup.
            Console(markup=False).print(*answer.tables, sep="\n")

    return run


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep off stderr what transformers has to say of every model that it loads."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
