"""vLLM imports, and with it the image processors that it needs for every checkpoint of this architecture."""

import torchvision
import vllm

print("vllm", vllm.__version__, "torchvision", torchvision.__version__)
