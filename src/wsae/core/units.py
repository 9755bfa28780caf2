"""Sizes and times as people read them."""


def duration(seconds: int | float) -> str:
    """Return seconds as `0.4 s`, `45 s`, `4 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n_bytes: int | float) -> str:
    """Return bytes as `512 B`, `1.5 KB`, `340 MB` or `2.1 GB` (powers of 1000)."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= step:
            value = n_bytes / step
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{n_bytes:.0f} B"
