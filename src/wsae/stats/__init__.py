"""Streaming statistics: moments and counts exact under any split, a covariance in float64, tables by class."""
