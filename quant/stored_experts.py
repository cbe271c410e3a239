"""Experts as 4-bit checkpoints store them: layers for each expert, under several kinds of names.

| names under the module of all experts | written by |
|---|---|
| `3.gate_proj`, `3.w1` | most, with the names that the model was published under |
| `experts.3.gate_proj` | llm-compressor, of GPT-OSS |
| `gate_up.3`, `gate_up_projs.3` | GPTQModel and others, of GPT-OSS |
"""

from collections.abc import Iterator

from torch import nn

from ..vmem.errors import QuantError
from .experts import Expert, Experts, FusedExperts, Role
from .linear import Int4Linear

_ROLES: dict[str, Role] = {
    "gate_proj": "gate_proj",
    "w1": "gate_proj",
    "up_proj": "up_proj",
    "w3": "up_proj",
    "gate_up": "gate_up_proj",
    "gate_up_proj": "gate_up_proj",
    "gate_up_projs": "gate_up_proj",
    "down": "down_proj",
    "down_proj": "down_proj",
    "down_projs": "down_proj",
    "w2": "down_proj",
}
_DEPTHS = (2, 3)  # of a layer's name under that of the module


class StoredExperts(nn.Module):
    """Stands in for all experts of a layer while a checkpoint is read: a tree of its layers."""

    def __init__(self, fused: FusedExperts) -> None:
        super().__init__()
        self._fused = fused
        self._paths: dict[tuple[int, Role], str] = {}

    def place(self, path: str) -> nn.Linear | None:
        """Make room for the layer of that name, and say what linear it stands for.

        None if no expert has such a layer.
        """
        place = _place(path)
        if place is None or place[0] >= self._fused.num_experts or not self._fused.has(place[1]):
            return None
        expert, role = place
        home: nn.Module = self
        for name in path.split(".")[:-1]:
            if name not in dict(home.named_children()):
                home.add_module(name, nn.Module())
            home = home.get_submodule(name)
        self._paths[expert, role] = path
        weight = self._fused.weight(role, expert)
        return nn.Linear(
            weight.shape[1],
            weight.shape[0],
            bias=self._fused.has_bias,
            device="meta",
            dtype=weight.dtype,
        )

    def check(self, name: str) -> None:
        """Raise QuantError if an expert lacks a layer; `name` is the module's own."""
        self._fused.release()
        split = any(role == "gate_proj" for _, role in self._paths)
        roles: tuple[Role, ...] = ("up_proj",)
        if self._fused.gated:
            roles = ("gate_proj", "up_proj") if split else ("gate_up_proj",)
        wanted = {(e, r) for e in range(self._fused.num_experts) for r in (*roles, "down_proj")}
        if odd := sorted(wanted ^ self._paths.keys()):
            expert, role = odd[0]
            held = "and" if odd[0] in self._paths else "but not"
            raise QuantError(
                f"experts of {name} are in 4 bits, {held} the {role} of expert {expert}; all "
                "experts of a layer have the same quantised layers: check that all of the "
                "checkpoint's *.safetensors are there, or use one that quantises whole experts"
            )

    def read(self) -> nn.Module:
        """The experts, once every stored layer has made way for a linear.

        Dense ones are one tensor again for each role, as `transformers` keeps them.
        """
        read = {place: self.get_submodule(path) for place, path in self._paths.items()}
        dense = {place: one for place, one in read.items() if isinstance(one, nn.Linear)}
        if dense:
            assert len(dense) == len(read), "of one format"
            self._modules.clear()
            return self._fused.restore(dense)
        activation = self._fused.activation()
        experts = []
        for number in range(self._fused.num_experts):
            linears: dict[Role, nn.Module] = {}
            for (expert, role), linear in read.items():
                if expert == number:
                    linears[role] = linear
            assert all(isinstance(linear, Int4Linear) for linear in linears.values())
            experts.append(Expert(linears, activation, interleaved=self._fused.interleaved))
        self._modules.clear()
        for expert in experts:
            expert.join()
        return Experts(experts)


def expert_linear(model: nn.Module, layer: str) -> nn.Linear | None:
    """The linear, without memory, that a checkpoint's layer of that name is in some expert.

    The module of all experts then makes way for a `StoredExperts`. None if there is no such expert.
    """
    for depth in _DEPTHS:
        parts = layer.split(".")
        home, path = ".".join(parts[:-depth]), ".".join(parts[-depth:])
        if _place(path) is None or not home:
            continue
        try:
            module = model.get_submodule(home)
        except AttributeError:
            continue
        if not isinstance(module, StoredExperts):
            fused = FusedExperts.of(module)
            if fused is None:
                continue
            module = StoredExperts(fused)
            model.set_submodule(home, module)
            # Or some models would fill its weights, by name, with noise before they are read.
            model.get_submodule(home.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        return module.place(path)
    return None


def stored_experts(model: nn.Module) -> Iterator[tuple[str, StoredExperts]]:
    """Those of a model that is being read, with their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredExperts):
            yield name, module


def _place(path: str) -> tuple[int, Role] | None:
    """Which linear of which expert a layer's name under the module of all experts is."""
    parts = path.split(".")
    if len(parts) == 3 and parts[0] == "experts":
        parts = parts[1:]
    if len(parts) != 2:
        return None
    number, name = parts if parts[0].isdecimal() else reversed(parts)
    if not number.isdecimal() or name not in _ROLES:
        return None
    return int(number), _ROLES[name]
