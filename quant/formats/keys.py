"""Configs read key by key: what a key says is honoured, known to change nothing, or refused."""

from collections.abc import Collection, Mapping
from typing import Any

from ...vmem.errors import QuantError, UnsupportedQuantization

# Which layers are quantised: that follows from the tensors in the files.
PLACES = frozenset(
    {
        "block_name_to_quantize",
        "ignore",
        "lm_head",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
        "module_name_preceding_first_block",
        "quant_block_list",
        "supported_types",
        "targets",
        "to_quant_block_names",
    }
)
# How the codes were found; they are what they are.
ROUNDING = frozenset(
    {
        "act_group_aware",
        "amp",
        "batch_size",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "enable_minmax_tuning",
        "enable_norm_bias_tuning",  # the tuned ones are in the checkpoint
        "enable_quanted_input",
        "gptaq",
        "gradient_accumulate_steps",
        "hyb_act",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "max_input_length",
        "minmax_lr",
        "model_seqlen",
        "mse",
        "nsamples",
        "observer",
        "observer_kwargs",
        "pad_token_id",
        "seqlen",
        "static_groups",
        "tokenizer",
        "true_sequential",
        "v2",
    }
)
# Who wrote it, where it was, and which kernels of theirs ran it.
WRITER = frozenset(
    {
        "autoround_version",
        "disable_exllama",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "pack_impl",
        "provider",
        "quantizer",
        "use_cuda_fp16",
        "use_exllama",
        "version",
    }
)
HARMLESS = PLACES | ROUNDING | WRITER


def is_empty(value: Any) -> bool:
    """True for what says nothing: None, False, and containers of nothing else."""
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(part) for part in value)
    return value is None or value is False or value == ""


def refuse_unknown(
    config: Mapping[str, Any], where: str, honoured: Collection[str], harmless: Collection[str]
) -> None:
    """Raise UnsupportedQuantization for a key that says something and is in neither list."""
    for key, value in config.items():
        if key not in honoured and key not in harmless and not is_empty(value):
            raise UnsupportedQuantization(
                f"{where}.{key} is {_short(value)}, which is not understood here and may change "
                "what the weights mean, as rotations do; use a checkpoint that was quantised "
                "without it"
            )


def require(config: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """Raise UnsupportedQuantization if a key is there with another value than those allowed."""
    value = config.get(key)
    if not is_empty(value) and value not in allowed:
        raise UnsupportedQuantization(
            f"{where}.{key} is {_short(value)}, and what is read here has "
            f"{' or '.join(map(repr, allowed)) if allowed else 'none'}; use another checkpoint"
        )


def group_size(value: Any, where: str) -> int | None:
    """Columns that share a scale, or None (stored as -1) for one scale a row."""
    if isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1:
        said = "is missing" if value is None else f"is {value!r}"
        raise QuantError(
            f"{where} {said}, and is a number of columns, or -1 for whole rows; use the "
            "config.json that was written with the weights"
        )
    return None if value == -1 else value


def block_of(value: Any, where: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    sides = list(value) if isinstance(value, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise QuantError(
            f"{where} is {value!r}, and is two sizes, of rows and columns; use the config.json "
            "that was written with the weights"
        )
    return sides[0], sides[1]


def refuse_activations(config: Mapping[str, Any], where: str) -> frozenset[str]:
    """Refuse quantised activations, and name the keys that then say nothing more."""
    bits = config.get("act_bits")
    if bits is not None and bits < 16:
        raise UnsupportedQuantization(
            f"{where}.act_bits is {bits!r}, and activations are not quantised here; use a "
            "checkpoint that quantises weights alone"
        )
    return frozenset({"act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym"})


def refuse_mixed(config: Mapping[str, Any], where: str) -> frozenset[str]:
    """Refuse layers with a scheme of their own, in auto-round's table of exceptions.

    Those of 16 bits and more are dense, which the files say too.
    """
    for layer, own in (config.get("extra_config") or {}).items():
        bits = own.get("bits", config.get("bits"))
        if isinstance(bits, int) and bits >= 16:
            continue
        for key, value in own.items():
            if (
                not is_empty(value)
                and value != config.get(key)
                and not _dense_activations(key, own)
            ):
                raise UnsupportedQuantization(
                    f"{where}.extra_config.{layer}.{key} is {value!r}, and {config.get(key)!r} "
                    "elsewhere; use a checkpoint with one scheme"
                )
    return frozenset({"extra_config"})


def _dense_activations(key: str, own: Mapping[str, Any]) -> bool:
    return key in refuse_activations(own, "extra_config")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
