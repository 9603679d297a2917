"""llm-compressor imports, with the versions that it pins."""

import compressed_tensors
import llmcompressor
import torch
import transformers

print(
    "llm-compressor", llmcompressor.__version__, "compressed-tensors", compressed_tensors.__version__,
    "transformers", transformers.__version__, "torch", torch.__version__,
)  # fmt: skip
