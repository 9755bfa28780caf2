"""What was measured on: processor, memory, versions and commit."""

import os
import platform
from pathlib import Path

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of a processor that multiplies bf16 itself; others emulate it, several times slower than fp32."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe(root: Path | None = None) -> dict[str, str]:
    """Return the processor's name, those of its features that matter here, cores, memory, Python and commit."""
    model, flags = processor()
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "cores": str(os.cpu_count() or 1),
        "memory_gib": f"{pages / 2**30:.0f}",
        "python": platform.python_version(),
        "commit": commit(root or Path(__file__).resolve().parent),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Return the processor's name and its feature flags, as the kernel tells them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = dict(reversed([_pair(line) for line in lines if ":" in line]))
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def commit(start: Path) -> str:
    """Return the commit checked out around `start`, read from .git, or "unknown"; changes beside it are not seen."""
    for place in (start, *start.parents):
        git = place / ".git"
        if (
            git.is_dir() and (place / "src" / "wsae").is_dir()
        ):  # ours, not one around an environment
            return _head(git) or "unknown"
    return "unknown"


def _head(git: Path) -> str:
    """Return what HEAD points to, through a loose or a packed reference; "" where that cannot be read."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        lines = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
