"""`python -m qwench.engines.workers.llama_server`: llama.cpp's own HTTP server out of the `xllamacpp` package, for machines that have no `llama-server`.

It takes the options of `llama-server` that `qwench.steps.publishing.launch` writes, and no others; it prints where it listens, and runs until it is stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]


def options(words: list[str]) -> argparse.Namespace:
    """The options; `-c`, `-m` ... as llama-server spells them."""
    parser = argparse.ArgumentParser(prog="llama_server", allow_abbrev=False)
    parser.add_argument("-m", dest="model", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("-md", dest="drafter")
    parser.add_argument("-ngl", dest="layers", type=int, default=0)
    parser.add_argument("-fa", dest="flash", default="auto", choices=["on", "off", "auto"])
    parser.add_argument("-c", dest="context", type=int, default=8192)
    parser.add_argument("-ctk", dest="keys")
    parser.add_argument("-ctv", dest="values")
    parser.add_argument("-np", dest="slots", type=int, default=1)
    parser.add_argument("-t", dest="threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--spec-type", choices=["draft-mtp"])
    parser.add_argument("--spec-draft-n-max", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    return parser.parse_args(words)


def parameters(given: argparse.Namespace) -> Any:
    """The same for the package."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = given.model, given.context, given.slots
    params.n_gpu_layers, params.use_jinja = given.layers, given.jinja
    params.hostnames, params.port = [given.host], given.port
    params.warmup, params.fit_params, params.endpoint_metrics = False, False, True
    if given.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    if given.mmproj:
        params.mmproj.path, params.mmproj_use_gpu = given.mmproj, given.layers > 0
    if given.spec_type:
        params.load_mtp = given.drafter is None
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = given.spec_draft_n_max
        if given.drafter:
            params.speculative.draft.mparams.path = given.drafter
    for name, kind in (("cache_type_k", given.keys), ("cache_type_v", given.values)):
        if kind:
            setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}"))
    return params


def main() -> None:
    server = xllamacpp.Server(parameters(options(sys.argv[1:])))
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
