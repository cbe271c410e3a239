"""Those that lend and borrow are killed, stopped and told to leave, and memory is called back.

`python tests/attacks/lending_faults.py` is its long form.
"""

from collections.abc import Iterator

import lending_attack
import pytest
from lending_attack import LendingAttack
from vkv import LLM

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LendingAttack]:
    folder = tmp_path_factory.mktemp("model")
    lending_attack.save_model(folder)
    with LLM(folder, **lending_attack.OPTIONS) as llm:
        pool = lending_attack.items(llm)
    with lending_attack.attacked(folder, pool, seed=3) as attack:
        yield attack


@pytest.mark.parametrize(
    "fault", ["recall", "pause creditor", "kill creditor", "kill debtor", "stop creditor"]
)
def test_no_request_is_lost_and_nothing_is_left(attack: LendingAttack, fault: str) -> None:
    run = attack.run(fault)
    assert not attack.wrong, attack.wrong
    assert not run.errors
    if fault == "recall":
        assert run.moment == "loans"
        assert run.num_called_back > 0
