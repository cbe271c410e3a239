"""`vkv quantize`: a 4-bit checkpoint from a dense one."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...quant.kernels.activations import rounded_inputs
from ...quant.loading import described_in
from ...quant.quantise.layers import perplexity, split_text
from ...quant.quantise.model import METHODS, QuantizedModel, plan, quantize_model
from ...quant.quantise.rounding import Rounding
from ...quant.quantise.save import (
    ASYMMETRIC,
    FORMATS,
    quantization_config,
    refuse_occupied,
    save_quantized,
    total_bytes,
)
from ...vmem.errors import (
    BadCheckpoint,
    InvalidConfig,
    QuantError,
    UnsupportedModel,
    UnsupportedQuantization,
)
from ..engine.devices import resolve_device
from ..frontend.progress import counted
from ..model.loading import (
    auto_class,
    check_report,
    load_tokenizer,
    parse_dtype,
    writing_part,
)
from ..model.reading import reading, resolve
from .commands import Quantize

_NUM_WORST = 5  # linear layers named in the report on the terminal


def run_quantize(options: Quantize) -> None:
    """Quantise a model into a folder, and print how well it went.

    Raises InvalidConfig, before anything is loaded, for options that there are not.
    """
    _check(options)
    console = Console(stderr=True)
    home = resolve(options.model)
    tokenizer = load_tokenizer(home)
    model = _load_dense(home, options.device, options.dtype)
    try:
        _quantize(model, tokenizer, options.out, options, console)
    except UnsupportedQuantization as error:
        raise UnsupportedModel(str(error)) from error
    except QuantError as error:
        raise InvalidConfig(str(error)) from error


def _check(options: Quantize) -> None:
    if options.format not in FORMATS:
        raise InvalidConfig(f"format is {options.format!r}; use one of {', '.join(FORMATS)}")
    if options.method not in METHODS:
        raise InvalidConfig(f"method is {options.method!r}; use one of {', '.join(METHODS)}")
    if options.method == "gptq" and options.calibration is None:
        raise InvalidConfig(
            "method gptq needs a text to calibrate on; give --calibration FILE, or use --method rtn"
        )
    for name in ("sequence_tokens", "num_sequences"):
        if getattr(options, name) < 2:
            raise InvalidConfig(f"{name} is {getattr(options, name)}; use at least 2")


def _load_dense(home: str | Path, device: str, dtype: str) -> PreTrainedModel:
    config = writing_part(
        reading("config", home, lambda: AutoConfig.from_pretrained(home, trust_remote_code=False))
    )
    if described_in(config) is not None:
        raise BadCheckpoint(f"{home} is quantised already; start from the dense checkpoint")
    loaded: Any = reading(
        "weights",
        home,
        lambda: auto_class(config).from_pretrained(
            home,
            trust_remote_code=False,
            config=config,
            dtype=parse_dtype(dtype) or "auto",
            output_loading_info=True,
        ),
    )
    model, report = loaded
    check_report(home, model, report)
    return model.to(resolve_device(device)).eval()  # type: ignore[arg-type]


def _quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    options: Quantize,
    console: Console,
) -> None:
    rounding = Rounding(
        group_size=options.group,
        symmetric=options.format not in ASYMMETRIC,
        clip=options.clip,
        scale_dtype=torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16,
    )
    planned = plan(model, rounding)
    # Refuse what the format cannot say now, not after the hours that GPTQ may take.
    quantization_config(
        options.format, rounding, planned.dense, planned.head, routers=planned.routers
    )
    refuse_occupied(out)
    body, tail = _read_text(model, tokenizer, options)
    report: dict[str, Any] = {}
    if tail is not None:
        report["perplexity_before"] = perplexity(model, tail)
    with counted("quantising", planned.num_linears) as count:
        result = quantize_model(
            model,
            method=options.method,
            rounding=rounding,
            calibration=body,
            on_linear=lambda _: count(),
        )
    if tail is not None:
        report["perplexity_after"] = perplexity(model, tail)
        rounding_inputs = _group_sizes(result)
        if len(rounding_inputs) == len(result.weights):  # experts are no modules of their own
            with rounded_inputs(rounding_inputs):
                report["perplexity_activation_bits_8"] = perplexity(model, tail)
    save_quantized(result, out, format=options.format, tokenizer=tokenizer, report=report)
    _show(console, result, report, out)


def _group_sizes(result: QuantizedModel) -> dict[nn.Module, int]:
    """Of the linears that were quantised."""
    modules = dict(result.model.named_modules())
    sizes = {name: weight.group_size for name, weight in result.weights.items()}
    return {modules[name]: size for name, size in sizes.items() if name in modules}


def _read_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: Quantize
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sequences to calibrate on and to measure by; None without a text."""
    if options.calibration is None:
        return None, None
    if tokenizer is None:
        raise BadCheckpoint("the model folder has no tokenizer, which the calibration text needs")
    try:
        text = options.calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot read {options.calibration} as UTF-8 text: {error}") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(options.sequence_tokens, most or options.sequence_tokens)
    return split_text(torch.tensor(tokens), length, options.num_sequences)


def _show(console: Console, result: QuantizedModel, report: dict[str, Any], out: Path) -> None:
    errors = sorted(result.errors, key=lambda e: e.weight if e.output is None else e.output)
    table = Table(title=f"{len(errors)} linear layers, the worst first", title_justify="left")
    for column in ("layer", "method", "error of weights", "of outputs"):
        table.add_column(column, justify="left" if column in ("layer", "method") else "right")
    for error in reversed(errors[-_NUM_WORST:]):
        output = "-" if error.output is None else f"{error.output:.2%}"
        table.add_row(error.name, error.method, f"{error.weight:.2%}", output)
    mean = sum(error.weight for error in errors) / len(errors)
    outputs = [error.output for error in errors if error.output is not None]
    mean_output = f"{sum(outputs) / len(outputs):.2%}" if outputs else "-"
    table.add_row("mean of all", "", f"{mean:.2%}", mean_output)
    console.print(table)
    if "perplexity_after" in report:
        before, after = report["perplexity_before"], report["perplexity_after"]
        console.print(f"perplexity on the text's tail: {before:.4g} before, {after:.4g} after")
    if "perplexity_activation_bits_8" in report:
        rounded = report["perplexity_activation_bits_8"]
        console.print(f"with activation_bits=8 besides: {rounded:.4g}")
    elif "perplexity_after" in report:
        console.print("with activation_bits=8 besides: not measured, of mixtures of experts")
    if result.dense:
        console.print(f"left dense: {len(result.dense)}, among them {result.dense[0]}")
    dense = sum(2 * w.out_features * w.in_features for w in result.weights.values())
    small = total_bytes(result.weights)
    console.print(
        f"{small / 2**20:.1f} MiB, where 16 bits took {dense / 2**20:.1f} MiB: written to {out}"
    )
