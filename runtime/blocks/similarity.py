"""How alike the blocks of two models are, by what they compute of the same inputs.

Equal bytes are found by digest and need no measuring. Of the others, a model runs on real prompts,
and each block of the other model is put in its place for a moment, with the inputs that came there.
What a layer adds to the residual stream, or a module outside of layers gives, is compared token by
token, by the cosine of the angle between the two; of a head, the probabilities of tokens; of an
embedding all of its rows, for prompts have few of them. At the end so are the probabilities that
the two whole models give.

Source: equivalence among blocks in BlockLLM, arXiv:2404.18322, section 4.2. There a cosine of 0.98
counts as equivalent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...vmem.errors import ChainMismatch, InvalidPrompt
from ..model.loading import read_checkpoint
from .chain import MANIFEST, Chain, Place
from .cutting import block_modules, layer_names
from .zoo import BlockZoo, StandIn

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Similarity:
    """The cosine between what two blocks, or models, give, over the tokens of all prompts.

    Attributes:
        mean: what is compared with a threshold.
        lowest: of the token where they agree least.
    """

    mean: float
    lowest: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, block by block.

    Attributes:
        one, other: the models.
        blocks: for each block of `one`, how alike that of `other` is; None where it was not
            measured: what stands beside the language model, and does not run on a text.
        vocabulary: of the probabilities that the whole models give to tokens.
    """

    one: Chain
    other: Chain
    blocks: tuple[Similarity | None, ...]
    vocabulary: Similarity


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Blocks of a zoo to be used in place of a model's own.

    Attributes:
        instead: by the place of the model's blocks, for `BlockZoo.add`.
        vocabulary: of the model with all of these, beside itself. None if there are none.
    """

    instead: Mapping[int, StandIn]
    vocabulary: Similarity | None


def compare(
    one: Chain, other: Chain, prompts: Prompts, *, progress: Callable[[], None] | None = None
) -> Comparison:
    """Run both models on prompts, and the blocks of `other` on what reaches those of `one`.

    Args:
        prompts: token ids, at least one prompt of two tokens.
        progress: called after each prompt.

    Raises ChainMismatch if the two differ in more than numbers, InvalidPrompt.
    """
    one.check_fits(other)
    _check(prompts)
    mine, theirs = load_plain(one), load_plain(other)
    same = dict(zip(one.places, one.same_as(other), strict=True))
    with torch.inference_mode(), _Beside(mine, theirs, [p for p in same if not same[p]]) as beside:
        vocabulary = _Cosines()
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)])
            vocabulary.add(_probabilities(mine, tokens), _probabilities(theirs, tokens))
            if progress is not None:
                progress()
    found = beside.found
    return Comparison(
        one=one,
        other=other,
        blocks=tuple(
            Similarity(1.0, 1.0) if is_same else found[place].value() if place in found else None
            for place, is_same in same.items()
        ),
        vocabulary=vocabulary.value(),
    )


def stand_ins(
    zoo: BlockZoo,
    draft: Chain,
    prompts: Prompts,
    threshold: float,
    *,
    progress: Callable[[], None] | None = None,
) -> Similar:
    """Blocks of a zoo that compute what a model's own do, as nearly as `threshold` says.

    Of several the most similar. A block that the zoo has already, or that is like none, is left
    out. Models of the zoo that do not fit are passed over.

    Args:
        draft: of the model, which need not be in the zoo (`BlockZoo.draft`).
    """
    have = {block.digest for chain in zoo.chains() for block in chain.blocks}
    own = [index for index, block in enumerate(draft.blocks) if block.digest not in have]
    instead: dict[int, StandIn] = {}
    measured: set[tuple[int, str]] = set()
    for chain in zoo.chains():
        theirs = dict(zip(chain.places, chain.blocks, strict=True))
        others = {(i, theirs[draft.places[i]].digest) for i in own if draft.places[i] in theirs}
        if others <= measured:  # as most fine-tunes' are their base's
            continue
        try:
            compared = compare(draft, chain, prompts, progress=progress)
        except ChainMismatch:
            continue
        measured |= others
        for index in own:
            if (found := compared.blocks[index]) is None:
                continue
            # Of an embedding every row: one that differs is a token that means something else.
            alike = found.lowest if draft.blocks[index].kind == "embedding" else found.mean
            if alike >= threshold and (index not in instead or instead[index].similarity < alike):
                used = theirs[draft.places[index]].digest
                instead[index] = StandIn(digest=used, of=chain.name, similarity=alike)
    return Similar(
        instead=instead,
        vocabulary=_with_all(zoo, draft, instead, prompts) if instead else None,
    )


def _with_all(
    zoo: BlockZoo, draft: Chain, instead: Mapping[int, StandIn], prompts: Prompts
) -> Similarity:
    """How alike a model is to itself with other blocks in place of its own."""
    mine, changed = load_plain(draft), load_plain(draft)
    others = {name: load_plain(zoo.chain(name)) for name in {one.of for one in instead.values()}}
    modules = block_modules(changed)
    for index, used in instead.items():
        for part in _parts(changed, others[used.of], modules, draft.places[index]):
            part.exchange()
    changed.tie_weights()
    found = _Cosines()
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)])
            found.add(_probabilities(mine, tokens), _probabilities(changed, tokens))
    return found.value()


def load_plain(chain: Chain) -> PreTrainedModel:
    """A model with `transformers`' own attention, its weights mapped."""
    stored = chain if (chain.folder / MANIFEST).is_file() else None
    device = torch.device("cpu")
    return read_checkpoint(chain.folder, None, device, stored, attention="eager").eval()


def _check(prompts: Prompts) -> None:
    if not prompts or min(map(len, prompts)) < 2:
        raise InvalidPrompt(
            "there are no prompts, or one of less than two tokens; give longer ones"
        )


def _probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of the next token behind each one of a prompt: [num_tokens, vocab_size]."""
    return model(input_ids=tokens, use_cache=False).logits[0].float().softmax(-1)


class _Cosines:
    """Gathers cosines of the angles between vectors."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Two tensors of vectors, [..., size]."""
        one, other = (vectors.double().flatten(0, -2) for vectors in (one, other))
        found = torch.cosine_similarity(one, other, dim=-1)
        found[(one == other).all(-1)] = 1.0  # also where both are zero
        self._found.append(found)

    def value(self) -> Similarity:
        """Over all that was added."""
        found = torch.cat(self._found)
        return Similarity(found.mean().item(), found.min().item())


class _Beside:
    """While a model runs, runs another one's blocks on the same inputs.

    Attributes:
        found: by place.
    """

    def __init__(
        self, mine: PreTrainedModel, theirs: PreTrainedModel, places: Sequence[Place]
    ) -> None:
        self.found: dict[Place, _Cosines] = {}
        self._hooks = ExitStack()
        modules = block_modules(mine)
        for layer, name in layer_names(modules).items():
            here = [place for place in places if place[1] == layer and place in modules]
            if here:
                parts = {place: _parts(mine, theirs, modules, place) for place in here}
                self._hook(mine, name, self._layer_hook(parts))
        for place in places:
            if place[1] is None and place in modules:
                (name,) = modules[place]
                self._outside_of_layers(mine, theirs.get_submodule(name), name, place)

    def _outside_of_layers(self, model: Any, other: Any, name: str, place: Place) -> None:
        if place[0] == "embedding":
            self.found[place] = _Cosines()
            self.found[place].add(model.get_submodule(name).weight, other.weight)
        else:
            self._hook(model, name, self._module_hook(other, place))

    def _hook(self, model: nn.Module, name: str, hook: Callable[..., None]) -> None:
        handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def _module_hook(self, other: nn.Module, place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            pair = _first(out), _first(other(*args, **kwargs))
            if place[0] == "head":
                pair = pair[0].float().softmax(-1), pair[1].float().softmax(-1)
            self.found.setdefault(place, _Cosines()).add(*pair)

        return hook

    def _layer_hook(self, parts: Mapping[Place, list["_Part"]]) -> Callable[..., None]:
        def hook(mine: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            for place, others in parts.items():
                with _exchanged(others):
                    changed = _first(mine.forward(*args, **kwargs))
                cosines = self.found.setdefault(place, _Cosines())
                cosines.add(_first(out) - before, changed - before)

        return hook

    def __enter__(self) -> "_Beside":
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


@dataclass(frozen=True)
class _Part:
    """A module or parameter of one model, and that of another which may take its place."""

    owner: nn.Module
    name: str
    other: Any

    def exchange(self) -> "_Part":
        """Put the other in its place; returns what puts it back."""
        before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.other)
        return _Part(self.owner, self.name, before)


def _parts(
    mine: nn.Module, theirs: nn.Module, modules: Mapping[Place, Sequence[str]], place: Place
) -> list[_Part]:
    """All that a block is."""
    layers = layer_names(modules).values()
    found = []
    for name in modules[place]:
        one, other = mine.get_submodule(name), theirs.get_submodule(name)
        if name in layers:  # whose modules are named by themselves
            own = [n for n, _ in one.named_parameters(recurse=False)]
            found += [_Part(one, n, getattr(other, n)) for n in own]
        else:
            parent, _, last = name.rpartition(".")
            found.append(_Part(mine.get_submodule(parent), last, other))
    return found


@contextmanager
def _exchanged(parts: Sequence[_Part]) -> Iterator[None]:
    """Others in the places of these, for a while."""
    before = [part.exchange() for part in parts]
    try:
        yield
    finally:
        for part in before:
            part.exchange()


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
