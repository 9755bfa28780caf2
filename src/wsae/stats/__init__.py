"""Streaming statistics: moments and counts exact under any split, a covariance in float64."""

from wsae.stats.consistency import ConsistencyCounts
from wsae.stats.covariance import Covariance
from wsae.stats.moments import Moments, check_finite

__all__ = ["ConsistencyCounts", "Covariance", "Moments", "check_finite"]
