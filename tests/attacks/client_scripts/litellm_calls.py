"""LiteLLM: chat, stream, completion, a schema, and an error of its own kind."""

import json
import sys

import litellm

url = sys.argv[1]
litellm.telemetry = False
question = [{"role": "user", "content": "What is 3 + 4?"}]
asked = {"model": "hosted_vllm/tiny-chat", "api_base": f"{url}/v1", "api_key": "none"}

text = litellm.completion(**asked, messages=question, temperature=0).choices[0].message.content
stream = litellm.completion(**asked, messages=question, temperature=0, stream=True)
assert text == "".join(chunk.choices[0].delta.content or "" for chunk in stream)
schema = {
    "type": "object",
    "properties": {"sum": {"enum": [7, 8]}},
    "required": ["sum"],
    "additionalProperties": False,
}
held = litellm.completion(
    **asked,
    messages=question,
    max_tokens=400,
    response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
)
assert json.loads(held.choices[0].message.content)["sum"] in (7, 8)
try:
    litellm.completion(**{**asked, "model": "hosted_vllm/gpt-4"}, messages=question)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("a model that is not there answered")
sys.stdout.write("chat, a stream, a schema, and its own error for a model that is not there")
