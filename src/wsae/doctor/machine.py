"""What this machine has: versions, threads, free memory, free disk."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

from wsae.core.units import size
from wsae.doctor.check import Check


def check_versions() -> Check:
    """Name the versions a bug report needs."""
    shown = [f"Python {platform.python_version()}"]
    for name in ("wsae", "torch", "transformers", "numpy"):
        try:
            shown.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            shown.append(f"{name} missing")
    return Check("versions", "ok", ", ".join(shown))


def check_device(device: str) -> Check:
    """Name the device, and say when a faster one stands idle or threads are held back."""
    if device.startswith("cuda"):
        return Check(
            "device", "ok", f"{device}: {torch.cuda.get_device_name(torch.device(device))}"
        )
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    shown = f"{device}, {threads} of {cores} threads, {size(free_memory(device))} memory free"
    if torch.cuda.is_available():
        return Check(
            "device", "warn", shown, "a GPU is here: leave out --device, or use --device cuda"
        )
    if threads * 2 < cores:
        return Check("device", "warn", shown, "OMP_NUM_THREADS holds torch back; unset it")
    return Check("device", "ok", shown)


def free_memory(device: str) -> float:
    """Return the bytes a process can still take on `device`."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(float(line.split()[1]) * 1024, _cgroup_free())
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def held_memory(device: str) -> float:
    """Return the bytes this process holds on `device` now: on a CPU what is resident, libraries included."""
    if device.startswith("cuda"):
        return float(torch.cuda.memory_reserved(torch.device(device)))
    return _status("VmRSS:")


def peak_memory() -> float:
    """Return the most bytes of main memory this process has held at once."""
    return _status("VmHWM:")


def _status(field: str) -> float:
    """Return a line of /proc/self/status in bytes (0 where there is none: only Linux has it)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(field)), 0.0)


def free_disk(out: str) -> float:
    """Return the free bytes where `out` would be written."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    return float(shutil.disk_usage(place).free)


def _cgroup_free() -> float:
    """Return what a container's limit leaves, or infinity without one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = (root / "memory.current").read_text().strip()
        return float("inf") if limit == "max" else float(limit) - float(used)
    except (OSError, ValueError):
        return float("inf")
