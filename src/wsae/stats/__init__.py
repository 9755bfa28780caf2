"""Streaming statistics, exact under any split."""

from wsae.stats.consistency import ConsistencyCounts
from wsae.stats.moments import Moments, check_finite

__all__ = ["ConsistencyCounts", "Moments", "check_finite"]
