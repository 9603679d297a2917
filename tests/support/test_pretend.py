"""The pretended device refuses what a GPU refuses: what the tests of devices rest on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECK = """
import torch
from tests.support.pretend import pretended

def refused(what, kind=RuntimeError):
    try:
        what()
    except kind:
        return True
    return False

with pretended() as device:
    ours, plain = torch.arange(6.0, device=device), torch.arange(6.0)
    assert ours.device == device and torch.equal((ours * 2 + torch.tensor(1.0)).cpu(), plain * 2 + 1)
    assert ours[torch.tensor([1, 4])].tolist() == [1, 4] and torch.tensor([3.0], device=device).device == device
    assert refused(lambda: ours + plain) and refused(lambda: torch.cat([plain, ours])) and refused(lambda: plain[ours.long()])
    assert refused(lambda: plain.add_(ours[0])) and refused(lambda: plain[0].add_(ours[0]))
    assert refused(lambda: torch.rand(3, device=device, generator=torch.Generator()))
    assert refused(ours.numpy, TypeError)
    weight = torch.ones(6, device=device, requires_grad=True)
    (weight * ours).square().sum().backward()
    assert torch.equal(weight.grad.cpu(), 2 * plain.square())
print("as strict as a GPU")
"""


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "as strict as a GPU" in done.stdout, done.stderr[-2000:]
