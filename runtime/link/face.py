"""What a front process knows of the model, which is in another process."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..chains.voices import Voice
from ..engine.admission import Admission
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..model.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Face:
    """A model and an engine as their users see them.

    Attributes:
        name: as of `LoadedModel`.
        tokenizer: None for a model without one.
        sampling_defaults: what its generation config says of sampling.
        admission: what the engine takes.
        dtype, device: where and how it runs, in words.
        max_seqs: requests that run at once.
        page_bytes: of a physical page.
        token_bytes: keys and values of a token.
        capacity_tokens: tokens whose keys and values it can hold, all slots together.
        voices: of the models that run beside it, by name, and None under its own.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    sampling_defaults: Mapping[str, Any]
    admission: Admission
    dtype: str
    device: str
    max_seqs: int
    page_bytes: int
    token_bytes: int
    capacity_tokens: int
    voices: Mapping[str, Voice | None] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, engine: Engine, config: EngineConfig) -> "Face":
        """That of an engine which is here."""
        kv = engine.stats().kv
        growth_pages = max(1, engine.cache.num_pages(kv.growth_tokens))
        return cls(
            name=loaded.name,
            tokenizer=loaded.tokenizer,
            sampling_defaults=loaded.sampling_defaults,
            admission=engine.admission,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            max_seqs=config.max_seqs,
            page_bytes=kv.page_bytes,
            token_bytes=engine.cache.geometry.token_format.token_bytes,
            capacity_tokens=kv.pages_limit // growth_pages * kv.growth_tokens,
            voices=engine.extras.voices,
        )

    def pack(self) -> bytes:
        """For the front processes, which are of the same program."""
        return pickle.dumps(self)

    @staticmethod
    def unpack(packed: bytes) -> "Face":
        """What `pack` packed."""
        face = pickle.loads(packed)
        assert isinstance(face, Face), face
        return face
