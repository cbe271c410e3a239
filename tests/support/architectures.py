"""The table in runtime/model/README.md: `python tests/support/architectures.py` prints it."""

import sys

import zoo
from virtual_zoo import VIRTUAL


def special(model_type: str) -> str:
    """What sets an architecture apart, from its tiny config."""
    config = zoo.tiny_config(model_type, **VIRTUAL.get(model_type, {}))
    layer_types = set(getattr(config, "layer_types", None) or ())
    given = zoo.HYBRIDS.get(model_type) or zoo.ARCHITECTURES[model_type]
    found = {
        "window": "sliding_window" in given,
        "soft cap": getattr(config, "attn_logit_softcapping", None) is not None,
        "sinks": model_type == "gpt_oss",
        "experts": bool({"num_experts_per_tok", "n_routed_experts"} & given.keys()),
        "latent attention": "kv_lora_rank" in given,
        "convolution state": "conv" in layer_types,
        "recurrent state": bool({"linear_attention", "hybrid"} & layer_types),
    }
    return ", ".join(name for name, has in found.items() if has)


def table() -> str:
    """Rows in Markdown, by name."""
    lines = [
        "| architecture | what is special | engine | `VirtualCache` |",
        "|---|---|---|---|",
    ]
    for name in sorted(zoo.ARCHITECTURES | zoo.HYBRIDS):
        virtual = "tokens" if name in VIRTUAL else "not tested"
        lines.append(f"| `{name}` | {special(name)} | tokens, logits | {virtual} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
