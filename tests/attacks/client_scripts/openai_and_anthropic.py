"""Three protocols through their makers' own clients: whole, streamed, counted."""

import sys

import anthropic
import openai

url = sys.argv[1]
question = [{"role": "user", "content": "What is 3 + 4?"}]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

model = client.models.list().data[0].id
asked = {"model": model, "messages": question, "temperature": 0}
text = client.chat.completions.create(**asked).choices[0].message.content
chunks = client.chat.completions.create(**asked, stream=True)
assert text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert text == client.responses.create(model=model, input=question, temperature=0).output_text
with client.responses.stream(model=model, input=question, temperature=0) as stream:
    assert text == stream.get_final_response().output_text
message = claude.messages.create(
    model=model, messages=question, max_tokens=64, extra_body={"temperature": 0}
)
assert text == message.content[0].text
counted = claude.messages.count_tokens(model=model, messages=question).input_tokens
usage = message.usage
assert counted == usage.input_tokens + usage.cache_read_input_tokens
sys.stdout.write(
    "chat, responses and messages, whole and streamed, say the same; tokens are counted"
)
