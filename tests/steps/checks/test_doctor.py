"""`qwench doctor` and `qwench verify --offline`: on folders, on the hub by headers alone, and what they say and exit with."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from typer.testing import CliRunner

from qwench.checkpoint.header import read_header
from qwench.checkpoint.headers import open_headers
from qwench.cli import app
from qwench.errors import CheckpointError, EngineError, VerificationError
from qwench.result import read_result
from qwench.steps.checks.doctor import examine
from qwench.steps.checks.proof import offline, offline_release
from tests.loading import others
from tests.loading.cases import make, release, variant

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """A hub with one release, a broken one unless another is asked for; the files whose headers were asked for. Its snapshots have no safetensors files."""
    kind = getattr(request, "param", "")
    published, asked = others.base(home, "dense", kind) if kind else make(home, "prefix-bound pattern"), list[str]()
    snapshot = tmp_path / "models--some--model" / "snapshots" / COMMIT

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert not any(pattern.endswith(".safetensors") for pattern in allow_patterns)
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors.index.json", "hf_quant_config.json"):
            if name in allow_patterns and (published / name).is_file():
                (snapshot / name).write_bytes((published / name).read_bytes())
        return str(snapshot)

    def header(self: object, repo: str, file: str, *, revision: str | None) -> SafetensorsFileMetadata:
        assert (repo, revision) == ("some/model", COMMIT)
        asked.append(file)
        entries = read_header(published / file)
        return SafetensorsFileMetadata(
            {}, {e.name: TensorInfo(e.dtype, list(e.shape), (e.start, e.start + e.nbytes)) for e in entries}
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)
    return asked


def test_a_release_on_the_hub_is_examined_by_its_headers(hub: list[str], home: Path) -> None:
    there, here = examine("some/model"), examine(str(make(home, "prefix-bound pattern")))
    assert set(hub) == {path.name for path in make(home, "prefix-bound pattern").glob("*.safetensors")}
    told = {name: [finding.what for finding in proof.findings] for name, proof in there.proofs.items()}
    assert told == {name: [finding.what for finding in proof.findings] for name, proof in here.proofs.items()}
    assert not there.good and there.mends == here.mends != ()
    assert any("headers only" in note for note in there.proofs["vllm"].notes) and not here.proofs["vllm"].notes
    with pytest.raises(CheckpointError, match="not a folder of yours"):
        examine("some/model", fix=True)
    source, values = open_headers("some/model")
    assert not values
    with pytest.raises(CheckpointError, match="only headers were"):
        source.read("mtp.fc.weight")


@pytest.mark.parametrize("hub", ["nvfp4-sidecar"], indirect=True)
def test_an_older_modelopt_release_on_the_hub_says_how_it_is_quantized(hub: list[str]) -> None:
    found = examine("some/model")
    assert hub == ["model.safetensors"] and found.complaints == ()
    assert found.proofs["vllm"].good and found.proofs["sglang"].good and not found.proofs["transformers"].good


def test_fix_makes_a_broken_release_load(home: Path, tmp_path: Path) -> None:
    folder = variant(make(home, "head's experts missing from ignore"), tmp_path / "m", lambda config: None)
    before = json.loads((folder / "config.json").read_text())
    assert not examine(str(folder)).good and json.loads((folder / "config.json").read_text()) == before
    found = examine(str(folder), fix=True)
    assert found.good and found.changed == ("config.json",) and found.mends
    assert examine(str(folder)).mends == ()


def test_what_a_config_promises_and_the_files_lack_is_told(home: Path, tmp_path: Path) -> None:
    def without_head(tensors: dict[str, object]) -> None:
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    found = examine(str(variant(release(home, "dense", "bf16"), tmp_path / "m", None, without_head)))
    assert not found.good and "MTP head is missing" in found.complaints[0][0] and "graft" in found.complaints[0][1]


def test_a_method_is_told_of_engine_by_engine(home: Path, tmp_path: Path) -> None:
    """Who reads it, who stops, and who was not played through: never nothing, and never `fine`."""
    other = variant(
        release(home, "dense", "bf16"),
        tmp_path / "m",
        lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    )
    found = examine(str(other))
    assert not found.good and {
        name: proof.findings[0].level for name, proof in found.proofs.items() if name in ("vllm", "sglang")
    } == {
        "vllm": "refuses",
        "sglang": "unknown",
    }
    assert "vLLM does not read 'bitsandbytes'" in found.proofs["vllm"].findings[0].what
    told = CliRunner().invoke(app, ["doctor", str(other)])
    assert told.exit_code == 3 and "use SGLang and transformers" in told.output
    assert "sglang 0.5.23 was not played through" in told.output and "sglang 0.5.19" not in told.output


def test_a_modelopt_release_is_examined(home: Path, tmp_path: Path) -> None:
    folder = others.make(tmp_path, "nvfp4: head missing from the list")
    told = CliRunner().invoke(app, ["doctor", str(folder)])
    assert told.exit_code == 3 and "Qwen3_5MTP stops" in told.output and "and unquantized, there is room for" in told.output
    assert "transformers does not read 'modelopt'" in told.output and "--fix` would mend" in told.output
    assert examine(str(folder)).complaints == ()


def test_commands_and_their_exit_codes(home: Path) -> None:
    good, broken = str(release(home, "dense", "int4")), str(make(home, "fc quantized by a broad target"))
    assert (fine := CliRunner().invoke(app, ["doctor", good])).exit_code == 0 and "nothing to complain of" in fine.output
    sick = CliRunner().invoke(app, ["doctor", broken])
    assert sick.exit_code == 3 and "mtp.fc is built as int4 g128" in sick.output and "--fix` would mend" in sick.output
    assert json.loads(CliRunner().invoke(app, ["doctor", broken, "--json"]).output)["engines"]["vllm"]["good"] is False
    refused = CliRunner().invoke(app, ["verify", broken, "--engine", "vllm", "--offline"])
    assert isinstance(refused.exception, VerificationError)
    older = CliRunner().invoke(app, ["verify", broken, "--engine", "sglang-0.5.19", "--offline", "--json"])
    assert older.exit_code == 0 and json.loads(older.output)["version"] == "0.5.19"


def test_proofs_are_kept_in_the_record_one_for_each_version(home: Path) -> None:
    folder = release(home, "dense", "int4")
    for engine in ("vllm", "sglang", "sglang-0.5.19", "vllm"):
        assert offline_release(folder, engine).good
    kept = read_result(folder).load_proofs
    assert sorted((proof.engine, proof.version) for proof in kept) == [
        ("sglang", "0.5.19"),
        ("sglang", "0.5.23"),
        ("transformers", "5.23"),  # the run itself asked the newest versions
        ("vllm", "0.32"),
    ]
    assert kept[-1].models == ["Qwen3_5ForConditionalGeneration", "Qwen3_5MTP"] and kept[-1].consumed == 221
    with pytest.raises(EngineError, match="no rules of 'ollama'"):
        offline(folder, "ollama")
