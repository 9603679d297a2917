"""GPTQModel imports, with the torch that it did not ask for, and has the kernel that runs anywhere."""

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its own choice on two cores is one worker, fewer than its loader wants

import torch
from gptqmodel import BACKEND
from gptqmodel.version import __version__

assert hasattr(BACKEND, "TORCH")
print("gptqmodel", __version__, "torch", torch.__version__)
