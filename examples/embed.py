import vkv

with vkv.LLM(kv_memory="64MiB") as llm:
    chats = [[{"role": "user", "content": text}] for text in ("hello", "what is 3 + 4?")]
    for output in llm.chat(chats, vkv.SamplingParams(temperature=0, max_tokens=64)):
        print(output.outputs[0].text)
    print(f"{llm.stats().physical_bytes:,} of {llm.stats().virtual_bytes:,} bytes are real")
