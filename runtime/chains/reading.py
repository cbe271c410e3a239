"""A block of a model, read as the whole model would be, and nothing else of it.

`transformers` knows what a checkpoint's tensors are called in a model, which of them become one,
and how quantised ones are read. So it is given the tensors of one block, and makes a model whose
other weights are memory that nobody has touched.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from ...quant import Int4Linear
from ...quant.formats.table import parse_config, tensor_names
from ...quant.loading import adopt, described_in
from ...vmem.errors import BadCheckpoint
from ..blocks.chain import Block, Chain
from ..model.loading import auto_class, writing_part
from ..model.reading import reading


class _Partial:
    """Mixed into a model's class: what was not read is left as it is."""

    def initialize_weights(self) -> None:
        """Only what modules have beside weights that were read, such as an embedding's scale."""
        for module in self.modules():  # type: ignore[attr-defined]
            own = module.parameters(recurse=False)
            if not any(getattr(one, "_is_hf_initialized", False) for one in own):
                module._is_hf_initialized = True
        super().initialize_weights()  # type: ignore[misc]


def read_block(
    chain: Chain, block: Block, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Callable[[nn.Module], bool | None]]:
    """A model of which one block was read, on the CPU.

    With it comes what tells of a module whether what it holds itself was read; None if it holds
    nothing. Raises BadCheckpoint or UnsupportedModel.
    """
    tensors = chain.read(block)
    config: PretrainedConfig = reading(
        "config",
        chain.folder,
        lambda: AutoConfig.from_pretrained(chain.folder, trust_remote_code=False),
    )
    config = writing_part(config)
    kind: Any = auto_class(config)._model_mapping[type(config)]
    _settle_quantisation(config, tensors, device, chain.file_of(block))
    partial = type(kind.__name__, (_Partial, kind), {"__module__": kind.__module__})

    def read() -> Any:
        with _quiet():
            return partial.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
            )

    model, report = reading(f"{block.place} (weights)", chain.folder, read)
    if foreign := sorted(report["unexpected_keys"]):
        raise BadCheckpoint(
            f"the {block.place} of {chain.name} has tensors that the model has no place for, among "
            f"them {foreign[0]}; add the model to the zoo again"
        )
    return model.eval(), _reader(model, set(report["missing_keys"]))


def _settle_quantisation(
    config: PretrainedConfig, tensors: Mapping[str, torch.Tensor], device: torch.device, file: Path
) -> None:
    """Have quantised weights read as those of a whole model, if there are any in the block."""
    described = described_in(config)
    if described is None:
        return
    scheme = parse_config(described if isinstance(described, dict) else described.to_dict())
    required, optional = tensor_names(scheme.format) if scheme else ((), ())
    marks = {*required, *optional} - {"weight", "bias"}
    if scheme is None or any(name.rpartition(".")[2] in marks for name in tensors):
        adopt(config, device, tensors, (file,))
        return
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # type: ignore[attr-defined]


def _reader(model: nn.Module, missing: set[str]) -> Callable[[nn.Module], bool | None]:
    named = dict(model.named_parameters(remove_duplicate=False))
    unread = {id(named[name]) for name in missing if name in named}
    persistent = model.state_dict(keep_vars=True)
    unread |= {id(persistent[name]) for name in missing if name in persistent}
    kept = {id(tensor) for tensor in persistent.values() if isinstance(tensor, torch.Tensor)}

    def is_read(module: nn.Module) -> bool | None:
        if isinstance(module, Int4Linear):  # what was not read is a linear still
            return True
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        held = [id(tensor) in unread for tensor in own if id(tensor) in kept]
        return not any(held) if held else None

    return is_read


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `transformers` from telling that most of the model is missing, and from a bar."""
    log = logging.getLogger("transformers.modeling_utils")
    shows_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    log.addFilter(_is_error)
    try:
        yield
    finally:
        log.removeFilter(_is_error)
        if shows_bars:
            hf_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
