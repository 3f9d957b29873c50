"""Output of commands: tables for people or JSON for programs, and exit codes."""

from __future__ import annotations

import contextlib
import functools
import json
import math
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
    "Exit codes: 0 success; 1 refused, for the reason given; 2 wrong usage; 3 adapter, base, task or data not found, "
    "or the task does not fit; 4 damaged adapter, or one of another method; 5 wrong base; 6 the Hub refused the push "
    "or the connection broke, and no file was changed there. Errors go to stderr; with --json, all but those of code "
    "2 as a JSON object."
)


class Answer(NamedTuple):
    """The result of a command: `data` for programs, `tables` for people."""

    data: dict[str, Any]
    tables: Sequence[RenderableType]


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Print what a command returns, and turn its expected errors into messages and exit codes.

    The command must take `as_json`; if that is set, stdout receives exactly one JSON object.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = kwargs["as_json"]
        try:
            with _quietly(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                answer = command(*args, **kwargs)
        except (AdaPruneError, OSError, ImportError) as error:
            # The last two: the output cannot be written, or an extra is not installed.
            code = next((code for cls, code in EXIT_CODES.items() if isinstance(error, cls)), 1)
            reason = {"error": type(error).__name__, "message": str(error), "exit_code": code}
            typer.echo(json.dumps(reason) if as_json else f"error: {error}", err=True)
            raise typer.Exit(code) from None
        if as_json:
            typer.echo(json.dumps(_without_nan(answer.data), indent=2, allow_nan=False))
        else:
            # Text from an adapter is not trusted, so it is not interpreted as markup.
            Console(markup=False).print(*answer.tables, sep="\n")

    return run


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by `None`."""
    if isinstance(value, dict):
        return {key: _without_nan(it) for key, it in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(it) for it in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what transformers reports on stderr for every model that it loads."""
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
