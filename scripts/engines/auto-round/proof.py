"""auto-round imports, and so does what transformers asks it for when it opens a checkpoint."""

import auto_round
import torch
from auto_round.inference.convert_model import convert_hf_model

assert callable(convert_hf_model)
print("auto-round", auto_round.__version__, "torch", torch.__version__)
