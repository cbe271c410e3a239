"""What an `adapter_config.json` of PEFT says, and what of it is refused.

Source: the LoRA paper (arXiv:2106.09685), rank-stabilised scaling (arXiv:2312.03732), and PEFT's
documented format. A field that is not known is refused unless it is off: it might change a result.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ...vmem.errors import BadAdapter

CONFIG_NAME = "adapter_config.json"

# Fields that say how an adapter was trained or made, and nothing of what it computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # how the base's weight lies, which the base knows
        "inference_mode",
        "init_lora_weights",  # looked at apart
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # without use_qalora
        "revision",
    }
)
# Fields that change what is computed, each with what to do instead.
_REFUSED = {
    "use_dora": "DoRA scales the sum of both weights: merge it into the model",
    "use_qalora": "QALoRA pools its inputs: merge it into the model",
    "lora_bias": "biases of the low-rank products are not added: train without lora_bias",
    "modules_to_save": "whole modules are no adapter: merge it into the model",
    "layer_replication": "layers are not repeated: merge it into the model",
    "alora_invocation_tokens": "an activated LoRA begins within a prompt: train a plain one",
    "trainable_token_indices": "embeddings of tokens are not exchanged: merge it into the model",
    "target_parameters": "parameters that are no linear layers, such as a mixture's experts, are "
    "not adapted: merge it into the model",
    "megatron_config": "use an adapter of a model of transformers",
    "loftq_config": "LoftQ changes the base model as well: use an adapter made without it",
    "arrow_config": "Arrow routes tokens among adapters: load one of them",
    "use_bdlora": "block-diagonal LoRA is not known: merge it into the model",
}
# Of `init_lora_weights`: those that leave the base model as it is.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_PATTERNS = ("rank", "alpha")
_MOST_ALPHA = 1e30
_SUMS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What decides where an adapter acts, and how strongly.

    Attributes:
        folder: where it was read; named in errors.
        rank, alpha: where no pattern says otherwise.
        rank_stabilised: scale by alpha / sqrt(rank), not alpha / rank.
        rank_pattern, alpha_pattern: by a regular expression over the end of a module's name.
        target_modules: endings of names, a regular expression over whole names, or "all-linear".
        exclude_modules: endings, or a regular expression; None for none.
        layers: the layers that it acts in; None for all.
        layers_patterns: what a layer's number stands behind in names.
    """

    folder: Path
    rank: int
    alpha: float
    target_modules: str | tuple[str, ...]
    rank_stabilised: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] | None = None
    layers: frozenset[int] | None = None
    layers_patterns: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank of a module that it acts on."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's low-rank product is multiplied by."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets(self, module: str, *, is_head: bool = False) -> bool:
        """Whether it acts on a linear module of this name; `is_head`: the output layer."""
        excluded = self.exclude_modules
        if excluded is not None and _is_among(excluded, module):
            return False
        if self.target_modules == "all-linear":
            return not is_head and self._is_in_layers(module)
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return _is_among(self.target_modules, module) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf".*\.{pattern}\.(\d+)\." for pattern in self.layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(pattern, module):
                return int(found[1]) in self.layers
        return False


def read_config(folder: Path) -> LoraConfig:
    """The config in an adapter's folder. Raises BadAdapter, naming what cannot be."""
    path = folder / CONFIG_NAME
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadAdapter(
            f"there is no {path}; give the folder of a LoRA adapter as PEFT's save_pretrained "
            "writes it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path} cannot be read ({error}); save the adapter again") from error
    if not isinstance(said, dict):
        raise BadAdapter(f"{path} holds {type(said).__name__}, and no fields; save it again")
    _check(path, said)
    return _config(path, said)


def _check(path: Path, said: Mapping[str, Any]) -> None:
    """Refuse what would be computed otherwise here."""
    if said.get("peft_type") != "LORA":
        _refuse(path, "peft_type", said.get("peft_type"), "only LORA adapters are read")
    if said.get("task_type") not in (None, "CAUSAL_LM"):
        _refuse(path, "task_type", said["task_type"], "use an adapter of a CAUSAL_LM model")
    if said.get("bias", "none") != "none":
        _refuse(path, "bias", said["bias"], "biases are not exchanged: train with bias='none'")
    start = said.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        _refuse(
            path,
            "init_lora_weights",
            start,
            "it changes the base model as well: save it with path_initial_model_for_weight_"
            "conversion, which makes a plain LoRA of it",
        )
    for name, value in said.items():
        if name in _REFUSED and value:
            _refuse(path, name, value, _REFUSED[name])
        known = name in _HARMLESS or name in _SUMS or name in _REFUSED
        if not known and value not in (None, False, "", 0) and value != {} and value != []:
            _refuse(path, name, value, "it is not known here, and might change results")


def _refuse(path: Path, name: str, value: object, remedy: str) -> NoReturn:
    raise BadAdapter(f"{path} has {name} = {value!r}: {remedy}")


def _config(path: Path, said: Mapping[str, Any]) -> LoraConfig:
    targets = said.get("target_modules")
    if not targets or not _is_names(targets):
        _refuse(path, "target_modules", targets, "give names of modules, or a regular expression")
    layers = said.get("layers_to_transform")
    if layers == []:  # which PEFT takes for all
        layers = None
    if isinstance(layers, int):
        layers = [layers]
    are_numbers = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if layers is not None and not are_numbers:
        _refuse(path, "layers_to_transform", layers, "give numbers of layers")
    patterns, excluded = said.get("layers_pattern") or (), said.get("exclude_modules") or None
    for name, value in (("layers_pattern", patterns), ("exclude_modules", excluded)):
        if value and not _is_names(value):
            _refuse(path, name, value, "give names, or a regular expression")
    rank_pattern, alpha_pattern = (_pattern(path, said, f"{what}_pattern") for what in _PATTERNS)
    for expression in (targets, excluded, *rank_pattern, *alpha_pattern, *_as_tuple(patterns)):
        if isinstance(expression, str) and not _compiles(expression):
            _refuse(path, "a regular expression", expression, "it is none")
    for rank in (said.get("r"), *rank_pattern.values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            _refuse(path, "r or rank_pattern", rank, "a rank is an integer of at least 1")
    for alpha in (said.get("lora_alpha"), *alpha_pattern.values()):
        if not isinstance(alpha, int | float) or not abs(alpha) < _MOST_ALPHA:
            _refuse(
                path, "lora_alpha or alpha_pattern", alpha, f"it is a number below {_MOST_ALPHA:g}"
            )
    return LoraConfig(
        folder=path.parent,
        rank=said["r"],
        alpha=said["lora_alpha"],
        rank_stabilised=bool(said.get("use_rslora")),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        exclude_modules=tuple(excluded) if isinstance(excluded, list) else excluded or None,
        layers=None if layers is None else frozenset(layers),
        layers_patterns=_as_tuple(patterns),
    )


def _pattern(path: Path, said: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = said.get(name) or {}
    if not isinstance(value, dict):
        _refuse(path, name, value, "give numbers by regular expressions")
    return value


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_names(value: object) -> bool:
    several = isinstance(value, Sequence) and all(isinstance(name, str) for name in value)
    return isinstance(value, str) or several


def _is_among(names: str | Sequence[str], module: str) -> bool:
    """Whether a module is one of those, or its name ends with one; or a regular expression fits."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What the first pattern says that fits the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
