"""How a release is stored: dtypes by component, named files, and the low-rank corrections in a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import RecipeError
from qwench.formats.adapter import Adapter
from qwench.formats.release import open_source
from qwench.measuring import evaluate_release
from qwench.models import map_of, sketch
from qwench.models.run import Trunk
from qwench.recipe import Recipe, load_recipe, parse_recipe
from qwench.run import run_recipe
from qwench.steps.cards.card import write_card
from qwench.steps.checks.verify import verify
from qwench.steps.planning.plan import make_plan
from qwench.stream.rows import held_out_rows
from tests.support.tiny import write_tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
QUIET = Report("test", "bytes", None)
GIB = 2**30

APART = """
name: apart
steps:
  - quantize: {rules: [{roles: [mlp.*], scheme: {kind: int, bits: 4, group: 16}, layers: 1..}]}
  - export: {dtype: {text: bfloat16, mtp: bfloat16, vision: source}, files: {visual_mtp: [vision, mtp]}, shard_size: 20GB}
"""


def test_release_1_from_the_published_config_in_float32() -> None:
    """Two files of 10.2 and 2.15 GiB; 93 weights of layers 1.. in INT4."""
    config = json.loads((CONFIGS / "qwen3.5-9b.json").read_text(encoding="utf-8"))
    config["text_config"]["dtype"] = "float32"
    source = sketch(config)
    plan = make_plan(load_recipe("awq-int4-mtp"), source, map_of(source))
    sizes = {file.name: file.nbytes / GIB for file in plan.files}
    assert sizes == {
        "model.safetensors": pytest.approx(10.2, abs=0.05),
        "visual_mtp.safetensors": pytest.approx(2.15, abs=0.05),
    }
    assert plan.quantized_tensors == 93 and plan.kept_tensors == 333, "the tower alone comes out bit for bit"
    assert plan.config["text_config"]["dtype"] == "bfloat16"


def test_release_4_from_the_published_config() -> None:
    """8 x 4 weights in INT8, 24 x 3 + 32 x 3 in INT4, a correction beside each."""
    source = sketch(json.loads((CONFIGS / "qwen3.5-9b.json").read_text(encoding="utf-8")))
    plan = make_plan(load_recipe("gptq-int8-int4-eora"), source, map_of(source))
    bits = [scheme.bits for scheme in plan.schemes.values()]
    assert (bits.count(8), bits.count(4)) == (32, 168)
    assert len(plan.corrected) == 200
    assert plan.files[-1].name == "eora/adapter_model.safetensors" and plan.files[-1].nbytes == pytest.approx(
        plan.adapter_bytes, rel=0.001
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 checkpoint, and a release of it in two files."""
    folder = tmp_path_factory.mktemp("storage")
    source = write_tiny(folder / "model", float32=("",))
    run_recipe(parse_recipe(APART, "t"), str(source), folder / "out", 1, QUIET)
    return source, folder / "out"


def test_components_go_to_their_files_in_their_dtypes(apart: tuple[Path, Path]) -> None:
    source, release = Checkpoint.open(apart[0]), Checkpoint.open(apart[1])
    assert {t.dtype for t in source.tensors.values()} == {"F32"}
    for name in source.tensors.keys() & release.tensors.keys():
        before, after = source.read(name), release.read(name)
        vision = ".visual." in name
        assert release.tensors[name].file == ("visual_mtp" if vision or "mtp." in name else "model") + ".safetensors"
        assert after.dtype == (torch.float32 if vision else torch.bfloat16)
        assert torch.equal(before.to(after.dtype), after), name
    index = json.loads((apart[1] / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors", "visual_mtp.safetensors"}


def test_transformers_finds_the_second_file(apart: tuple[Path, Path]) -> None:
    """It would take `model.safetensors` for everything, and a tower of random numbers for the rest."""
    from transformers import AutoModelForImageTextToText

    _, release = apart
    model, said = AutoModelForImageTextToText.from_pretrained(release, output_loading_info=True)
    assert not said["missing_keys"]
    stored = Checkpoint.open(release)
    for name, parameter in model.named_parameters():
        if ".visual." in name:
            assert torch.equal(parameter.float(), stored.read(name).to(parameter.dtype).float()), name


CORRECTED = """
name: corrected
calibration: {samples: 12, length: 256}
steps:
  - quantize: {method: gptq, rules: [{roles: [mlp.*, attention.*, delta.out], scheme: int4}]}
  - correct: {rank: 32}
  - export: {format: FORMAT}
"""


def corrected(format: str = "compressed-tensors") -> Recipe:
    return parse_recipe(CORRECTED.replace("FORMAT", format), "t")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_corrections_lie_in_a_folder_of_their_own_and_bring_the_release_closer(format: str, tmp_path: Path) -> None:
    source, out = checkpoint("dense"), tmp_path / "out"
    run_recipe(corrected(format), str(source), out, 0, QUIET)
    adapter, plain = Adapter(out / "eora"), open_source(out, corrected=False)
    quantized = {s.module for s in map_of(plain).slots() if not torch.equal(*_both(s.tensor, source, out))}
    assert set(adapter.modules) == quantized
    assert not list(out.glob("adapter*")) and len(list(out.glob("*.safetensors"))) == 1
    ids = held_out_rows(source, 4, 256).ids
    expected, without, with_them = (_hidden(found, ids) for found in (Checkpoint.open(source), plain, open_source(out)))
    assert float((with_them - expected).square().mean()) < 0.7 * float((without - expected).square().mean())


def test_a_card_has_its_figures_with_corrections_and_without(tmp_path: Path) -> None:
    source, out = checkpoint("dense"), tmp_path / "out"
    run_recipe(corrected(), str(source), out, 0, QUIET)
    assert evaluate_release(out, str(source), None, 2, 64, QUIET).corrections == len(Adapter(out / "eora").modules) > 0
    assert "Every figure stands with them" in write_card(out).read_text(encoding="utf-8")


def test_a_plan_of_a_walk_names_the_memory_of_a_layer() -> None:
    """The largest layer of the 9B shape in float32 is 0.9 GB, the second moment of its down projection 0.6 GB: far more than rounding needs."""
    source = sketch(json.loads((CONFIGS / "qwen3.5-9b.json").read_text(encoding="utf-8")))
    walked, rounded = (make_plan(load_recipe(name), source, map_of(source)) for name in ("gptq-int8-int4-eora", "int4"))
    assert walked.working_memory > 1.3 * GIB > 4 * rounded.working_memory


def test_an_engine_without_corrections_is_held_against_the_release_alone(tmp_path: Path) -> None:
    run_recipe(corrected(), str(checkpoint("dense")), tmp_path / "out", 0, QUIET)
    found = verify(tmp_path / "out", "transformers", [list(range(40, 72))], threads=1)
    assert found.outcome == "agrees" and found.uninitialized == [], found.notes


def _both(name: str, source: Path, release: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return Checkpoint.open(source).read(name).float(), open_source(release, corrected=False).read(name).float()


def _hidden(source: object, ids: torch.Tensor) -> torch.Tensor:
    return Trunk(source, map_of(source)).forward(ids)  # type: ignore[arg-type]


def test_the_corrections_file_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(corrected(), str(checkpoint("dense")), out, 0, QUIET)
    config = json.loads((out / "eora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 32
    with safe_open(out / "eora" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {n.rpartition(".lora_")[2] for n in names} == {"A.weight", "B.weight"}
        assert file.get_tensor(min(names)).dtype == torch.bfloat16
    assert not any("mtp." in name for name in names), "no engine adds a correction to a draft head"


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("{files: {model: [mtp]}}", "plain name other than model"),
        ("{files: {'../x': [mtp]}}", "plain name other than model"),
        ("{files: {a: [text]}}", "text stays in model.safetensors"),
        ("{files: {a: [mtp], b: [mtp, vision]}}", "one file at most"),
        ("{dtype: {text: float16}}", "float16 is refused"),
        ("{dtype: {tower: bfloat16}}", "tower"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(export: str, says: str) -> None:
    text = f"name: t\nsteps:\n  - quantize: {{rules: [{{roles: [mlp.*], scheme: int4}}]}}\n  - export: {export}\n"
    with pytest.raises(RecipeError, match=says):
        parse_recipe(text, "t")
