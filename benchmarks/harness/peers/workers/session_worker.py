"""One process of `vkv bench session`: saves a session, or meets its prompt with or without it.

Told by a JSON object as the only argument; answers with one on a line of its own. With `hold`, it
then waits for a line of input, says what it has of the file in memory, waits once more, and ends.
"""

import json
import os
import random
import sys
import time


def main() -> None:
    wanted = json.loads(sys.argv[1])
    import torch
    import vkv

    torch.set_num_threads(wanted["threads"])
    tokens, path = wanted["tokens"], wanted["path"]
    generator = random.Random(wanted["seed"])
    prompt = [generator.randrange(wanted["vocab_size"]) for _ in range(tokens)]
    more = [generator.randrange(wanted["vocab_size"]) for _ in range(wanted["more_tokens"])]
    begun_s = time.perf_counter()
    with vkv.LLM(
        wanted["model"],
        device="cpu",
        dtype=wanted["dtype"],
        max_seqs=1,
        max_len=tokens + wanted["more_tokens"] + 64,
    ) as llm:
        answer = {"load_s": time.perf_counter() - begun_s}
        if wanted["does"] == "save":
            begun_s = time.perf_counter()
            llm.generate([prompt], vkv.SamplingParams(temperature=0, max_tokens=1), progress=False)
            answer["compute_s"] = time.perf_counter() - begun_s
            begun_s = time.perf_counter()
            answer["num_bytes"] = llm.save_session(path, prompt).num_bytes
            answer["save_s"] = time.perf_counter() - begun_s
        else:
            answer |= first_token(llm, wanted, [*prompt, *more])
        say(answer)
        if wanted["hold"]:
            sys.stdin.readline()
            say(in_memory(path))
            sys.stdin.readline()


def say(what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def first_token(llm, wanted, prompt):
    """Seconds to the first token, and to an open session where one is opened."""
    import vkv

    if wanted["does"] == "open cold":
        fd = os.open(wanted["path"], os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    found = {}
    begun_s = time.perf_counter()
    if wanted["does"] != "compute":
        llm.open_session(wanted["path"])
        found["open_s"] = time.perf_counter() - begun_s
    params = vkv.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (out,) = llm.generate([prompt], params, progress=False)
    found["first_token_s"] = time.perf_counter() - begun_s
    found["num_cached"] = out.num_cached_tokens
    found["token"] = out.outputs[0].token_ids[0]
    return found


def in_memory(path):
    """Resident bytes of the file in this process, and its share of them."""
    total, ours = {"Rss:": 0, "Pss:": 0}, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                ours = os.path.realpath(path) in line
            elif ours and fields[0] in total:
                total[fields[0]] += int(fields[1]) << 10
    return {"rss_bytes": total["Rss:"], "pss_bytes": total["Pss:"]}


if __name__ == "__main__":
    main()
