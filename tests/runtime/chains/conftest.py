"""A zoo of a tiny llama and its fine-tunes, which the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import chains
import pytest
from vkv.runtime.blocks.zoo import BlockZoo


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("family")
    return chains.save_family(home, "llama", chains.LLAMA, num_hidden_layers=3)


@pytest.fixture(scope="session")
def tenants(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> BlockZoo:
    return chains.make_zoo(tmp_path_factory.mktemp("tenants"), family)


@pytest.fixture(scope="session")
def alone(family: dict[str, Path]) -> Iterator[chains.Alone]:
    found = chains.Alone(family)
    yield found
    found.close()
