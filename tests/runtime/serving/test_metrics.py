"""What Prometheus reads."""

from prometheus_client.parser import text_string_to_metric_families
from served import Served

CHAT = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


def samples(server: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(found: dict, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def test_requests_are_counted(served: Served) -> None:
    served.wait_until_idle()
    before = samples(served)
    usage = served.client.post("/v1/chat/completions", json=CHAT).json()["usage"]
    served.client.post(
        "/v1/chat/completions", json={**CHAT, "max_tokens": 2, "n": 2, "seed": 1, "temperature": 1}
    )
    served.wait_until_idle()
    after = samples(served)

    def gained(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert gained("vllm:request_success_total", finished_reason="stop") == 1
    assert gained("vllm:request_success_total", finished_reason="length") == 2
    assert gained("vllm:generation_tokens_total") == usage["completion_tokens"] + 4
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert gained("vllm:prompt_tokens_total") >= usage["prompt_tokens"] - cached
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert gained(f"vllm:{name}_seconds_count") == 2, name
        assert gained(f"vllm:{name}_seconds_sum") > 0, name
    # Tokens that come together have no time between them.
    num_gaps = gained("vllm:inter_token_latency_seconds_count")
    assert 1 <= num_gaps <= usage["completion_tokens"] - 1 + 2
    assert gained("vllm:request_params_n_sum") == 3


def test_what_the_engine_holds(served: Served) -> None:
    found = samples(served)
    load = served.load()
    assert value(found, "vkv:kv_virtual_bytes") == load["kv_virtual_bytes"]
    assert value(found, "vkv:kv_limit_bytes") == load["kv_limit_bytes"]
    assert value(found, "vkv:engine_up") == 1
    assert value(found, "vllm:num_requests_running") == 0
    assert any(name == "vkv:driver_calls_total" for name, _ in found)
