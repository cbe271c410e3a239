"""Names of tensors in a checkpoint, as the model calls them.

`transformers` renames tensors while it loads: published names of older layouts, and those of base
models with or without their prefix. Its rules know dense weights only, so the name of a quantised
layer is found by that of the weight it stands for.
"""

import re
from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from .experts import ROLES, FusedExperts, Role


def published_names(model: PreTrainedModel, modules: Sequence[str]) -> tuple[str, ...]:
    """What checkpoints of a model call its modules with a weight of two dimensions."""
    marked = {f"{name}.weight": torch.full((1, 1), i) for i, name in enumerate(modules)}
    saved = revert_weight_conversion(model, marked)
    by_mark = {int(weight): name.removesuffix(".weight") for name, weight in saved.items()}
    return tuple(by_mark[i] for i in range(len(modules)))


def published_roles(model: PreTrainedModel, fused: FusedExperts, name: str) -> dict[Role, str]:
    """What checkpoints of a model call the linears of an expert; `name` is of all experts' module.

    Those of a model that was never published expert by expert have the names of their roles.
    """
    values: dict[Role, float] = {role: i + 1.0 for i, role in enumerate(ROLES)}
    inner = "gate_up_proj" if fused.gated else "up_proj"
    first = torch.tensor([[values["gate_proj"]], [values["up_proj"]]])[-2 if fused.gated else -1 :]
    marked = {
        f"{name}.{inner}": first.unsqueeze(0),  # [experts, out, in]
        f"{name}.down_proj": torch.full((1, 1, 1), values["down_proj"]),
    }
    roles: dict[Role, str] = {role: role for role in fused.roles}
    if fused.interleaved:
        return roles
    for saved, weight in revert_weight_conversion(model, marked).items():
        parts = saved.removesuffix(".weight").split(".")
        for role in fused.roles:
            if parts[-2] == "0" and weight.unique().tolist() == [values[role]]:
                roles[role] = parts[-1]
    return roles


def bind_to_weights(rules: Sequence[WeightTransform]) -> None:
    """Keep rules for dense weights from those of quantised ones, as `weight_packed`.

    Older versions of `transformers` look for the beginning of a name.
    """
    for rule in rules:
        whole = all(source.endswith(".weight") for source in rule.source_patterns)
        if isinstance(rule, WeightConverter) and whole:
            rule.compiled_sources = re.compile(rf"(?:{rule.compiled_sources.pattern})(?!\w)")


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
