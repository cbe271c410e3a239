"""What passes between a front end and an engine is plain data: it survives another process."""

import msgspec
import numpy as np
import pytest
from vkv import SamplingParams
from vkv.runtime.engine.messages import Abort, Add, Finish, Message
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.request.step_output import Failure, StepOutput
from vkv.vmem import errors
from vkv.vmem.errors import OutOfPages, VkvError

_PARAMS = SamplingParams(
    temperature=0.7, top_p=0.9, seed=3, n=2, stop=["x", "yz"], stop_token_ids=[5], logprobs=2,
    logit_bias={7: -1.5}, max_tokens=None, bad_words={"b", "a"}, allowed_token_ids={9, 8},
    truncate_prompt_tokens=4, prompt_logprobs=-1, structured_outputs={"choice": ["a", "b"]},
)  # fmt: skip
_SPEC = RequestSpec(
    request_id="a",
    prompt_token_ids=[1, 2, 3],
    params=_PARAMS,
    bad_words=((3,), (1, 2)),
    variant="tenant-a",
    arrival_time_s=1.5,
)


@pytest.mark.parametrize("message", [Add(_SPEC), Finish("a", 1), Abort("a")])
def test_a_message_survives(message: Message) -> None:
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Message)
    assert arrived == message
    if isinstance(arrived, Add):
        assert arrived.spec.params.stop_strings == ("x", "yz")
        assert arrived.spec.params.stop_ids == frozenset([5])
        assert arrived.spec.params.allowed_token_ids == (8, 9)
        assert arrived.spec.bad_words == ((3,), (1, 2))


def test_parameters_of_any_numbers_survive() -> None:
    given = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop={np.str_("a")})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=SamplingParams) == given


def test_a_step_output_survives() -> None:
    output = StepOutput(
        request_id="a",
        index=1,
        token_ids=(4, 5),
        logprobs=({4: Logprob(-0.5, 1)}, {5: Logprob(-1.0, 2), 6: Logprob(-0.1, 1)}),
        prompt_logprobs=(None, {2: Logprob(-2.0, 3)}),
        num_cached_tokens=2,
        queued_time_s=1.5,
        scheduled_time_s=1.75,
        finish_reason="error",
        failure=Failure.of(OutOfPages("none left")),
    )
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)
    assert arrived == output
    assert arrived.failure is not None
    error = arrived.failure.error()
    assert isinstance(error, OutOfPages)
    assert str(error) == "none left"


def test_every_error_of_the_tree_can_be_told() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, VkvError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = Failure.of(kind("why")).error()
        assert type(error) is kind
        assert str(error) == "why"
