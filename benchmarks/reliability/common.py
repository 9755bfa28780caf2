"""What the reliability scripts share: where the figures go, and how a long command is called."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PYTHON = sys.executable
WSAE = [PYTHON, "-m", "wsae.cli"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # loading by threads after a fork trips over PyTorch's thread pool
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def environment() -> dict[str, str]:
    """Return this process's environment, with one thread, no network and no GPU."""
    return os.environ | ENVIRONMENT


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Print a result as JSON, and write it to `path` if there is one."""
    text = json.dumps(result | {"machine": machine()}, indent=1)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
