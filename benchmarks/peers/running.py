"""One entrant, one process: what it took, or why it did not get there.

Processor seconds are the kernel's, of the process and of all that it started, interpreter and imports included; those of the imports are told apart. Memory is the program's own high-water mark,
and what the interpreter held with its libraries imported is told apart as well. Both sides load what they need in that count, models' classes among it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.entrants import OURS, Entrant
from benchmarks.peers.recipes import Model, recipe
from qwench.demo import checkpoint
from qwench.engines.environments import python_of
from qwench.errors import RecipeError, UserError
from qwench.recipe import load_recipe

WORKERS = Path(__file__).parent / "workers"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2",
}  # fmt: skip
"""One thread for everybody; GPTQModel alone insists on two workers."""
TAIL = 6


@dataclass(frozen=True)
class Calibration:
    """What is read, and for how long it is tuned.

    Attributes:
        file: the token ids of `rows` rows of `length`.
        iterations, batch: of tuned methods, on both sides.
    """

    file: Path
    rows: int
    length: int
    iterations: int
    batch: int


@dataclass
class Run:
    """What an entrant took.

    Attributes:
        why_not: why there is nothing to judge; None where there is.
        skipped: nothing was tried.
        cpu_seconds, user_seconds: user and system time of the whole process, and user time alone.
        import_seconds, job_seconds: of it, what was gone before the job began, and the job itself; the rest is the interpreter's end.
        wall_seconds: on a machine with other guests, so not for comparison.
        peak, resident_after_imports: bytes.
        peak_of_job: the peak is of what came after the imports alone.
        ru_maxrss: what wait4 says, bytes: with children, and with what the parent held when it forked.
    """

    why_not: str | None = None
    skipped: bool = False
    cpu_seconds: float = 0.0
    user_seconds: float = 0.0
    import_seconds: float = 0.0
    job_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak: int = 0
    resident_after_imports: int = 0
    peak_of_job: bool = False
    ru_maxrss: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)


def run(entrant: Entrant, model: Model, told: Calibration, folder: Path, timeout: float) -> Run:
    """Run an entrant into `folder/release`, or take over what an earlier call with the same job has left there."""
    folder = folder.absolute()
    try:
        job = _job(entrant, model, told, folder)
        python = _python(entrant.who)
    except RecipeError as error:
        where = f"recipe {folder / 'recipe.yaml'}: "
        return Run(why_not=f"our recipes do not know it: {' '.join(error.what.replace(where, '').split())}", skipped=True)
    except UserError as error:
        return Run(why_not=" ".join(str(error).split()), skipped=True)
    kept = folder / "run.json"
    if kept.is_file() and json.loads((folder / "job.json").read_text(encoding="utf-8")) == job:
        return Run(**json.loads(kept.read_text(encoding="utf-8")))
    assert not (folder / "release").exists(), f"{folder} holds another job's release: give another --work folder, or delete it"
    (folder / "job.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    command = [str(python.absolute()), str(WORKERS.absolute() / f"{entrant.who.replace('-', '_')}_worker.py"), str(folder)]
    found = _measured(command, _environment(entrant.who), folder, timeout)
    kept.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def _job(entrant: Entrant, model: Model, told: Calibration, folder: Path) -> dict[str, Any]:
    """The job file's content; for ours the recipe is written as well. Raises RecipeError where our recipes do not know a step."""
    folder.mkdir(parents=True, exist_ok=True)
    tuning = {"iterations": told.iterations, "batch": told.batch} if entrant.tuned else {}
    settings: dict[str, Any] = {**entrant.settings, **tuning}
    if entrant.who == OURS:
        own = {**entrant.settings, **({"autoround": {**tuning, **entrant.settings.get("autoround", {})}} if tuning else {})}
        path = folder / "recipe.yaml"
        made = recipe(entrant.name, entrant.weights, model, entrant.method, own, told.rows, told.length)
        path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        load_recipe(str(path))
        compute = {"compute": entrant.settings["compute"]} if "compute" in entrant.settings else {}
        settings = {"recipe": str(path), "content": made, **compute}
    return {
        "model": str(folder.parent / entrant.after / "release" if entrant.after else checkpoint(model)), "out": str(folder / "release"), "rows": str(told.file.absolute()), "method": entrant.method, "settings": settings,
    }  # fmt: skip


def _python(who: str) -> Path:
    """Raises EngineError where there is no environment of that tool."""
    return Path(sys.executable) if who == OURS else python_of(who, who, "about 2 GB")


def _environment(who: str) -> dict[str, str]:
    """Offline and single-threaded; other tools do not get this process's Python path."""
    return {name: value for name, value in os.environ.items() if who == OURS or not name.startswith("PYTHON")} | ENVIRONMENT


def _measured(command: list[str], environment: dict[str, str], folder: Path, timeout: float) -> Run:
    log, began = folder / "log.txt", time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            cwd=folder,  # some tools leave logs where they are started
        )  # fmt: skip
        late = _wait(process, began + timeout)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    found = Run(
        cpu_seconds=round(used.ru_utime + used.ru_stime, 2), user_seconds=round(used.ru_utime, 2),
        wall_seconds=round(time.monotonic() - began, 1), ru_maxrss=used.ru_maxrss * 1024,
    )  # fmt: skip
    report = folder / "report.json"
    if late:
        found.why_not = f"not done after {timeout:.0f} s"
    elif process.returncode or not report.is_file():
        found.why_not = f"ended with code {process.returncode}: {_tail(log)}"
    else:
        told = json.loads(report.read_text(encoding="utf-8"))
        for name in ("import_seconds", "job_seconds", "peak", "resident_after_imports", "peak_of_job", "versions"):
            setattr(found, name, told[name])
        found.reports = told.get("reports", {})
    return found


def _wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Wait without reaping, so that wait4 can tell what was used; whether it had to be stopped."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            os.killpg(process.pid, 9)
            return True
        time.sleep(0.2)
    return False


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return " / ".join(line.strip() for line in deque(lines, maxlen=TAIL) if line.strip())[-600:]
