"""The suite's own check of types: shapes and dtypes of every function's first calls in a test."""

import pytest
import torch
import typecheck
from jaxtyping import TypeCheckError

from wsae.evals.latents import density_histogram

GOOD, FLAT_INT = torch.full((3,), 0.5, dtype=torch.float64), torch.tensor([1, 2, 3])


@pytest.mark.parametrize("_", ["first", "next"])
def test_a_wrong_dtype_is_found_at_first_calls_in_every_test(_: str) -> None:
    with pytest.raises(TypeCheckError, match="density"):
        density_histogram(FLAT_INT)  # type: ignore[arg-type]
    for _ in range(typecheck.CALLS - 1):
        density_histogram(GOOD)
    with pytest.raises(RuntimeError):  # no longer checked: torch itself complains
        density_histogram(FLAT_INT)  # type: ignore[arg-type]
