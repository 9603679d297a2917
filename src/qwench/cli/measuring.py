"""Commands that measure what was made: eval against the source, verify in an engine, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwench import display
from qwench.cli.app import DeviceOption, JsonOption, ModelArgument, ReleaseArgument, command, print_json
from qwench.errors import VerificationError


@command(
    "Measure",
    "qwench eval ./first --against demo:dense --documents 4",
    "qwench eval ./first-GGUF --against demo:dense --documents 2 --length 64",
    "qwench eval ./Qwen3.5-9B-AWQ --against Qwen/Qwen3.5-9B --tasks gsm8k,./mine.yaml --engine vllm --limit 200",
    name="eval",
)
def evaluate(
    release: ReleaseArgument,
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The checkpoint that the release was made from.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on (.txt or .jsonl); the package's held-out text if left out.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents to measure on.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of each document.")] = 512,
    speculate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Let both write so many tokens after each document's beginning, with drafts of the MTP head.",
        ),
    ] = 0,
    device: DeviceOption = "auto",
    compute: Annotated[
        str,
        typer.Option(
            "--compute", metavar="DTYPE", help="float32 or bfloat16, whose rounding is then part of what is measured."
        ),
    ] = "float32",
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Benchmarks instead, by lm-eval: its names, or YAML files of your own, with commas.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="With --tasks: transformers, vllm, llama.cpp."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: documents of each.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="With --tasks: examples before each document.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a release against its source: KL divergence, perplexity, top-1 agreement, acceptance of the MTP head."""
    from qwench.measuring import evaluate_gguf_release, evaluate_release
    from qwench.models.place import memory_is_told, place_of
    from qwench.steps.gguf.verify import is_gguf

    if tasks is not None:
        run_tasks(
            release, against, tasks, engine or ("llama.cpp" if is_gguf(release) else "transformers"), few_shot, limit, as_json
        )
        return
    place = place_of(device, compute)
    if is_gguf(release):
        with display.progress("evaluation", unit="blocks") as report, memory_is_told(place):
            by_file = evaluate_gguf_release(release, against, text, documents, length, report, place=place)
        if as_json:
            print_json({name: found.model_dump(mode="json") for name, found in by_file.items()})
        else:
            display.show_ladder(by_file)
        return
    with display.progress("evaluation", unit="blocks") as report, memory_is_told(place):
        measured = evaluate_release(release, against, text, documents, length, report, speculate, place)
    if as_json:
        print_json(measured.model_dump(mode="json"))
    else:
        display.show_evaluation(measured)


def run_tasks(
    release: Path, against: str, tasks: str, engine: str, few_shot: int | None, limit: int | None, as_json: bool
) -> None:
    """What `eval --tasks` does."""
    from qwench.checkpoint.hub import locate
    from qwench.steps.cards.values import task_rows
    from qwench.steps.measures import tasks as step

    asked = step.Asked([task.strip() for task in tasks.split(",") if task.strip()], engine, few_shot, limit)
    step.check(asked)
    here, there = step.places(release, locate(against).path, engine)
    found = step.measure_tasks(here, there, asked, lambda what: display.err.print(what, markup=False))
    step.put_on_record(release.parent if release.suffix == ".gguf" else release, found)
    if as_json:
        print_json([score.model_dump(mode="json") for score in found])
    else:
        columns = ["task", "metric", "documents", "source", "release", "difference", "recovery"]
        display.out.print(display.table(f"{asked.engine}, by lm-eval", columns, task_rows(found)))


@command(
    "Measure",
    "qwench verify ./first",
    "qwench verify ./first --engine sglang --offline",
    "qwench verify ./first-GGUF --file demo-dense-Q4_K_M.gguf",
    "qwench verify ./Qwen3.5-9B-AWQ --engine vllm",
)
def verify(
    release: ReleaseArgument,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="transformers, vllm, gptqmodel, auto-round, llama.cpp; left out: the one whose format it is. "
            "With --offline: vllm, sglang (also sglang-0.5.19, sglang-0.5.21), transformers.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="NAME", help="One file of a GGUF release; all if left out.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="MODEL", help="The source of a GGUF release: its BF16 file is held against transformers."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="Corrections (EoRA) to add on both sides: gptqmodel and vllm take them."),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Without the engine: play through how it would load the files, from their headers and config.json.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Load a release in a real engine, and hold the engine's numbers against our own reading of the file."""
    if offline:
        _verify_offline(release, engine or "vllm", as_json)
        return
    from qwench.measuring import verify_gguf_release, verify_release
    from qwench.steps.checks.natural import natural_engine
    from qwench.steps.gguf.verify import is_gguf, refuse_gguf_questions

    if is_gguf(release):
        if adapter is not None:
            raise VerificationError(f"--adapter {adapter} cannot be added to a GGUF release", "leave --adapter out")
        every = verify_gguf_release(release, engine or "llama.cpp", file, against)
    else:
        refuse_gguf_questions(release, engine, file, against)
        every = [verify_release(release, engine or natural_engine(release), adapter)]
    if as_json:
        data = [found.model_dump(mode="json") for found in every]
        print_json(data if is_gguf(release) else data[0])
    else:
        for found in every:
            display.show_verification(found)
    for found in every:
        if found.outcome not in {"agrees", "loads"}:
            raise VerificationError(
                f"{found.engine} {found.outcome} on {found.file or release}", "; ".join(found.notes) or "see the table above"
            )


def _verify_offline(release: Path, engine: str, as_json: bool) -> None:
    from qwench.steps.checks.proof import offline_release, show

    proof = offline_release(release, engine)
    if as_json:
        print_json(proof.model_dump(mode="json"))
    else:
        show(proof, display.out)
    if not proof.good:
        raise VerificationError(
            f"{proof.engine} {proof.version} would not load {release} as it is meant", "see what is said above"
        )


@command("Measure", "qwench doctor ./first", "qwench doctor some/Qwen3.5-9B-AWQ", "qwench doctor ./Qwen3.5-9B-AWQ --fix")
def doctor(
    model: ModelArgument,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="Mend what is only metadata, in place: lists of names in config.json. Tensors are never touched."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what would go wrong with anybody's release, in which engine, and how to mend it. Reads headers only, of a hub id too.

    Exit code 0: nothing; 3: something is wrong in the newest version of an engine.
    """
    from qwench.steps.checks.doctor import PROBLEMS, examine, show_examination

    found = examine(model, fix)
    if as_json:
        print_json(found.as_data())
    else:
        show_examination(found, display.out)
    if not found.good:
        raise typer.Exit(PROBLEMS)
