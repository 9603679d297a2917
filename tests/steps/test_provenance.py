"""What a release says of its origin: every hash is of real bytes, a changed source is told, and nothing of this machine's folders is in it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from qwench.checkpoint.header import read_header
from qwench.checkpoint.hub import Located
from qwench.display import Report
from qwench.errors import CheckpointError
from qwench.recipe import Recipe, bundled, load_recipe, recipe_data
from qwench.result import read_result
from qwench.run import run_recipe
from qwench.steps import provenance
from qwench.steps.provenance import FileHash, differing, file_proof, read_provenance, release_hashes, seeds, source_proof
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, release)."""
    place = tmp_path_factory.mktemp("provenance")
    source = write_tiny(place / "private-folder" / "tiny", shards=3)
    run_recipe(load_recipe("int4"), str(source), place / "out", 1, QUIET, accept_any=True)
    return source, place / "out"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_that_the_run_wrote_is_there_with_its_hash(made: tuple[Path, Path]) -> None:
    _, release = made
    found = read_provenance(release)
    names = {p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()}
    assert {f.name for f in found.files} == names - {"result.json", "provenance.json"}
    for file in found.files:
        assert (file.sha256, file.bytes) == (sha256(release / file.name), (release / file.name).stat().st_size)


def test_it_says_what_made_the_release(made: tuple[Path, Path]) -> None:
    source, release = made
    found, result = read_provenance(release), read_result(release)
    assert found.recipe == recipe_data(load_recipe("int4"))
    assert (found.accept_any, found.threads, found.device) == (True, 1, "cpu")
    assert found.seconds == pytest.approx(result.run.seconds, abs=1e-3)
    assert {"python", "qwench", "torch", "transformers"} <= found.versions.keys()
    assert found.started <= found.finished
    assert {f.name: f.sha256 for f in found.source.files} == {
        p.name: sha256(p) for p in source.iterdir() if p.suffix in {".safetensors", ".json"}
    }
    text = (release / "provenance.json").read_text()
    assert "private-folder" not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


@pytest.mark.parametrize("name", sorted(bundled()))
def test_a_recipe_comes_back_from_its_data(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate(json.loads(json.dumps(recipe_data(recipe)))) == recipe


def test_seeds_are_named_by_their_place() -> None:
    data = {"calibration": {"seed": 42, "rows": 3}, "steps": [{"quantize": {"method": {"seed": 7}}}, {"export": {}}]}
    assert dict(seeds(data)) == {"calibration.seed": 42, "steps.0.quantize.method.seed": 7}


def test_a_sampled_hash_tells_a_changed_tensor_and_a_changed_header(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = made
    path = sorted(source.glob("*.safetensors"))[0]
    data, entries = bytearray(path.read_bytes()), read_header(path)
    large = max(entries, key=lambda entry: entry.nbytes)
    assert large.nbytes > 3 * provenance.SAMPLE
    copy = tmp_path / path.name

    def hashed(at: int | None) -> str:
        changed = bytearray(data)
        if at is not None:
            changed[at] ^= 1
        copy.write_bytes(changed)
        proof = file_proof(copy, whole=False)
        assert proof.how == "sampled"
        return proof.sha256

    whole = hashed(None)
    assert whole == hashed(None)
    assert hashed(large.start) != whole
    assert hashed(large.start + large.nbytes - 1) != whole
    assert hashed(large.start + large.nbytes // 2) == whole, "that is what `sampled` means: the middle is not read"
    small = min(entries, key=lambda entry: entry.nbytes)
    assert hashed(small.start) != whole
    data[8 : 8 + large.start] = data[8 : 8 + large.start].replace(b'"pt"', b'"tp"')
    assert hashed(None) != whole


def test_large_sources_are_sampled_and_small_files_are_not(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "WHOLE", 1000)
    how = {f.name: f.how for f in source_proof(Located(made[0], "tiny")).files}
    assert {name.endswith(".safetensors"): kind for name, kind in how.items()} == {True: "sampled", False: "whole"}


def test_the_hubs_own_hash_is_taken_from_its_cache(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / ("ab" * 32), tmp_path / "snapshots" / "c0"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"never read")
    (snapshot / "model.safetensors").symlink_to(blob)
    found = source_proof(Located(snapshot, "org/name", "c0")).files
    assert found == [FileHash(name="model.safetensors", bytes=10, sha256="ab" * 32, how="hub")]


def test_differences_name_the_file_and_what_is_wrong() -> None:
    def file(name: str, size: int = 5, sha: str = "aa", how: provenance.How = "whole") -> FileHash:
        return FileHash(name=name, bytes=size, sha256=sha, how=how)

    recorded = [file("a"), file("b"), file("c"), file("d", how="sampled"), file("e", how="hub", sha="ee")]
    found = [file("b", 7), file("c", sha="cc"), file("d", sha="dd"), file("e", sha="ee"), file("more")]
    said = differing(recorded, found)
    assert [line.split()[0] for line in said] == ["a", "b", "c"]
    assert "missing" in said[0]
    assert "7 bytes" in said[1] and "5 are recorded" in said[1]
    assert "cc" in said[2]
    assert differing([file("d", how="sampled")], [file("d", sha="dd", how="sampled")]) != []


def test_measurements_and_the_card_change_no_hash(made: tuple[Path, Path]) -> None:
    _, release = made
    before = release_hashes(release)
    (release / "README.md").write_text("later")
    (release / "card").mkdir()
    (release / "card" / "bytes.png").write_bytes(b"later")
    assert release_hashes(release) == before


def test_a_folder_without_provenance_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no provenance"):
        read_provenance(tmp_path)
    (tmp_path / "provenance.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="not a provenance"):
        read_provenance(tmp_path)
