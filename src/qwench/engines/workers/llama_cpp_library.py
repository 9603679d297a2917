"""llama.cpp's C interface, as much of it as log-probabilities take: load, decode, logits, and what it said meanwhile.

Structures are declared up to the last field that is set here, with room behind; they are made by llama.cpp's own `*_default_params`, and handed back by value, where a
longer structure than expected does no harm. Whether the fields lie where they are declared shows in the defaults: `open_library` looks at them and refuses otherwise.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOM = 1024
"""Bytes behind the declared fields: more than the rest of any of the structures."""
UNUSED = re.compile(r"model has unused tensor (\S+)")


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p), ("buffers", c_void_p), ("gpu_layers", c_int32), ("split_mode", c_int), ("load_mode", c_int), ("lazy_mode", c_int),
        ("main_gpu", c_int32), ("tensor_split", c_void_p), ("progress", c_void_p), ("progress_data", c_void_p), ("overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool), ("no_alloc", c_bool),
        ("load_mtp", c_bool), ("rest", c_uint8 * ROOM),
    )  # fmt: skip


class ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32), ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32),
        ("rest", c_uint8 * ROOM),
    )  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
POINTERS = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory")


def open_library() -> Any:
    """The shared library of the installed package. Raises RuntimeError where its structures are not those declared here."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.llama_model_default_params.restype = ModelParams
    library.llama_context_default_params.restype = ContextParams
    for name in POINTERS:
        getattr(library, name).restype = c_void_p
    library.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
    library.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    library.llama_decode.argtypes = [c_void_p, Batch]
    library.llama_batch_init.argtypes, library.llama_batch_init.restype = [c_int32, c_int32, c_int32], Batch
    library.llama_batch_free.argtypes = [Batch]
    library.llama_get_logits_ith.argtypes, library.llama_get_logits_ith.restype = [c_void_p, c_int32], POINTER(c_float)
    library.llama_memory_clear.argtypes = [c_void_p, c_bool]
    for name in ("llama_model_get_vocab", "llama_vocab_n_tokens", "llama_get_memory", "llama_free", "llama_model_free"):
        getattr(library, name).argtypes = [c_void_p]
    context, model = library.llama_context_default_params(), library.llama_model_default_params()
    seen = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max, context.n_threads, context.n_threads_batch)
    flags = (model.vocab_only, model.check_tensors, model.use_extra_bufts, model.no_host, model.no_alloc, model.load_mtp)
    if seen != (512, 2048, 512, 1, 4, 4) or flags != (False, False, True, False, False, False):
        raise RuntimeError(f"this version of xllamacpp has other structures than the worker knows: {seen}, {flags}")
    return library


class Model:
    """A loaded file.

    Attributes:
        said: what llama.cpp wrote while it loaded.
        unused: tensors of the file that it has no use for.
        vocabulary: tokens.

    Raises:
        ValueError: it does not load; its own words say why.
    """

    def __init__(self, path: Path, length: int, threads: int) -> None:
        self._library, self.said = open_library(), list[str]()
        self._log = LOG(lambda _level, text, _data: self.said.append(text.decode(errors="replace")))  # kept: C holds on to it
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()
        settings = self._library.llama_model_default_params()
        settings.load_mtp, settings.gpu_layers = True, 0
        self._model = self._library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError("llama.cpp does not load it: " + " ".join(self._complaints()))
        self.unused = [found[1] for line in self.said if (found := UNUSED.search(line))]
        self.vocabulary: int = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._context = self._library.llama_init_from_model(self._model, self._settings(length, threads))
        if not self._context:
            raise ValueError("llama.cpp makes no context for it: " + " ".join(self._complaints()))

    def _settings(self, length: int, threads: int) -> ContextParams:
        settings: ContextParams = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, length)
        settings.n_threads = settings.n_threads_batch = threads
        return settings

    def _complaints(self) -> list[str]:
        lines = "".join(self.said).splitlines()
        return [line.strip() for line in lines if "error" in line or "fail" in line][-3:]

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        """Logits [length, vocabulary] of one row, which is the whole of the context."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = self._library.llama_batch_init(len(row), 0, 1)
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(row)
        if code := self._library.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode returns {code}: " + " ".join(self._complaints()))
        found = np.empty((len(row), self.vocabulary), np.float32)
        for i in range(len(row)):
            found[i] = np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, i), (self.vocabulary,))
        self._library.llama_batch_free(batch)
        return found

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
