"""The toy world: sparse features, superposition, and the trained toy model (paper Section 5.1)."""
