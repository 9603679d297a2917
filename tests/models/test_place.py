"""What a person asks for when they name a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwench.errors import UserError
from qwench.models import place
from qwench.models.place import CPU, Place, memory_is_told, multiplies_bfloat16, peak_vram, place_of


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bfloat16: bool = False) -> None:
    monkeypatch.setattr(place, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert place_of() == CPU == Place(torch.device("cpu"), torch.float32)
    with_gpus(monkeypatch, 2)
    assert place_of() == Place(torch.device("cuda", 0), torch.bfloat16)
    assert place_of("cpu") == CPU


def test_processors_compute_in_bfloat16_where_they_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0, bfloat16=True)
    assert place_of().says == place_of("cpu", "auto").says == ("cpu", "bfloat16")
    assert place_of("cpu", "float32") == CPU
    with_gpus(monkeypatch, 0)
    assert place_of("cpu", "auto") == CPU


@pytest.mark.parametrize(
    ("flags", "has"), [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx512f avx512_fp16 amx_tile", False)]
)
def test_what_the_kernel_says_of_a_processor(flags: str, has: bool, tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\nmodel name\t: X bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert multiplies_bfloat16(told) is has
    assert not multiplies_bfloat16(tmp_path / "absent")


def test_a_gpu_computes_in_bfloat16_and_a_processor_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert place_of("cuda:1").says == ("cuda:1", "bfloat16")
    assert place_of("cuda:1", "float32").says == ("cuda:1", "float32")
    assert place_of("cpu", "bfloat16").says == ("cpu", "bfloat16")
    assert place_of("cuda").exact.says == ("cuda:0", "float32")


@pytest.mark.parametrize(
    ("gpus", "device", "compute", "said"),
    [
        (1, "gpu", None, "no device 'gpu'"),
        (1, "cuda:x", None, "no device 'cuda:x'"),
        (1, "cuda:3", None, "sees 1 GPUs"),
        (0, "cuda", None, "cuda: "),
        (0, "cpu", "float16", "cannot compute in 'float16'"),
    ],
)
def test_what_cannot_be_had_is_refused(
    gpus: int, device: str, compute: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(UserError, match=said):
        place_of(device, compute)


def test_a_gpu_that_is_too_small_is_said_to_be_so() -> None:
    with pytest.raises(UserError, match="too little: Tried to allocate 7 GiB") as found, memory_is_told(CPU):
        raise torch.OutOfMemoryError("Tried to allocate 7 GiB.\nMore lines")
    assert "--device cpu" in found.value.mend
    assert peak_vram(CPU) is None
