"""Ask llama.cpp: `python llama_cpp_worker.py FOLDER`; see `qwench.engines.base` for what lies in FOLDER.

Log-probabilities come from its C interface, which has them for every position; greedy tokens, drafts of the MTP head and images from its server, which runs in this
process. llama.cpp loads no file in which a tensor is missing, has another shape or has a name that it does not know; those that it knows and has no use for it names.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import traceback
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]
from llama_cpp_library import Model  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from numpy.typing import NDArray
from PIL import Image

SPARE = 64
"""Positions of the context behind the longest row and what is generated."""


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"version": f"xllamacpp {xllamacpp.__version__}"}
    try:
        _serve(request, folder, answer)
    except Exception as error:
        traceback.print_exc()
        answer["refused"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _serve(request: dict[str, Any], folder: Path, answer: dict[str, Any]) -> None:
    """The rows; then, from one server each, tokens (with drafts, where they are asked for) and images."""
    path, tower = find(Path(request["folder"]))
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    model = Model(path, max(len(row) for row in request["rows"]), request["threads"])
    answer["ignored"] = dict.fromkeys(model.unused, "llama.cpp says that it has no use for it")
    answer["consumed"] = [name for name in names if name not in model.unused]
    for number, row in enumerate(request["rows"]):
        np.savez(folder / f"row{number}.npz", **arrays(model.logits(row)[:-1], request["top_k"]))
    model.close()
    server = start(path, request, tower=None, drafts=request["speculate"])
    told = post(server, "/completion", prompt=request["rows"][0], n_predict=request["generate"], **GREEDY)
    answer["generated"] = told["tokens"]
    if request["speculate"]:
        answer["speculation"] = speculation(told, server)
    del server
    if request["image"] and tower is not None:
        answer["image"] = images(start(path, request, tower=tower, drafts=0))


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


def start(path: Path, request: dict[str, Any], tower: Path | None, drafts: int) -> Any:
    """llama.cpp's server in this process."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = max(len(request["rows"][0]) + request["generate"] + SPARE, 1024)
    params.n_parallel, params.warmup, params.fit_params, params.endpoint_metrics, params.verbosity = 1, False, False, True, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    if tower is not None:
        params.mmproj.path, params.mmproj_use_gpu = str(tower), False
    if drafts:
        params.load_mtp = True
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = drafts
    return xllamacpp.Server(params)


def post(server: Any, path: str, **question: Any) -> dict[str, Any]:
    asked = urllib.request.Request(
        server.listening_address + path, data=json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as reply:
        answer: dict[str, Any] = json.loads(reply.read())
    return answer


def speculation(told: dict[str, Any], server: Any) -> dict[str, Any]:
    """Its own counters: of the answer, or where nothing was drafted, zeros."""
    timings = told["timings"]
    counted = {"drafted": timings.get("draft_n", 0), "accepted": timings.get("draft_n_accepted", 0)}
    with urllib.request.urlopen(server.listening_address + "/metrics") as reply:
        text = reply.read().decode()
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        if found := re.search(rf"^llamacpp:spec_decode_num_{name}_total (\S+)", text, re.M):
            counted[f"total_{name}"] = float(found[1])
    return counted


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
    main(Path(sys.argv[1]))
