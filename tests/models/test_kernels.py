"""Kernels of flash-linear-attention: taken by transformers where they are installed, and kept from tensors that they cannot read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from qwench.models.kernels import FUNCTIONS, dense, kernels_for, moe, takes_kernels

FLA = """
def chunk_gated_delta_rule(q, k, v, g, beta, **rest):
    raise RuntimeError("a GPU kernel was handed a tensor of the processor")

def fused_recurrent_gated_delta_rule(q, k, v, g, beta, **rest):
    raise RuntimeError("a GPU kernel was handed a tensor of the processor")
"""
RUN = """
import torch
from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.models import map_of
from qwench.models.decoder import Decoder
from qwench.models.kernels import dense
from qwench.models.run import Trunk
chosen = dense.torch_chunk_gated_delta_rule
source = Checkpoint.open(checkpoint("dense"))
trunk = Trunk(source, map_of(source))
ids = torch.arange(5, 30)[None]
hidden = trunk.forward(ids)
again = Decoder(trunk).begin().read(ids[0].tolist())
print(float(hidden.double().sum()), torch.allclose(hidden[0], again, atol=1e-3), dense.torch_chunk_gated_delta_rule is chosen)
x = torch.ones(1, 2, 1, 4)
try:
    chosen(x, x, x, g=x[..., 0], beta=x[..., 0])
    print("plain")
except RuntimeError as error:
    print(error)
"""


def test_installed_kernels_are_not_handed_what_they_cannot_read(tmp_path: Path) -> None:
    """A package `fla` that fails like the real one on a processor changes nothing there, in one forward pass and token by token."""
    kernels = tmp_path / "fla" / "ops" / "gated_delta_rule"
    kernels.mkdir(parents=True)
    for folder in (kernels, kernels.parent, kernels.parent.parent):
        (folder / "__init__.py").write_text(FLA)
    said = []
    for extra in ([], [str(tmp_path)]):
        code = f"import sys; sys.path[:0] = {extra!r}\n{RUN}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.splitlines())
    assert said[0][0] == said[1][0] and said[0][0].split()[1:] == ["True", "True"]
    # the package was really found: whoever does not choose is handed its kernel
    assert said[0][1] == "plain" and said[1][1] == "a GPU kernel was handed a tensor of the processor"


def test_the_choice_of_transformers_is_put_back() -> None:
    before = {(module, name): getattr(module, name) for module in (dense, moe) for name in FUNCTIONS}
    x = torch.ones(2, 3)
    assert not takes_kernels(x) and not takes_kernels(x.bfloat16())
    with kernels_for(x):
        assert all(getattr(module, name) is chosen.__wrapped__ for (module, name), chosen in before.items())
    assert all(getattr(module, name) is chosen for (module, name), chosen in before.items())
