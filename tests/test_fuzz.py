"""fuzz.py in small: 2,000 cases of damaged and unusual input, each of which ends right or in an error with a name."""

import pytest
from conftest import SEED
from fuzz import KINDS, run
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

EACH = 2000 // len(KINDS)
HOW = {
    "max_examples": EACH,
    "deadline": None,  # fuzz.py has its own
    "database": None,  # a case is repeated by its number
    "phases": [Phase.generate],  # a smaller number is no simpler case
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_right_or_in_an_error_that_names_the_cause(kind):
    @seed(SEED)
    @settings(**HOW)
    @given(st.integers(0, 2**31))
    def holds(number):
        end, why = run(kind, number)
        again = f"python tests/fuzz.py --kind {kind} --first {number} --count 1"
        assert end in ("right", "refused"), f"{again}: {end}: {why}"

    holds()
