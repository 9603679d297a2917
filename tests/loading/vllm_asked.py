"""vLLM's loader, asked about many folders in one process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from qwench.engines import vllm
from qwench.engines.process import WORKERS

SCRIPT = Path(__file__).with_name("vllm_loads.py")
SETTINGS = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def vllm_loads(folders: list[Path], room: Path) -> list[list[dict[str, Any]]]:
    """What vLLM did with each folder: one entry for each network that it built (see `vllm_loads`). `room`: an empty folder for the questions."""
    request, answer, said = room / "request.json", room / "answer.json", room / "said"
    request.write_text(json.dumps([str(folder.resolve()) for folder in folders]))
    with said.open("wb") as output:
        command = [str(vllm.python()), str(SCRIPT), str(WORKERS), str(request), str(answer)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | SETTINGS
        subprocess.run(command, stdout=output, stderr=output, env=environment, timeout=1200, check=False)
    assert answer.is_file(), said.read_text(errors="replace")[-4000:]
    found: list[list[dict[str, Any]]] = json.loads(answer.read_text())
    return found
