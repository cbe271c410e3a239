"""Files of keys and values under attack: writers killed, bits flipped, files cut; no wrong token.

    python tests/attacks/sessions.py [--kills 200] [--damages 2000]

A few minutes. `tests/allocator/test_kv_file.py` and `tests/runtime/frontend/sessions` are its short
forms.
"""

import argparse
import contextlib
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import saved_files
import zoo
from vkv import LLM
from vkv.vmem.errors import KVFileError

PAGE = 4096
OPTIONS = {"device": "cpu", "dtype": "float32", "max_seqs": 2, "page_bytes": PAGE}


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def kill(folder: Path, times: int) -> None:
    """Kill writers: the file is the old one or the new one, and what they leave is removed."""
    start = time.perf_counter()
    left = saved_files.kill_writers(folder / "killed.kv", times, seed=11)
    seconds = time.perf_counter() - start
    say(f"{times} writers killed, {left} in the middle of a file: {seconds:.0f} s")


def damage(folder: Path, times: int) -> None:
    """Damage a session in every way: the tokens stay the same."""
    start = time.perf_counter()
    checkpoint = folder / "model"
    checkpoint.mkdir()
    zoo.save_checkpoint(checkpoint)
    (prompt, tail) = zoo.random_prompts([300, 20], seed=3)
    path = folder / "session.kv"
    generator = random.Random(5)
    num_used = 0
    with LLM(checkpoint, **OPTIONS) as llm:
        llm.save_session(path, prompt)
        whole = path.read_bytes()
        llm.trim()
        expected = llm.generate([[*prompt, *tail]], zoo.greedy())[0].outputs[0].token_ids
        for number in range(times):
            path.write_bytes(_damaged(bytearray(whole), generator))
            with contextlib.suppress(KVFileError):
                llm.open_session(path)
            llm.trim()
            (out,) = llm.generate([[*prompt, *tail]], zoo.greedy(), progress=False)
            if out.outputs[0].token_ids != expected:
                sys.exit(f"damage {number} changed the tokens; the file is kept as {_keep(path)}")
            num_used += bool(out.num_cached_tokens)
        llm.engine.cache.check_invariants()
    seconds = time.perf_counter() - start
    say(f"{times} damaged files, {num_used} of use in part: no wrong token, {seconds:.0f} s")


def _damaged(content: bytearray, generator: random.Random) -> bytearray:
    place = generator.randrange(len(content))
    match generator.randrange(5):
        case 0:
            content[place] ^= 1 << generator.randrange(8)
        case 1:
            size = len(content[place : place + 600])
            content[place : place + size] = bytes(size)
        case 2:
            del content[place:]
        case 3:
            content[place : place + PAGE] = content[:PAGE]
        case 4:
            content[place:place] = generator.randbytes(generator.randint(1, 9))
    return content


def _keep(path: Path) -> Path:
    kept = Path(tempfile.gettempdir()) / "damaged.kv"
    kept.write_bytes(path.read_bytes())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="writers to kill")
    parser.add_argument("--damages", type=int, default=2000, help="files to damage")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)  # of every damage
    with tempfile.TemporaryDirectory() as folder:
        kill(Path(folder), chosen.kills)
    with tempfile.TemporaryDirectory() as folder:
        damage(Path(folder), chosen.damages)


if __name__ == "__main__":
    main()
