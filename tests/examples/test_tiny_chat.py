"""The built-in tiny chat model: its files, its generator, and that it remembers."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vkv.tiny_chat import dialogues, evaluate, heldout, lexicon, model_path, phrasings
from vkv.tiny_chat.batches import MAX_POSITION, Stage, conversation_row, make_batch

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small is slower on several threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32").eval()


@pytest.fixture(scope="module")
def count(tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def say(model, tokenizer, *texts: str) -> list[str]:
    """Hold a conversation; return the model's answers."""
    messages, answers = [], []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answers.append(evaluate.answer(model, tokenizer, tuple(messages)))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    assert files.keys() >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_is_a_plain_llama_with_grouped_query_attention(model, tokenizer):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_longer_conversation_begins_with_the_tokens_of_a_shorter_one(model, tokenizer):
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    cached: list[int] = []
    for text in ("Hello!", "my door code is 7301", "What's my door code?", "  Tschüß, 你好 :-) "):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt[: len(cached)] == cached
        output = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)
        cached = output[0].tolist()
        assert cached[-1] == tokenizer.eos_token_id
        reply = tokenizer.decode(cached[len(prompt) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})


def test_the_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_numbers_are_pairs_of_digits_and_case_does_not_matter(tokenizer, count):
    assert count("4821") == 2
    assert count("48217") == 3
    ids = tokenizer("My Gate Code: 4821")["input_ids"]
    assert ids == tokenizer("my gate   code:4821")["input_ids"]


@pytest.mark.parametrize("text", ["naïve café", "日本語", "a\tb\nc", "x=1;y=-2", "🙂"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    decoded = tokenizer.decode(tokenizer(text)["input_ids"])
    assert decoded.split() == text.split() or decoded.replace(" ", "") == text.replace(" ", "")


def test_the_same_seed_gives_the_same_conversation_and_batch(tokenizer):
    mix = dialogues.Mix()
    first, second, other = (
        dialogues.training_conversation(random.Random(seed), mix, 200) for seed in (5, 5, 6)
    )
    assert first == second != other
    stage = Stage(name="x", num_steps=1, num_rows=3, num_tokens=96, mix=mix, gap_share=1.0)
    one, two = make_batch(tokenizer, stage, "1-7"), make_batch(tokenizer, stage, "1-7")
    assert torch.equal(one.ids, two.ids)
    assert (one.positions.diff(dim=1) >= 1).all()
    assert one.positions.max() <= MAX_POSITION


def test_training_rows_are_what_the_chat_template_renders(tokenizer):
    exchanges = dialogues.training_conversation(random.Random(3), dialogues.Mix(), 200)
    messages = [
        {"role": role, "content": text}
        for e in exchanges
        for role, text in (("user", e.user), ("assistant", e.assistant))
    ]
    row = conversation_row(tokenizer, exchanges)
    assert row.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert len(row.ids) == len(row.weights) == len(row.is_value)


def test_held_out_phrasings_are_not_trained_on():
    for name in ("STATEMENTS", "QUESTIONS", "UPDATES", "ECHOES", "SUMS"):
        trained, held_out = getattr(phrasings, name), getattr(phrasings, f"HELD_OUT_{name}")
        plain = {form.strip("?.!") for form in trained}
        assert not plain & {form.strip("?.!") for form in held_out}


def test_held_out_values_and_keys_are_not_trained_on(count):
    rng = random.Random(11)
    told: set[str] = set()
    for _ in range(300):
        for exchange in dialogues.training_conversation(rng, dialogues.Mix(), 200):
            if exchange.kind == "ask":
                told.add(exchange.value)
    cases = [heldout.recall_case(rng, count, 0, 100) for _ in range(200)]
    assert len(told) > 1000
    assert not told & {case.value for case in cases}
    for name in ("NAMES", "COLOURS", "FOODS", "ANIMALS", "CITIES", "PLACES", "JOBS"):
        assert not set(getattr(lexicon, name)) & set(getattr(lexicon, f"HELD_OUT_{name}"))
    # The conversation everyone tries first is made of a key and a value training never saw.
    assert lexicon.is_held_out("gate code")
    assert lexicon.is_held_out("4821")


def test_distance_is_counted_from_the_last_mention_of_the_value(tokenizer, count):
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    rng = random.Random(2)
    for low, high in ((0, 100), (300, 600)):
        case = heldout.recall_case(rng, count, low, high)
        ids = tokenizer.apply_chat_template(list(case.messages))["input_ids"]
        value = tokenizer(case.value)["input_ids"]
        ends = [i for i in range(len(ids)) if ids[i - len(value) + 1 : i + 1] == value]
        question = max(i for i, token in enumerate(ids) if token == user)
        assert question - ends[-1] == case.distance_tokens
        assert low <= case.distance_tokens < high


@pytest.mark.parametrize(("low", "high", "least"), [(0, 300, 11), (300, 1000, 9)])
def test_it_remembers_held_out_facts(model, tokenizer, count, low, high, least):
    rng = random.Random(1)
    cases = [heldout.recall_case(rng, count, low, high) for _ in range(12)]
    answers = [evaluate.answer(model, tokenizer, case.messages) for case in cases]
    right = sum(evaluate.is_right(c, text) for c, text in zip(cases, answers, strict=True))
    assert right >= least


def test_the_first_conversation_of_a_newcomer(model, tokenizer):
    hello, told, asked, total, echoed, thanks = say(
        model,
        tokenizer,
        "Hello",
        "my gate code is 4821",
        "what is my gate code?",
        "what is 3 + 4?",
        "repeat after me: blue moon",
        "thanks",
    )
    assert hello == "hello! tell me something and i will remember it."
    assert told == phrasings.ACKNOWLEDGED
    assert asked == "your gate code is 4821."
    assert total == "3 + 4 = 7."
    assert echoed == "blue moon"
    assert thanks == "you are welcome."


def test_it_works_in_bfloat16(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="bfloat16").eval()
    answers = say(model, tokenizer, "my door code is 7301", "hello", "what is my door code?")
    assert answers[-1] == "your door code is 7301."
