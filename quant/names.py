"""Names of tensors in a checkpoint, as the model calls them.

`transformers` renames tensors while it loads: published names of older layouts, and those of base
models with or without their prefix. Its rules know dense weights only, so the name of a quantised
layer is found by that of the weight it stands for.
"""

from collections.abc import Collection

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class ModelNames:
    """Gives tensors of a checkpoint the names that a model has for them.

    Args:
        model: before any of its layers makes way for a quantised one.
        parts: the last parts of names of quantised layers' tensors.
    """

    def __init__(self, model: PreTrainedModel, parts: Collection[str]) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._dense = model.state_dict()
        self._parts = parts

    def __call__(self, name: str) -> str:
        """The model's name for the tensor that the checkpoint calls `name`.

        A weight that the model puts together of several, as those of experts, is renamed alone.
        """
        layer, _, part = name.rpartition(".")
        if part not in self._parts:
            return self._renamed(name)
        renamed = self._renamed(f"{layer}.weight")
        return f"{renamed.removesuffix('.weight')}.{part}"

    def _renamed(self, name: str) -> str:
        found, converted = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._dense
        )
        if converted is None:
            return found
        alone, _ = rename_source_key(name, self._renamings, [])
        base = f"{self._prefix}."
        if found.startswith(base) == alone.startswith(base):
            return alone
        return f"{base}{alone}" if found.startswith(base) else alone.removeprefix(base)
