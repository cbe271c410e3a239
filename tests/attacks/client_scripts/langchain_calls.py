"""LangChain: invoke, stream, batch, a schema, and the newer protocol."""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url = sys.argv[1]


class Sum(BaseModel):
    """A sum."""

    value: Literal[7, 8]


asked = {"model": "tiny-chat", "base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
model = ChatOpenAI(**asked)
told = model.invoke("What is 3 + 4?")
assert told.usage_metadata["output_tokens"] > 0
assert told.content == "".join(chunk.content for chunk in model.stream("What is 3 + 4?"))
assert [told.content] * 3 == [one.content for one in model.batch(["What is 3 + 4?"] * 3)]
held = ChatOpenAI(**asked, max_tokens=400).with_structured_output(Sum, method="json_schema")
assert held.invoke("What is 3 + 4?").value in (7, 8)
newer = ChatOpenAI(**asked, use_responses_api=True).invoke("What is 3 + 4?")
assert newer.text == told.content, newer
sys.stdout.write("invoke, stream, batch, a schema, and the Responses API")
