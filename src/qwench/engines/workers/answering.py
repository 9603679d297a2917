"""The frame of every worker: read the question, do the work, and leave an answer whatever happens. Runs inside of the engines' environments: no import of ours, nothing but the standard library.

A worker is run as `python NAME_worker.py FOLDER`; what lies in FOLDER is described in `qwench.engines.base`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Asked = dict[str, Any]
Told = dict[str, Any]


def run_worker(
    version: str, serve: Callable[[Asked, Path, Told], None], finish: Callable[[Asked, Told], None] | None = None
) -> None:
    """Answer the question in the folder that the command line names.

    Args:
        version: of the engine, and of what it stands on.
        serve: question, folder for arrays, answer to fill. What it raises becomes the answer's `refused`, and stands in the output.
        finish: what is to be said in any case, after it.
    """
    folder = Path(sys.argv[1])
    asked: Asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    told: Told = {"version": version}
    try:
        serve(asked, folder, told)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        told["refused"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
    if finish is not None:
        finish(asked, told)
    (folder / "answer.json").write_text(json.dumps(told), encoding="utf-8")
