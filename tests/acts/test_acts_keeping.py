"""The keep mask: which tokens are left out, and why."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.capture import token_positions
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import REASONS, SkipRule, count_reasons
from wsae.core.errors import UserError


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_token_has_one_reason_by_definition(data):
    batch, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    first = data.draw(st.integers(0, seq - 1))
    special = data.draw(st.sets(st.integers(0, 5), max_size=3))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(0, 9), min_size=batch * seq, max_size=batch * seq))
    )
    lengths = torch.tensor([data.draw(st.integers(1, seq)) for _ in range(batch)])
    ids = ids.view(batch, seq)
    rule = SkipRule(HarvestConfig(seq_len=seq, skip_first=first), special)
    positions = token_positions(torch.arange(seq) < lengths[:, None])
    reasons = rule.by_token(ids, positions)
    for b in range(batch):
        for p in range(seq):
            expected = (
                "padding"
                if p >= lengths[b]
                else "special"
                if int(ids[b, p]) in special
                else "first"
                if p < first
                else "kept"
            )
            assert REASONS[int(reasons[b, p])] == expected
            heard = REASONS[int(rule.by_token(ids, positions, ids > 6)[b, p])]
            unkept = expected == "kept" and int(ids[b, p]) <= 6
            assert heard == ("other roles" if unkept else expected)
    assert sum(count_reasons(reasons.flatten()).values()) == batch * seq


def test_a_token_is_a_sink_when_any_hook_exceeds_its_own_median():
    rule = SkipRule(HarvestConfig(sink_norm_ratio=10.0), [])
    reasons = torch.tensor([0, 0, 0, 0, 1], dtype=torch.int8)
    norms = {
        "a": torch.tensor([1.0, 1.0, 11.0, 1.0, 500.0]),
        "b": torch.tensor([7.0, 71.0, 7.0, 7.0, 7.0]),
    }
    rule.calibrate(norms, reasons)
    assert rule.medians == {"a": 1.0, "b": 7.0}
    assert rule.by_norm(norms, reasons).tolist() == [0, 4, 4, 0, 1]
    off = SkipRule(HarvestConfig(sink_norm_ratio=None), [])
    assert off.by_norm(norms, reasons).tolist() == reasons.tolist()


def test_a_first_batch_without_a_kept_token_is_refused():
    with pytest.raises(UserError, match="no token to calibrate on"):
        SkipRule(HarvestConfig(), []).calibrate(
            {"a": torch.ones(2)}, torch.tensor([1, 3], dtype=torch.int8)
        )
