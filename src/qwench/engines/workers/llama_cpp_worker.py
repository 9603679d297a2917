"""Ask llama.cpp: `python llama_cpp_worker.py FOLDER`; see `qwench.engines.base` for what lies in FOLDER.

Log-probabilities come from its C interface, which has them for every position; greedy tokens, drafts of the MTP head and images from its server, which runs in this
process. llama.cpp loads no file in which a tensor is missing, has another shape or has a name that it does not know; those that it knows and has no use for it names.
"""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]
from answering import run_worker  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from llama_cpp_library import Model  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from numpy.typing import NDArray
from PIL import Image

SPARE = 64
"""Positions of the context behind the longest row and what is generated."""


def serve(request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """The rows; then, from one server each, tokens, tokens with drafts, and images."""
    path, tower = find(Path(request["folder"]))
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    model = Model(path, max(len(row) for row in request["rows"]), request["threads"])
    told["ignored"] = dict.fromkeys(model.unused, "llama.cpp says that it has no use for it")
    told["consumed"] = [name for name in names if name not in model.unused]
    for number, row in enumerate(request["rows"]):
        np.savez(folder / f"row{number}.npz", **arrays(model.logits(row)[:-1], request["top_k"]))
    model.close()
    plain = written(start(path, request), request["rows"][:1], request["generate"])
    told["generated"] = plain[0]["tokens"]
    drafter = None if any(".nextn." in name for name in names) else draft_file(path)
    if request["speculate"] and (drafter is not None or any(".nextn." in name for name in names)):
        told["speculation"] = speculation(start(path, request, drafts=request["speculate"], drafter=drafter), request)
    if request["image"] and tower is not None:
        told["image"] = images(start(path, request, tower=tower))


def draft_file(path: Path) -> Path | None:
    """The head that belongs to a file without one: `mtp-NAME-Q8_0.gguf` beside `NAME-trunk-Q8_0.gguf`."""
    beside = path.with_name(f"mtp-{path.name.replace('-trunk-', '-')}")
    return beside if beside.is_file() else None


def find(place: Path) -> tuple[Path, Path | None]:
    """The model and its tower. Raises ValueError where it is not clear which file is meant."""
    if place.is_file():
        return place, next(iter(sorted(place.parent.glob("mmproj*.gguf"))), None)
    models = [p for p in sorted(place.glob("*.gguf")) if not p.name.startswith(("mmproj", "mtp-", "imatrix"))]
    if len(models) != 1:
        raise ValueError(
            f"{place} holds {len(models)} GGUF models: {', '.join(p.name for p in models) or 'none'}; name the file"
        )
    return models[0], next(iter(sorted(place.glob("mmproj*.gguf"))), None)


def arrays(logits: NDArray[np.float32], top_k: int | None) -> dict[str, Any]:
    """Log-probabilities, in float32."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    logprobs = (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)
    if top_k is None:
        return {"logprobs": logprobs}
    tokens = np.argsort(-logprobs, -1, kind="stable")[:, :top_k]
    return {"logprobs": np.take_along_axis(logprobs, tokens, -1), "tokens": tokens}


GREEDY = {"temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True, "ignore_eos": True}


def start(path: Path, request: dict[str, Any], tower: Path | None = None, drafts: int = 0, drafter: Path | None = None) -> Any:
    """llama.cpp's server in this process.

    Args:
        tower: the file of the tower, where it is to see images.
        drafts: tokens that the MTP head drafts in each round; 0: none.
        drafter: the file of the head, where `path` has none.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = max(len(request["rows"][0]) + request["generate"] + SPARE, 1024)
    params.n_parallel, params.warmup, params.fit_params, params.endpoint_metrics, params.verbosity = 1, False, False, True, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    if tower is not None:
        params.mmproj.path, params.mmproj_use_gpu = str(tower), False
    if drafts:
        params.load_mtp = drafter is None
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max, params.speculative.draft.p_min = drafts, 0.0  # no draft is held back, however unsure
    if drafter is not None:
        params.speculative.draft.mparams.path = str(drafter)
    return xllamacpp.Server(params)


def written(server: Any, rows: list[list[int]], count: int) -> list[dict[str, Any]]:
    """What it writes greedily after each row."""
    return [post(server, "/completion", prompt=row, n_predict=count, **GREEDY) for row in rows]


def post(server: Any, path: str, **question: Any) -> dict[str, Any]:
    asked = urllib.request.Request(
        server.listening_address + path, data=json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as reply:
        answer: dict[str, Any] = json.loads(reply.read())
    return answer


def speculation(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Its own counters after all rows: rounds (`drafts`), tokens drafted and accepted, accepted by draft position; and what it wrote."""
    told = written(server, request["rows"], request["generate"])
    with urllib.request.urlopen(server.listening_address + "/metrics") as reply:
        text = reply.read().decode()
    places = re.findall(r'^llamacpp:spec_decode_num_accepted_tokens_per_pos_total\{position="(\d+)"\} (\S+)', text, re.M)
    by_position = {int(place): int(float(count)) for place, count in places}
    return {
        **{name: counter(text, key) for name, key in COUNTERS.items()},
        "accepted_by_position": [by_position.get(place, 0) for place in range(request["speculate"])],
        "written": [reply["tokens"] for reply in told],
    }


COUNTERS = {"drafts": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
"""Our names -> those in `llamacpp:spec_decode_num_*_total`."""


def counter(metrics: str, key: str) -> int:
    """One counter; 0 where nothing was ever counted."""
    found = re.search(rf"^llamacpp:spec_decode_num_{key}_total (\S+)", metrics, re.M)
    return int(float(found[1])) if found else 0


def images(server: Any) -> dict[str, Any]:
    """One question with two different images, and without any: how many tokens an image takes, and whether the answer's probabilities notice it."""
    told = [_asked(server, picture) for picture in (_picture(0), _picture(1), None)]
    tokens = told[0]["usage"]["prompt_tokens"] - told[2]["usage"]["prompt_tokens"]
    said = [[(t["id"], round(t["logprob"], 4)) for t in reply["choices"][0]["logprobs"]["content"]] for reply in told]
    return {"tokens": tokens, "generated": [token for token, _ in said[0]], "differs": said[0] != said[1]}


def _asked(server: Any, picture: bytes | None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "what is this"}]
    if picture is not None:
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    return post(server, "/v1/chat/completions", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=5)


def _picture(seed: int) -> bytes:
    """The same pixels that the other engines are shown."""
    pixels = np.random.default_rng(seed).integers(0, 256, (288, 320, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    run_worker(f"xllamacpp {xllamacpp.__version__}", serve)
