import json

import pytest
import yaml

from qwench.errors import CheckpointError
from qwench.result import Estimate, Speculation, write_result
from qwench.steps.cards.card import write_card
from qwench.steps.cards.engines import engine_sections, launch_command
from qwench.steps.cards.values import error_rows, with_error
from tests.steps.releases import estimate, evaluation, release, row, verification, weight

CONFIG = {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}


def card(folder, result):
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    write_result(folder, result)
    return write_card(folder).read_text(encoding="utf-8")


def front(text):
    _, header, _ = text.split("---\n", 2)
    return yaml.safe_load(header), header


def test_front_matter_is_what_hubs_read(tmp_path):
    data, header = front(card(tmp_path, release()))
    assert data["base_model"] == "Somebody/Base-9B" and data["base_model_relation"] == "quantized"
    assert (
        data["license"] == "apache-2.0"
        and data["library_name"] == "transformers"
        and data["pipeline_tag"] == "image-text-to-text"
    )
    assert data["tags"] == ["qwen3_5", "compressed-tensors", "nvfp4", "mtp", "speculative-decoding", "qwench"]
    assert "quantized_by" not in data and "# quantized_by: YOUR-NAME-HERE" in header


def test_front_matter_of_a_local_text_only_source(tmp_path):
    source = release().source.model_copy(update={"name": "/home/someone/secret/my-tune", "license": None, "revision": None})
    text = card(
        tmp_path, release(source=source, precision=[row("mlp", "int4 g128", 10, 40)], errors=[weight("mlp.up", 0, "int4 g128")])
    )
    data, header = front(text)
    assert data["base_model"] == "my-tune" and "license" not in data and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["qwen3_5", "compressed-tensors", "int4", "qwench"]
    assert "# base_model:" in header and "# license:" in header
    assert "secret" not in text and "](http" not in text.split("##")[0] and "revision" not in text


def test_measured_numbers_stand_beside_their_text(tmp_path):
    text = card(tmp_path, release())
    for line in (
        "*modules held out*: 7 documents of 97 tokens, 672 positions, computed in float32",
        "| KL, mean | | 0.0213 ± 0.0011 |",
        "| KL, 99% of tokens at most | | 0.232 |",
        "| KL, 99.9% of tokens at most | | 0.894 |",
        "| KL, largest | | 3.92 |",
        "| perplexity | 6.213 ± 0.313 | 6.319 ± 0.324 |",
        "| negative log-likelihood, release minus source (nats) | | 0.0169 ± 0.0021 |",
        "| same most likely token | | 94.31% ± 0.41% |",
        "| 1 | 87.1% ± 1.1% | 86.1% ± 1.1% |",
        "| 2 | 69.3% ± 1.2% | 68.0% ± 1.2% |",
        "| mlp | nvfp4 g16 | 2 | 0.0008 | 0.058 | 9.00% |",
        "| attention | nvfp4 g16 | 1 | 0.0008 | 0.033 | 9.00% |",
        "| attention | BF16 | 3 | 7k | 100 B |",
        "70.0 kB became **37.5 kB** (53.6%), 8.57 bits per parameter.",
        "| `model-00002-of-00002.safetensors` | 6.50 kB |",
    ):
        assert line in text, line
    assert "ab" * 32 in text and "cd" * 32 in text and "not measured" not in text.lower()


def test_what_was_not_measured_is_said(tmp_path):
    text = card(tmp_path, release(evaluation=None))
    assert text.count("| not measured |") == 4 and "Not measured." in text and "acceptance was not measured" in text
    assert "±" not in text and "divergence.png" not in text and not (tmp_path / "card" / "divergence.png").exists()


def test_acceptance_of_a_source_without_mtp(tmp_path):
    text = card(tmp_path, release(evaluation=evaluation(acceptance_source=None)))
    assert "| 2 | not measured | 68.0% ± 1.2% |" in text
    without = release(
        precision=[row("mlp", "nvfp4 g16", 10, 40)], evaluation=evaluation(acceptance_source=None, acceptance_release=None)
    )
    assert "no MTP head: no speculation" in card(tmp_path, without)


def speculation(accepted, **changes):
    values = dict(
        drafts=2, prompts=9, prompt_length=31, prompts_sha256="ef" * 32, tokens=57, temperature=0.0, top_k=0, top_p=1.0, seed=0, rounds=1234,
        drafted=2468, accepted=accepted, by_position=[estimate(0.7123, 0.0211), estimate(0.5134, 0.0312)], mean_length=estimate(2.2257, 0.0613),
        seconds_one=0.4, seconds_window=0.5, seconds_head=0.05, unsteadiness=1.2, speedup=1.4838, threads=6,
    )  # fmt: skip
    return Speculation(**values | changes)


def test_writing_with_drafts_is_told_where_it_was_measured(tmp_path):
    measured = evaluation(speculation_source=speculation(1600), speculation_release=speculation(1512, speedup=1.3911))
    text = card(tmp_path, release(evaluation=measured))
    for line in (
        "each model wrote 57 tokens greedily after each of 9 beginnings of 31 tokens, its head drafting 2 at a time",
        "| drafted | 2,468 | 2,468 |\n| accepted | 1,600 | 1,512 |",
        "| accepted at position 2 | 51.3% ± 3.1% | 51.3% ± 3.1% |",
        "| tokens per forward of the trunk | 2.23 ± 0.06 | 2.23 ± 0.06 |",
        "| expected speedup | 1.48 | 1.39 |",
        "our own reference decoder on 6 threads",
    ):
        assert line in text, line
    assert "ef" * 32 in text
    busy = evaluation(speculation_release=speculation(1512, unsteadiness=1.9))
    assert "| expected speedup | not measured | about 1.5 (busy machine) |" in card(tmp_path, release(evaluation=busy))
    one_side = card(tmp_path, release(evaluation=evaluation(speculation_release=speculation(1512, temperature=0.7, top_k=20))))
    assert "| accepted | not measured | 1,512 |" in one_side and "at temperature 0.7, top-p 1, top-k 20" in one_side
    assert "each model wrote" not in card(tmp_path, release())


def test_pictures_are_drawn_and_stale_ones_removed(tmp_path):
    text = card(tmp_path, release())
    for name in ("divergence.png", "error_by_layer.png", "bytes.png"):
        assert (tmp_path / "card" / name).read_bytes().startswith(b"\x89PNG") and f"](card/{name})" in text
    card(tmp_path, release(evaluation=None))
    assert {p.name for p in (tmp_path / "card").iterdir()} == {"error_by_layer.png", "bytes.png"}


def test_a_verified_engine_gets_a_command_and_an_unverified_one_a_line(tmp_path):
    agrees = verification("vllm", "agrees", mean_kl=3.1e-6, positions=415, tolerance_kl=1e-4)
    text = card(tmp_path, release(verifications=[agrees]))
    assert (
        "Verified with version 9.87: 1234 tensors consumed, mean KL to our own reading of the files 3.1e-06 nats over 415 positions"
        in text
    )
    assert f"vllm serve {tmp_path.name} --dtype bfloat16" in text
    assert """--speculative-config '{"method": "mtp", "num_speculative_tokens": 2}'""" in text
    assert "### Transformers\n\nNot verified." in text and "from_pretrained" not in text
    assert "SGLang has no loader for NVFP4 weight-only" in text and "sglang.launch_server" not in text


@pytest.mark.parametrize(
    ("outcome", "said", "command"),
    [
        ("agrees", "Verified", True),
        ("loads", "not proved", True),
        ("disagrees", "disagrees", False),
        ("failed", "failed", False),
    ],
)
def test_outcomes(outcome, said, command):
    sections = engine_sections(release(verifications=[verification("vllm", outcome, notes=["no kernel here"])]), "r")
    vllm = next(s for s in sections if s["title"] == "vLLM")
    assert said in vllm["status"] and bool(vllm["command"]) == command and vllm["notes"] == ["No kernel here."]


def test_notes_are_sentences_that_begin_with_the_engine_s_own_name():
    notes = ["vllm computed in bfloat16", "vllms are many", "drops g_idx."]
    sections = engine_sections(release(verifications=[verification("vllm", "agrees", notes=notes)]), "r")
    assert next(s for s in sections if s["title"] == "vLLM")["notes"] == [
        "vLLM computed in bfloat16.",
        "Vllms are many.",
        "Drops g_idx.",
    ]


def test_the_latest_verification_of_an_engine_counts():
    sections = engine_sections(release(verifications=[verification("vllm", "failed"), verification("vllm", "agrees")]), "r")
    assert next(s for s in sections if s["title"] == "vLLM")["status"].startswith("Verified")


def test_no_speculation_without_a_head():
    command, _ = launch_command("vllm", release(precision=[row("mlp", "BF16", 1, 1)]), "r")
    assert command == "vllm serve r --dtype bfloat16"


@pytest.mark.parametrize(("role", "scheme", "wrong"), [("expert.up", "nvfp4 g16", True), ("mtp.expert.up", "int4 g128 asym", True),
                                                       ("expert.up", "int4 g128", False), ("shared.up", "nvfp4 g16", False)])  # fmt: skip
def test_transformers_is_not_recommended_where_it_reads_experts_wrongly(role, scheme, wrong):
    for outcomes in ([], [verification("transformers", "loads")]):
        sections = engine_sections(release(errors=[weight(role, 0, scheme)], verifications=outcomes), "r")
        section = next(s for s in sections if s["title"] == "Transformers")
        assert ("reads such experts wrongly" in " ".join([section["status"], *section["notes"]])) == wrong
        assert bool(section["command"]) == (bool(outcomes) and not wrong)


def test_round_trip_by_component_and_scheme():
    errors = [
        weight("mlp.up", 0, mean=1e-3, largest=0.1),
        weight("mlp.down", 1, mean=3e-3, largest=0.3),
        weight("mlp.up", 1, "int8 g128"),
    ]
    rows = error_rows(errors)
    assert [(r["component"], r["scheme"], r["tensors"], r["mean_abs"], r["max_abs"]) for r in rows] == [
        ("mlp", "nvfp4 g16", 2, "0.002", "0.3"),
        ("mlp", "int8 g128", 1, "0.0008", "0.05"),
    ]


@pytest.mark.parametrize(
    ("given", "factor", "unit", "expected"),
    [
        (estimate(0.021337, 0.00114), 1, "", "0.0213 ± 0.0011"),
        (estimate(6.2134, 0.313), 1, "", "6.21 ± 0.31"),
        (estimate(123.4, 17.0), 1, "", "123 ± 17"),
        (estimate(0.5, 0.0999), 1, "", "0.50 ± 0.10"),
        (estimate(0.94313, 0.0041), 100, "%", "94.31% ± 0.41%"),
        (estimate(1.0, 0.0), 100, "%", "100% ± 0%"),
    ],
)
def test_digits_follow_the_standard_error(given: Estimate, factor, unit, expected):
    assert with_error(given, factor, unit) == expected


def test_card_and_report_come_from_the_record_and_the_config_alone(tmp_path):
    """A folder of these two files gives the same page, word by word, as one with everything else in it."""
    written = []
    for place in ("one", "other"):
        folder = tmp_path / place / "Name"
        folder.mkdir(parents=True)
        if place == "other":
            for name in (
                "model.safetensors",
                "provenance.json",
                "tokenizer.json",
                "chat_template.jinja",
                "eora/adapter_config.json",
                "README.md",
            ):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(b"not read")
        found = [verification("vllm", "agrees"), verification("transformers", "loads")]
        card(folder, release(verifications=found))
        pictures = [path.read_bytes() for path in sorted((folder / "card").iterdir())]
        written.append(
            [
                (folder / "README.md").read_text(encoding="utf-8"),
                (folder / "report.html").read_text(encoding="utf-8"),
                *pictures,
            ]
        )
    assert written[0] == written[1] and len(written[0]) == 5


def test_errors_of_the_user(tmp_path):
    with pytest.raises(CheckpointError, match=r"no result\.json"):
        write_card(tmp_path)
    write_result(tmp_path, release())
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_card(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not JSON"):
        write_card(tmp_path)
