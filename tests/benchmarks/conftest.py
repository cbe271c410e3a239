"""No test of a benchmark waits for the machine's limits."""

import pytest


@pytest.fixture(autouse=True)
def limits_measured_in_no_time(quick_limits: None) -> None:
    """Seconds of all cores, twice in each run and more; `test_limits` tests measuring."""
