"""Python that runs a release, for engines that are libraries: what a card prints, and what a test runs as it stands there.

transformers reads compressed-tensors with what it brings along, and AutoRound's files with auto-round installed; GPTQModel is asked itself, since it alone adds corrections (EoRA) in Python.
"""

from __future__ import annotations

from qwench.formats.adapter import FOLDER

LOADED = """\
tokenizer = AutoTokenizer.from_pretrained("{name}")
messages = [{{"role": "user", "content": "What does a quantized model trade away?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"""

TRANSFORMERS = """\
import torch
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", dtype=torch.bfloat16, device_map="auto")
"""

GPTQMODEL = """\
import torch
from gptqmodel import GPTQModel
{imports}from transformers import AutoTokenizer

model = GPTQModel.load("{name}", dtype=torch.bfloat16{adapter})
"""


def transformers_snippet(name: str, vision: bool) -> str:
    """A release through transformers; `vision`: its class takes images too."""
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    return TRANSFORMERS.format(auto=auto, name=name) + LOADED.format(name=name)


def auto_round_snippet(name: str, vision: bool) -> str:
    """The same with auto-round, which transformers finds by itself."""
    return "# pip install auto-round\n" + transformers_snippet(name, vision)


def gptqmodel_snippet(name: str, vision: bool, rank: int = 0) -> str:
    """A release through GPTQModel.

    Args:
        vision: it has a tower; GPTQModel then loads a processor of images, which needs torchvision.
        rank: of the corrections that are to be added; 0 for none. GPTQModel must be told it, and the folder that holds them: a local one.
    """
    head = GPTQMODEL.format(
        name=name,
        imports="from gptqmodel.adapter.adapter import Lora\n" * bool(rank),
        adapter=f', adapter=Lora(path="{name}/{FOLDER}", rank={rank})' if rank else "",
    )
    return f"# pip install gptqmodel{' torchvision' * vision}\n" + head + LOADED.format(name=name)
