"""What a person types. Each command is a few lines: find the model, call a step, show what came of it.

The commands lie in files by what they are for: `making` (recipes, inspect, plan, run, demo), `measuring` (eval, verify, doctor), `comparing`, `publishing` (card, serve, push, reproduce).

Exit codes: 0 done, 2 the user can mend it (one message, no traceback), 3 `doctor` found problems, 1 our fault.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from qwench import __version__, display
from qwench.cli import comparing, making, measuring, publishing
from qwench.cli.app import app
from qwench.errors import Interrupted, UserError

__all__ = ["app", "comparing", "main", "making", "measuring", "publishing"]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Turn a Qwen3.5-family checkpoint into a release that people run."""
    if version:
        display.out.print(__version__)
        raise typer.Exit


def main() -> None:
    """The entry point: errors of the tree in `qwench.errors` become one message and exit code 2."""
    try:
        app()
    except UserError as error:
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        display.err.print("stopped; what a run has written is kept, and the same command goes on from there")
        sys.exit(2)
    except OSError as error:
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
