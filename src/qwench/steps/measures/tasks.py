"""Benchmarks that users know, by lm-eval (EleutherAI's evaluation harness), on a release and on its source with the same engine.

    transformers   lm-eval's own class, in this process
    vllm           the server that `qwench serve` starts, over its OpenAI API, one after the other for release and source
    llama.cpp      its log-probabilities by its C interface; tasks that let the model write are left to the other two

A task is a name that lm-eval knows (their data comes from the hub), or a YAML file of one's own in lm-eval's form, whose data files lie beside it: then nothing is
fetched. Scores of release and source are compared document by document, which tells a loss of a percent where the two standard errors would hide it.
"""

from __future__ import annotations

import math
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from os import environ
from pathlib import Path
from typing import Any

import torch
import yaml

from qwench.engines import llama_cpp
from qwench.errors import EngineError, TextError, UserError, suggestion
from qwench.models.place import gpu_memory
from qwench.result import FILE_NAME, Estimate, Result, TaskScore, read_result, revise_result
from qwench.steps.cards.engines import known_trouble
from qwench.steps.gguf.verify import files_to_verify, is_gguf
from qwench.steps.publishing.serve import BEST, serving

ENGINES = ("transformers", "vllm", "llama.cpp")
START = 900.0
"""Seconds that a server may take to start."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        tasks: names, or YAML files.
        engine: one of ENGINES.
        few_shot: examples before each document; None: as the task says.
        limit: documents of each task; None: all.
    """

    tasks: Sequence[str]
    engine: str
    few_shot: int | None = None
    limit: int | None = None


def measure_tasks(release: Path, source: Path, asked: Asked, tell: Tell) -> list[TaskScore]:
    """Every metric of every task.

    Args:
        release: a folder, or a GGUF file in one.
        source: the folder of what it was made from; llama.cpp needs a GGUF file of it: the unquantized one beside the release.

    Raises:
        UserError: lm-eval is missing, a task is unknown or cannot be read, an engine refuses.
    """
    check(asked)
    tasks = [read_task(task) for task in asked.tasks]
    tell(f"{asked.engine}: the release")
    here = run_tasks(release, tasks, asked)
    tell(f"{asked.engine}: the source")
    there = run_tasks(source, tasks, asked)
    return scores(here, there, asked, release.name if release.suffix == ".gguf" else None)


def places(release: Path, source: Path, engine: str, file: str | None = None) -> tuple[Path, Path]:
    """What the engine is to read as release and as source: llama.cpp takes a GGUF file of each, the source's being the unquantized one of the same folder.

    Raises:
        EngineError: it does not read such a release, or there is no unquantized file.
    """
    if is_gguf(release) != (engine == "llama.cpp"):
        kind = "GGUF files" if is_gguf(release) else "folders of safetensors files"
        raise EngineError(
            f"{engine} does not read {kind}", f"give --engine {'llama.cpp' if is_gguf(release) else 'transformers or vllm'}"
        )
    if engine != "llama.cpp":
        record = read_result(release) if (release / FILE_NAME).is_file() else None
        if engine == "transformers" and record and (trouble := known_trouble(engine, record)):
            raise EngineError(f"{release}: {trouble}", "give --engine vllm")
        return release, source
    files = files_to_verify(release, file)
    folder = files[0].parent
    whole = next((p for kind in ("BF16", "F32", "F16") for p in files_to_verify(folder) if p.stem.endswith(kind)), None)
    if whole is None:
        raise EngineError(f"{folder} holds no unquantized GGUF file to compare with", "make the release with the type BF16 too")
    chosen = next((p for kind in BEST for p in files if p.stem.endswith(kind)), files[0])
    return chosen, whole


def check(asked: Asked) -> None:
    """Raise UserError where lm-eval or the engine is not there."""
    if util.find_spec("lm_eval") is None or (asked.engine == "vllm" and util.find_spec("tenacity") is None):
        raise UserError("lm-eval with its clients of servers (lm-eval[api]) is not installed", 'pip install "qwench[tasks]"')
    if asked.engine not in ENGINES:
        raise EngineError(
            f"no tasks can be run with {asked.engine!r}{suggestion(asked.engine, ENGINES)}",
            f"give --engine {', '.join(ENGINES)}",
        )
    if not asked.tasks:
        raise TextError("no task is named", "give --tasks NAME,NAME or a YAML file")


def read_task(task: str) -> str | dict[str, Any]:
    """A name as it is; a YAML file as a task, its data files found beside it. Raises TextError."""
    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return task
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TextError(
            f"the task {path} cannot be read: {error.strerror}", "give the path of a YAML file in lm-eval's form"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TextError(f"the task {path} is not plain YAML: {error}", "write it without !function and include") from None
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise TextError(f"{path} names no task", "a task has the key `task`, and lm-eval's others")
    files = data.get("dataset_kwargs", {}).get("data_files")
    if files:
        data["dataset_kwargs"] = data["dataset_kwargs"] | {"data_files": _beside(files, path.parent)}
    return data


def _beside(files: Any, folder: Path) -> Any:
    """Names of files, whole paths from a folder on; names that are addresses stay."""
    if isinstance(files, dict):
        return {name: _beside(file, folder) for name, file in files.items()}
    if isinstance(files, list):
        return [_beside(file, folder) for file in files]
    if "://" in str(files):
        return files
    path = (folder / str(files)).resolve()
    if not path.is_file():
        raise TextError(f"the task's data {path.name} is not in {folder}", "put it beside the YAML file, or mend data_files")
    return str(path)


def run_tasks(place: Path, tasks: Sequence[str | dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """lm-eval's own results. Raises UserError for what a person can mend."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(named))
    if unknown := [name for name in named if not manager.match_tasks([name])]:
        raise TextError(
            f"lm-eval knows no task {', '.join(name + suggestion(name, manager.all_tasks) for name in unknown)}",
            "`lm-eval ls tasks` lists them; a task of your own is a YAML file",
        )
    with language_model(place, asked.engine) as model:
        try:
            found = simple_evaluate(
                model, tasks=list(tasks), num_fewshot=asked.few_shot, limit=asked.limit, task_manager=manager, bootstrap_iters=1000,
                batch_size=1, log_samples=True,
            )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise TextError(
                f"lm-eval cannot run {', '.join(map(_name, tasks))}: {error}", "see lm-eval's documentation of tasks"
            ) from error
    assert found is not None
    return dict(found)


def _name(task: str | dict[str, Any]) -> str:
    return task if isinstance(task, str) else str(task["task"])


@contextmanager
def language_model(place: Path, engine: str) -> Iterator[Any]:
    """What lm-eval asks. Raises EngineError."""
    if engine == "transformers":
        from lm_eval.models.huggingface import HFLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield HFLM(pretrained=str(place), dtype="bfloat16" if device == "cuda" else "float32", device=device, batch_size=1)
    elif engine == "llama.cpp":
        yield likelihoods_of(place)
    else:
        with server(place) as address:
            from lm_eval.models.openai_completions import LocalCompletionsAPI

            yield LocalCompletionsAPI(
                base_url=f"{address}/v1/completions", pretrained=str(place), tokenizer_backend="huggingface", tokenized_requests=True,
                num_concurrent=1, max_length=_context(place),
            )  # fmt: skip


def _context(place: Path) -> int:
    from qwench.models.facts import facts
    from qwench.steps.materials.material import shapes_of

    return min(facts(shapes_of(str(place))).context or 2048, 4096)


@contextmanager
def server(place: Path) -> Iterator[str]:
    """vLLM on a folder: its address. The MTP head rests: with greedy drafts nothing changes, and log-probabilities of prompts need none. Raises EngineError."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    served = serving(place, "vllm", memory=gpu_memory(), context=_context(place), host="127.0.0.1", port=port)
    if not served.here:
        raise EngineError("vLLM is not installed here", "make engines, or --engine transformers")
    words = without(served.here, "--speculative-config")
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**environ, **served.environment}
    ) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(f"{address}/v1/models", process)
            yield address
        finally:
            process.terminate()


def without(words: Sequence[str], option: str) -> list[str]:
    """A command without an option and its value."""
    if option not in words:
        return list(words)
    place = words.index(option)
    return [*words[:place], *words[place + 2 :]]


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise EngineError(
                f"vLLM ended with code {process.returncode} before it served", "see what `qwench serve DIR --run` says"
            )
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise EngineError(f"vLLM did not start within {START:.0f} s", "see what `qwench serve DIR --run` says")


def likelihoods_of(place: Path) -> Any:
    """A model of lm-eval's that llama.cpp answers for: likelihoods, and nothing that has to be written."""
    from lm_eval.api.model import TemplateLM

    from qwench.stream.rows import load_tokenizer

    path = files_to_verify(place)[0]
    tokenizer = load_tokenizer(path.parent)

    class Likelihoods(TemplateLM):  # type: ignore[misc,unused-ignore]  # a class of a package without types
        """llama.cpp on one file, rows of one request after the other in one process."""

        eot_token_id = tokenizer.eos_token_id

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(tokenizer(string, add_special_tokens=False)["input_ids"])

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            rows = [[*context, *continuation] for _, context, continuation in requests]
            return llama_cpp.scores(path, rows, [len(context) for _, context, _ in requests], torch.get_num_threads())

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            rows = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
            return [value for value, _ in llama_cpp.scores(path, rows, [1] * len(rows), torch.get_num_threads())]

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            raise EngineError("a task wants the model to write, and llama.cpp is only asked for likelihoods here", "--engine vllm or transformers")  # fmt: skip

    return Likelihoods()


def scores(release: dict[str, Any], source: dict[str, Any], asked: Asked, file: str | None) -> list[TaskScore]:
    """lm-eval's results of both, metric by metric."""
    found = []
    for task, values in release["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            other = source["results"].get(task, {}).get(key)
            if (
                metric.endswith("_stderr")
                or not kind
                or not isinstance(value, float | int)
                or not isinstance(other, float | int)
            ):
                continue
            both = [_estimate(side["results"][task], key, metric, kind) for side in (release, source)]
            difference = _paired(release, source, task, metric, kind)
            upwards = release.get("higher_is_better", {}).get(task, {}).get(metric, False)
            found.append(
                TaskScore(
                    task=task, metric=metric, file=file, engine=asked.engine, version=f"lm-eval {metadata.version('lm_eval')}",
                    samples=int(release["n-samples"][task]["effective"]), few_shot=int(release.get("n-shot", {}).get(task) or 0),
                    release=both[0], source=both[1], difference=difference,
                    recovery=recovery(both[0], both[1], difference) if upwards else None,
                )
            )  # fmt: skip
    return found


def _estimate(values: dict[str, Any], key: str, metric: str, kind: str) -> Estimate:
    error = values.get(f"{metric}_stderr,{kind}")
    return Estimate(mean=float(values[key]), standard_error=float(error) if isinstance(error, float | int) else 0.0)


def _paired(release: dict[str, Any], source: dict[str, Any], task: str, metric: str, kind: str) -> Estimate | None:
    """Release minus source over the same documents; None where documents have no value of their own."""
    sides = []
    for side in (release, source):
        rows = [row for row in side.get("samples", {}).get(task, []) if row.get("filter", "none") == kind]
        values = {row["doc_id"]: row.get(metric) for row in rows}
        if not values or not all(isinstance(value, float | int) for value in values.values()):
            return None
        sides.append(values)
    if sides[0].keys() != sides[1].keys():
        return None
    differences = torch.tensor([float(sides[0][doc]) - float(sides[1][doc]) for doc in sides[0]], dtype=torch.float64)
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Estimate(mean=float(differences.mean()), standard_error=error)


def recovery(release: Estimate, source: Estimate, difference: Estimate | None) -> Estimate | None:
    """Release / source. The error is that of the paired difference where it is known, else of both as if they had nothing to do with each other."""
    if source.mean <= 0:
        return None
    error = difference.standard_error if difference else math.hypot(release.standard_error, source.standard_error)
    return Estimate(mean=release.mean / source.mean, standard_error=error / source.mean)


def put_on_record(folder: Path, found: Sequence[TaskScore]) -> None:
    """Add scores to a release's record, in place of earlier ones of the same task, metric, file and engine."""
    new = {(s.task, s.metric, s.file, s.engine) for s in found}

    def replace(result: Result) -> None:
        result.tasks = [s for s in result.tasks if (s.task, s.metric, s.file, s.engine) not in new] + list(found)

    revise_result(folder, replace)
