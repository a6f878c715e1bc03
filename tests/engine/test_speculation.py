"""Guessing tokens changes how many steps there are, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from podquant.engine.request import Request
from tests.engine.test_engine import PENALTIES, PROMPTS, idle, params, run, running, tokens

pytestmark = pytest.mark.slow


def test_guessing_tokens_changes_none() -> None:
    """Greedy and drawn; in pages that run out, on two devices; with log-probabilities; beside what is not guessed."""
    repeating = [[5, 6, 7, 8, 5, 6, 7], *PROMPTS[1:]]
    hot = {"temperature": 0.7, "seed": 3, "max_tokens": 40}
    with running() as engine, running(speculative_num_draft_tokens=4, max_total_tokens=112, tp_size=2) as guessing:
        for asked in ({"max_tokens": 60}, hot | PENALTIES, hot):
            assert tokens(guessing, repeating, **asked) == tokens(engine, repeating, **asked)
        assert guessing.stats().num_preemptions > 0
        assert 0 < guessing.stats().num_accepted_tokens < guessing.stats().num_draft_tokens
        request = Request("scored", tuple(repeating[0]), params(max_tokens=60, logprobs=2, stop_token_ids=(10**6,)))
        found, expected = (
            [e for o in run(each, [request])["scored"] for e in o.logprobs] for each in (guessing, engine)
        )
        assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
        np.testing.assert_allclose([e.logprob for e in found], [e.logprob for e in expected], atol=1e-5)
        assert idle(guessing)
