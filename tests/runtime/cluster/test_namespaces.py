"""Two machines whose cable is cut in the middle of migrations, made of network namespaces."""

import subprocess
import sys
from pathlib import Path

import pytest
import two_machines

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
_ATTACK = Path(__file__).parents[2] / "attacks" / "namespaces.py"


def test_a_cable_that_is_cut_in_the_middle_of_migrations_costs_no_token() -> None:
    """`tests/attacks/namespaces.py` does so for longer, and in other ways."""
    if why := two_machines.why_not():
        pytest.skip(why)
    command = [sys.executable, str(_ATTACK), "--rounds", "1", "--cuts", "copy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "all tokens right" in done.stdout
