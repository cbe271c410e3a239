"""Architectures that `VirtualCache` is tested with: the engine's, and further ones."""

from typing import Any

import zoo

_WITHOUT_INTERFACE = {  # attention of their own: nothing is registered for this
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 512},
}
_OTHERS = {  # a window that only the mask knows, convolutions, attention within chunks
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 13},
    "lfm2": {},
    "llama4_text": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 13,
        "intermediate_size_mlp": 48,
    },
}
RECURRENT = {  # some layers hold convolution and recurrent state, which cannot be undone
    name: {} for name in zoo.HYBRIDS if name != "lfm2"
}
RECURRENT["zaya"] = {  # state beside attention in every layer, of which one has a window
    "layer_types": ["hybrid_sliding", "hybrid"],
    "sliding_window": 13,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
    "router_hidden_size": 16,
}
VIRTUAL: dict[str, dict[str, Any]] = {
    **{name: {} for name in zoo.ARCHITECTURES},
    **_WITHOUT_INTERFACE,
    **_OTHERS,
    **RECURRENT,
}
