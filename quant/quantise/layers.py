"""Walking a model's decoder layers one at a time, on recorded inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..experts import FusedExperts
from .gptq import Hessian


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and its name: `("model.layers", …)`.

    Raises UnsupportedQuantization if the model has no such list, or several.
    """
    depth = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    found = [(n, m) for n, m in found if id(m) in inside] or found  # a tower may be as deep
    outermost = [
        (name, module)
        for name, module in found
        if not any(name != other and name.startswith(f"{other}.") for other, _ in found)
    ]
    if len(outermost) != 1:
        raise UnsupportedQuantization(
            f"{type(model).__name__} has {len(outermost)} lists of {depth} layers, where one is "
            "needed to go through; decoder-only models have it"
        )
    return outermost[0]


def linears(layers: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The linear layers inside, by full name."""
    named = ((f"{prefix}.{name}", module) for name, module in layers.named_modules())
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def fused_experts(layers: nn.ModuleList, prefix: str) -> dict[str, FusedExperts]:
    """The modules inside that keep the weights of all experts of a layer, by full name.

    Raises UnsupportedQuantization if one keeps them in a way that is not known.
    """
    found: dict[str, FusedExperts] = {}
    for name, module in layers.named_modules():
        if (fused := FusedExperts.of(module)) is not None:
            found[f"{prefix}.{name}"] = fused
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                raise UnsupportedQuantization(
                    f"{prefix}.{name}.{own} holds several weights in one tensor, in a way that is "
                    f"not known of a {type(module).__name__}; use a model whose experts are made "
                    "by transformers' use_experts_implementation, or one without experts"
                )
    return found


class _FirstLayerReached(Exception):
    """Ends a forward pass once the embeddings are known; never leaves this file."""


@dataclass(eq=False)
class LayerInputs:
    """What every decoder layer is called with, recorded so that layers can run by themselves.

    Attributes:
        hidden: the hidden states ahead of the layer that comes next, one [1, T, H] a sequence.
        rest: per layer, its other arguments: masks and positions, alike for sequences of one
            length.
    """

    hidden: list[torch.Tensor]
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    @torch.no_grad()
    def record(cls, model: PreTrainedModel, tokens: torch.Tensor) -> "LayerInputs":
        """Run `tokens`, int64 [S, T], as far as the first layer, and one sequence all the way."""
        _, layers = decoder_layers(model)
        rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[torch.Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args:
                raise UnsupportedQuantization(
                    f"{type(model).__name__} passes its layers their hidden states by name; "
                    "quantise it by rounding to nearest, which needs no calibration"
                )
            rest.append((args[1:], kwargs))

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            hidden.append(args[0])
            raise _FirstLayerReached

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        with _removing(hooks):
            model(tokens[:1].to(model.device), use_cache=False)
        with _removing([layers[0].register_forward_pre_hook(stop)]):
            for sequence in tokens:
                try:
                    model(sequence[None].to(model.device), use_cache=False)
                except _FirstLayerReached:
                    continue
        if len(rest) != len(layers):
            raise UnsupportedQuantization(
                f"{type(model).__name__} calls its {len(layers)} layers {len(rest)} times a pass; "
                "quantise it by rounding to nearest, which needs no calibration"
            )
        return cls(hidden=hidden, rest=rest)

    def run(self, layer: nn.Module, index: int) -> Iterator[torch.Tensor]:
        """The outputs of `layer`, sequence by sequence."""
        args, kwargs = self.rest[index]
        for states in self.hidden:
            with torch.no_grad():
                output = layer(states, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Take the outputs of `layer` for the inputs of the next."""
        for number, output in enumerate(self.run(layer, index)):
            self.hidden[number] = output


def gather_hessians(
    inputs: LayerInputs, layer: nn.Module, index: int, modules: dict[str, nn.Linear]
) -> dict[str, Hessian]:
    """The Hessians of `modules`, from one run of the layer they are in.

    A module that is never called, such as an expert no token chose, has none. Modules that are
    called with the very same tensor, as the projections of attention are, share theirs.
    """
    gathered: dict[str, Hessian] = {}
    last: list[tuple[torch.Tensor, Hessian]] = []

    def add(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            given = args[0]
            known = gathered.get(name)
            if last and last[0][0] is given and (known is None or known is last[0][1]):
                gathered[name] = last[0][1]  # added already, by the module before
                return
            if known is None:
                known = gathered[name] = Hessian(given.shape[-1], given.device)
            if given.numel():
                known.add(given)
            last[:] = [(given, known)]

        return hook

    with _removing([m.register_forward_pre_hook(add(n)) for n, m in modules.items()]):
        for _ in inputs.run(layer, index):
            last.clear()
    return {name: hessian for name, hessian in gathered.items() if hessian.num_tokens}


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Of the next token, over the sequences of `tokens`, int64 [S, T], each by itself."""
    total = 0.0
    with torch.no_grad():
        for sequence in tokens.to(model.device):
            logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, sequence[1:]))
    return float(torch.tensor(total / len(tokens)).exp())


def split_text(tokens: torch.Tensor, length: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to calibrate on, and held-out ones from the tail: int64 [S, length] each.

    Args:
        tokens: int64 [T], the whole text.
        length: of a sequence.
        most: calibration sequences at most, spread evenly over the text.

    A tenth of the text, and at least one sequence, is held out. Raises QuantError if the text is
    too short for two.
    """
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    if len(sequences) < 2:
        raise QuantError(
            f"the calibration text has {len(tokens)} tokens; it takes at least {2 * length}, one "
            f"sequence of {length} to calibrate on and one to measure by"
        )
    held_out = max(1, len(sequences) // 10)
    body, tail = sequences[:-held_out], sequences[-held_out:]
    if len(body) > most:
        body = body[torch.linspace(0, len(body) - 1, most).round().long()]
    return body, tail[:most]


@contextmanager
def _removing(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
