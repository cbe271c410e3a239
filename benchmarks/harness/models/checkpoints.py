"""The checkpoints that a benchmark's systems load: one model, dense and in 4 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...quant.formats.scheme import FormatName
from ...quant.quantise.layers import decoder_layers, linears
from ...quant.quantise.model import plan, quantize_model
from ...quant.quantise.rounding import Rounding
from ...quant.quantise.save import ASYMMETRIC, FORMATS, save_quantized
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig, QuantError
from ..record import Table
from .shapes import build_model, kv_geometry

_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Folders of one model.

    Attributes:
        dense: in the benchmark's dtype.
        int4: the same weights rounded to 4 bits, in groups of `group_size`; None if not wanted.
        weight_bytes: of the dense weights, tied ones counted once.
        read_bytes: of those, what a decode step reads: not an embedding that is looked up.
        kv_bytes_per_token: keys and values of a token over all layers, in the benchmark's dtype.
        max_positions: tokens of the longest sequence.
    """

    dense: Path
    int4: Path | None
    group_size: int | None
    weight_bytes: int
    read_bytes: int
    kv_bytes_per_token: int
    vocab_size: int
    max_positions: int


def save_checkpoints(
    shape: str,
    model: str | None,
    dtype: torch.dtype,
    quant: str | None,
    scratch: Path,
    **changes: Any,
) -> Checkpoints:
    """A shape with random weights, or a checkpoint folder that is there, and its 4-bit form.

    `changes` are as of `build_model`. Raises InvalidConfig if `quant` is no format, or if the model
    cannot be quantised in it.
    """
    format = parse_format(quant)
    if model is not None:
        dense = Path(model)
        loaded = _load_dense(dense, dtype, wants_int4=format is not None)
    else:
        dense = scratch / "model"
        loaded = build_model(shape, dtype=dtype, device=torch.device("cpu"), **changes)
        loaded.save_pretrained(dense)
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in loaded.parameters()}
    embedding: Any = loaded.get_input_embeddings()
    head: Any = loaded.get_output_embeddings()
    looked_up = 0 if head.weight is embedding.weight else embedding.weight.nbytes
    int4 = None if format is None else scratch / f"model-{format}"
    return Checkpoints(
        dense=dense,
        int4=int4,
        weight_bytes=sum(weights.values()),
        read_bytes=sum(weights.values()) - looked_up,
        kv_bytes_per_token=cache_bytes_per_token(loaded, dtype),
        vocab_size=loaded.config.vocab_size,
        max_positions=loaded.config.max_position_embeddings,
        group_size=_quantize(loaded, int4, format) if format and int4 else None,
    )


def parse_format(quant: str | None) -> FormatName | None:
    """The format of that name. Raises InvalidConfig with the names there are."""
    for name in FORMATS:
        if quant == name:
            return name
    if quant is not None:
        raise InvalidConfig(f"quant is {quant!r}; use one of {', '.join(FORMATS)}")
    return None


def cache_bytes_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    num_kv_heads, head_dim = kv_geometry(model.config)
    return 2 * model.config.num_hidden_layers * num_kv_heads * head_dim * dtype.itemsize


def gains_table(weight_bytes: Mapping[str, int], kv_bytes_per_token: int) -> Table:
    """What the memory that smaller weights leave free holds, in tokens of KV.

    The first of `weight_bytes` are the dense weights.
    """
    dense = next(iter(weight_bytes.values()))
    rows = []
    for name, num_bytes in weight_bytes.items():
        freed = dense - num_bytes
        gained = [f"{freed / 2**20:.1f}", str(freed // kv_bytes_per_token)] if rows else ["", ""]
        rows.append([name, f"{num_bytes / 2**20:.1f}", *gained])
    return Table(
        title="KV that the freed weight memory holds",
        columns=["weights", "MiB", "freed, MiB", "tokens of KV gained"],
        rows=rows,
    )


def _load_dense(folder: Path, dtype: torch.dtype, *, wants_int4: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    if wants_int4 and getattr(config, "quantization_config", None) is not None:
        raise InvalidConfig(f"{folder} is quantised already; give the dense model, or no --quant")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _quantize(model: PreTrainedModel, out: Path, format: FormatName) -> int:
    """Round the model to nearest, in place, and write it; returns the group size.

    Clipping is not searched for: it takes long, and makes no difference to speed or memory.
    """
    try:
        rounding = Rounding(
            group_size=_group_size(model),
            symmetric=format not in ASYMMETRIC,
            clip=False,
            scale_dtype=torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16,
        )
        with counted("quantising", plan(model, rounding).num_linears) as count:
            result = quantize_model(model, rounding=rounding, on_linear=lambda _: count())
        save_quantized(result, out, format=format)
    except QuantError as error:
        raise InvalidConfig(f"the model cannot be benchmarked in 4 bits: {error}") from error
    return rounding.group_size


def _group_size(model: PreTrainedModel) -> int:
    """The largest that divides the inputs of every linear layer; the smallest if none does."""
    prefix, layers = decoder_layers(model)
    inputs = {linear.in_features for linear in linears(layers, prefix).values()}
    fitting = (size for size in _GROUP_SIZES if not any(n % size for n in inputs))
    return next(fitting, _GROUP_SIZES[-1])
