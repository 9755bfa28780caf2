"""The paper's theory as code: geometries, closed form, losses, optima, and the ledger of its claims (float64)."""
