"""`import vkv`: names that are loaded when first used, while the collector rests."""

import gc
import importlib
from types import ModuleType

import pytest
import vkv


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_rests_while_a_name_is_loaded(
    enabled: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is afterwards as it was, whatever comes of it."""
    seen = []
    load = importlib.import_module

    def watched(name: str, package: str | None = None) -> ModuleType:
        seen.append(gc.isenabled())
        if fails:
            raise ImportError(name)
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", watched)
    try:
        if not enabled:
            gc.disable()
        if fails:
            with pytest.raises(ImportError):
                vkv.__getattr__("SamplingParams")
        else:
            assert vkv.__getattr__("SamplingParams").__name__ == "SamplingParams"
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Mystery'"):
        vkv.__getattr__("Mystery")
    assert set(vkv.__all__) <= set(dir(vkv))
