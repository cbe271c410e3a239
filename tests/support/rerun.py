"""Decode steps recorded as on a GPU, and replayed by running them again.

Recordings come in a few sizes, and smaller batches are padded. A replay runs the model over the
recording's tensors, with the numbers on the host frozen as a recording would have them.
"""

import logging
from collections.abc import Callable

import torch
from vkv import LLM
from vkv.runtime.execution.recordings import DecodeRecordings


class Rerun:
    pads = True
    refusal_level = logging.WARNING

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return run

    def forget(self) -> None:
        pass


def record_by_rerun(llm: LLM) -> DecodeRecordings:
    """From now on its decode steps are recorded this way. Not while it runs."""
    runner = llm.engine.runner
    runner.recordings = DecodeRecordings(
        runner.logits,
        runner.cache,
        Rerun(),
        runner.device,
        llm.config.max_seqs,
        runner.adapters,
        runner.chains,
    )
    return runner.recordings
