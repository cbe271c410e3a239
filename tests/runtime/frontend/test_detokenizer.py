"""Incremental text against full decodes, on tokenizers trained here from a few sentences."""

import functools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from vkv.runtime.frontend.detokenizer import IncrementalDetokenizer, TokenTexts
from vkv.runtime.request.outputs import Logprob

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "世界你好,今天天气很好。日本語のテキストもあります。",
    "Emoji: 🙂🙂 👩‍💻 🚀 and naïve café façade.",
    "def main():\n    return {'a': 1}\n",
]
SPECIALS = ["<s>", "</s>"]


@functools.cache
def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's or Qwen's: a token is any run of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, vocab_size=330, initial_alphabet=alphabet)


@functools.cache
def metaspace() -> Tokenizer:
    """As T5's: words carry their leading space, which the first word of a text loses."""
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, vocab_size=300)


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's or Gemma's: unknown characters become one token per byte."""
    spec = json.loads(metaspace().to_str())
    vocab = spec["model"]["vocab"]
    for character in ("好", "🙂"):  # all but its own merges are spelt in bytes
        vocab.pop(character, None)
    kept = [m for m in spec["model"]["merges"] if {*m, "".join(m)} <= vocab.keys()]
    pieces = [*vocab, *(f"<0x{byte:02X}>" for byte in range(256))]
    spec["model"] |= {
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": kept,
        "byte_fallback": True,
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def trained(tokenizer: Tokenizer, **options: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(special_tokens=SPECIALS, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


TOKENIZERS: list[Callable[[], Tokenizer]] = [byte_level, metaspace, byte_fallback]
each_tokenizer = pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)

TEXTS = st.lists(
    st.sampled_from([*CORPUS, " ", "a", "好", "🙂", "👩‍💻", "é", "\n", "x y", "  ", "the", "."])
    | st.text(max_size=4),
    min_size=1,
    max_size=6,
).map("".join)


class Pieces:
    """A tokenizer whose token i is the i-th of some given strings."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in token_ids)


def stream(detokenizer: IncrementalDetokenizer, token_ids: Sequence[int]) -> list[str]:
    """Every chunk, the flush last; on the way, `text` must be the sum of the chunks."""
    chunks: list[str] = []
    for token_id in token_ids:
        chunks.append(detokenizer.append(token_id))
        assert detokenizer.text == "".join(chunks)
        assert detokenizer.text_from(3) == detokenizer.text[3:]
        assert detokenizer.num_characters == len(detokenizer.text)
    chunks.append(detokenizer.finish())
    assert detokenizer.text == "".join(chunks)
    return chunks


# --- text ------------------------------------------------------------------------------------


@each_tokenizer
@settings(max_examples=80, deadline=None)
@given(prompt=TEXTS, output=TEXTS, data=st.data())
def test_streamed_text_is_the_full_decode(
    make: Callable[[], Tokenizer], prompt: str, output: str, data: st.DataObject
) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode(prompt + output).ids
    cut = data.draw(st.integers(0, len(token_ids)))
    before = tokenizer.decode(token_ids[:cut])
    chunks = stream(IncrementalDetokenizer(tokenizer, token_ids[:cut]), token_ids[cut:])
    whole = tokenizer.decode(token_ids)
    # Where the cut goes through a character, its first bytes are not yet text.
    shown = len(before) if whole.startswith(before) else len(before.rstrip("\ufffd"))
    assert "".join(chunks) == whole[shown:]
    assert "\ufffd" in whole or "\ufffd" not in "".join(chunks)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 329), max_size=40))
def test_any_bytes_at_all_stream_to_their_full_decode(token_ids: list[int]) -> None:
    tokenizer = byte_level()
    chunks = stream(IncrementalDetokenizer(tokenizer), token_ids)
    assert "".join(chunks) == tokenizer.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_broken_byte_tokens_raise_nothing_and_take_nothing_back(data: st.DataObject) -> None:
    tokenizer = byte_fallback()
    any_token = st.integers(0, tokenizer.get_vocab_size() - 1)
    token_ids = data.draw(st.lists(any_token, max_size=40))
    stream(IncrementalDetokenizer(tokenizer, data.draw(st.lists(any_token, max_size=5))), token_ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_a_character_comes_whole_or_not_at_all(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode("好🙂🦜").ids
    assert len(token_ids) > 4  # at least one of them is spelt in bytes
    chunks = stream(IncrementalDetokenizer(tokenizer), token_ids)
    assert "".join(chunks) == "好🙂🦜"
    assert "" in chunks[:-1]
    assert all("\ufffd" not in chunk for chunk in chunks)


def test_a_character_begun_by_the_prompt_belongs_to_the_output() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("say 🦜!").ids
    first_byte = next(i for i in range(9) if "\ufffd" in tokenizer.decode(token_ids[: i + 1]))
    prompt, output = token_ids[: first_byte + 1], token_ids[first_byte + 1 :]
    assert tokenizer.decode(prompt) == "say \ufffd"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt), output)) == "🦜!"


def test_every_cut_through_bytes_and_replacement_characters_streams_on() -> None:
    tokenizer = byte_fallback()
    text = "a好\ufffd好🙂\ufffd\ufffd好"
    token_ids = tokenizer.encode(text).ids
    for cut in range(len(token_ids)):
        before = tokenizer.decode(token_ids[:cut])
        shown = len(before) if text.startswith(before) else len(before.rstrip("\ufffd"))
        chunks = stream(IncrementalDetokenizer(tokenizer, token_ids[:cut]), token_ids[cut:])
        assert "".join(chunks) == text[shown:], cut


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_a_prompt_may_end_with_the_replacement_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    prompt = tokenizer.encode("say \ufffd").ids
    output = tokenizer.encode("say \ufffd🙂🙂!").ids[len(prompt) :]
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt), output)) == "🙂🙂!"


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("a🦜").ids[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(map(detokenizer.append, token_ids)) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert (detokenizer.finish(), detokenizer.append(5), detokenizer.text) == ("", "", "a\ufffd")


@pytest.mark.parametrize("make", [metaspace, byte_fallback], ids=lambda make: make.__name__)
def test_a_space_leads_the_output_only_after_a_prompt(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    quick = tokenizer.encode("quick brown").ids
    brown = tokenizer.encode("brown").ids
    assert "".join(stream(IncrementalDetokenizer(tokenizer), quick)) == "quick brown"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, quick), brown)) == " brown"
    # Special tokens at the prompt's end have no text, but words stand before them all the same.
    specials = [tokenizer.token_to_id("</s>")] * 30
    after = IncrementalDetokenizer(tokenizer, quick + specials)
    assert "".join(stream(after, brown)) == " brown"
    only = IncrementalDetokenizer(tokenizer, specials)
    assert "".join(stream(only, brown)) == "brown"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level()
    token_ids = [*tokenizer.encode("fox").ids, 1, *tokenizer.encode(" dog").ids]
    hidden = IncrementalDetokenizer(tokenizer, [0])
    shown = IncrementalDetokenizer(tokenizer, [0], skip_special_tokens=False)
    assert "".join(stream(hidden, token_ids)) == "fox dog"
    assert "".join(stream(shown, token_ids)) == "fox</s> dog"


@each_tokenizer
def test_a_step_stays_cheap_through_text_and_through_skipped_tokens(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = make()
    seen: list[int] = []

    class Counting:
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            seen.append(len(token_ids))
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    words = tokenizer.encode("the quick brown fox " * 40).ids
    token_ids = words + [1] * 300 + tokenizer.encode(" the end").ids
    chunks = stream(IncrementalDetokenizer(Counting(), words), token_ids)
    assert "".join(chunks) == tokenizer.decode(words + token_ids)[len(tokenizer.decode(words)) :]
    assert max(seen) <= 32


def bytes_of(text: str) -> list[int]:
    """A token of `byte_level` for each byte."""
    ((spelt, _),) = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    return [byte_level().token_to_id(letter) for letter in spelt]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(bytes_of("好🙂é")), min_size=15, max_size=90))
def test_long_runs_of_broken_bytes_stream_to_their_full_decode(token_ids: list[int]) -> None:
    """Whole characters among them included, wherever what is final is cut off."""
    chunks = stream(IncrementalDetokenizer(byte_level()), token_ids)
    assert "".join(chunks) == byte_level().decode(token_ids)


@pytest.mark.parametrize("text", ["好", "🙂"])
def test_a_step_stays_cheap_through_bytes_that_make_no_character(text: str) -> None:
    seen: list[int] = []

    class Counting:
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            seen.append(len(token_ids))
            return byte_level().decode(token_ids, skip_special_tokens=skip_special_tokens)

    first = bytes_of(text)[:1]
    token_ids = [*byte_level().encode("fox").ids, *first * 300, *bytes_of(text)]
    chunks = stream(IncrementalDetokenizer(Counting()), token_ids)
    assert "".join(chunks) == "fox" + "\ufffd" * 300 + text
    assert max(seen) <= 32
    shown = "".join(chunks[:200])
    assert shown.count("\ufffd") > 150  # while they come


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("fox").ids
    detokenizer = IncrementalDetokenizer(tokenizer, [5000])
    assert "".join(stream(detokenizer, [*token_ids, 5000, *token_ids])) == "foxfox"


def test_the_wrapper_of_transformers_gives_the_same_text() -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    prompt = byte_level().encode("世界").ids
    output = byte_level().encode(" 🚀 , fox .").ids
    chunks = stream(IncrementalDetokenizer(wrapped, prompt), output)
    assert "".join(chunks) == " 🚀 , fox ."


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_a_tokenizer_written_in_python_streams_too(text: str) -> None:
    tokenizer = ByT5Tokenizer()  # a token for each byte
    token_ids = tokenizer.encode("prompt: " + text, add_special_tokens=False)
    chunks = stream(IncrementalDetokenizer(tokenizer, token_ids[:8]), token_ids[8:])
    assert "".join(chunks) == text


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = IncrementalDetokenizer(None, [1, 2])
    assert stream(detokenizer, [3, 4]) == ["", "", ""]
    assert detokenizer.stopped is None


# --- texts of single tokens --------------------------------------------------------------------


def test_entries_are_given_their_tokens_text() -> None:
    tokenizer = byte_level()
    (space,) = tokenizer.encode(" ").ids
    table = {space: Logprob(-0.5, 1), 1: Logprob(-2.0, 2)}
    texts = {space: Logprob(-0.5, 1, " "), 1: Logprob(-2.0, 2, "</s>")}
    assert TokenTexts(tokenizer, [1, 1]).fill(table) == texts
    assert TokenTexts(None).fill(table) == table


@pytest.mark.parametrize("make", [metaspace, byte_fallback], ids=lambda make: make.__name__)
def test_a_words_leading_space_is_part_of_its_token(make: Callable[[], Tokenizer]) -> None:
    """Decoded alone, the two tokens have the same text: the decoder strips the first space."""
    tokenizer = make()
    vocab = tokenizer.get_vocab()
    word = next(word for word in sorted(vocab) if "▁" not in word and "▁" + word in vocab)
    bare, spaced = vocab[word], vocab["▁" + word]
    table = {bare: Logprob(-1.0, 1), spaced: Logprob(-1.0, 1)}
    for before in ("the fox", "the", "世"):  # that begins a text, too
        texts = TokenTexts(tokenizer, tokenizer.encode(before).ids).fill(table)
        assert [texts[i].decoded_token for i in (bare, spaced)] == [word, " " + word]
    texts = TokenTexts(tokenizer, [0]).fill(table)  # a special token says nothing, but stands there
    assert [texts[i].decoded_token for i in (bare, spaced)] == [word, " " + word]


@each_tokenizer
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_the_texts_of_a_texts_tokens_join_to_it(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    before = tokenizer.encode("the fox").ids
    token_ids = tokenizer.encode("the fox" + text).ids
    if token_ids[: len(before)] != before:  # the seam fell into a token
        return
    texts = TokenTexts(tokenizer, before)
    pieces = []
    for token_id in token_ids[len(before) :]:
        pieces.append(texts.fill({token_id: Logprob(-1.0, 1)})[token_id].decoded_token)
        texts.advance(token_id)
    halves = {"\ufffd"}  # what a token shows that ends within a character
    whole = tokenizer.decode(token_ids, skip_special_tokens=False)[len("the fox") :]
    if not halves & set("".join(pieces)):
        assert "".join(pieces) == whole


def test_half_a_character_is_shown_as_such_and_then_whole() -> None:
    tokenizer = byte_fallback()
    bytes_of_it = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "好".encode()]
    texts = TokenTexts(tokenizer, tokenizer.encode("the fox").ids)
    shown = []
    for token_id in bytes_of_it:
        shown.append(texts.fill({token_id: Logprob(-1.0, 1)})[token_id].decoded_token)
        texts.advance(token_id)
    assert shown == ["\ufffd", "\ufffd", "好"]


# --- stop strings ------------------------------------------------------------------------------


def reference_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest of them."""
    for end in range(len(text) + 1):
        complete = [string for string in stops if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abc\n", max_size=4), max_size=10), STOPS, st.booleans())
def test_stop_strings_cut_alike_however_the_text_is_cut_into_tokens(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text, stopped = reference_stop("".join(pieces), stops, include)
    detokenizer = IncrementalDetokenizer(
        Pieces(pieces), stop=stops, include_stop_str_in_output=include
    )
    fed = ""
    for i, piece in enumerate(pieces):
        detokenizer.append(i)
        fed += piece
        assert text.startswith(detokenizer.text)
        if detokenizer.stopped is not None:
            break
        held = fed[len(detokenizer.text) :]
        # No more is held than the beginning of a stop string, and nothing if it will be shown.
        assert any(stop.startswith(held) and stop != held for stop in stops) or not held
        assert not (include and held)
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stopped) == (text, stopped)


def test_a_stop_string_across_tokens_is_held_back_and_never_shown() -> None:
    detokenizer = IncrementalDetokenizer(Pieces(["Hi U", "se", "r", ": x"]), stop=["User:"])
    assert [detokenizer.append(i) for i in range(4)] == ["Hi ", "", "", ""]
    assert (detokenizer.stopped, detokenizer.text) == ("User:", "Hi ")
    assert (detokenizer.append(0), detokenizer.finish()) == ("", "")


def test_what_was_held_back_comes_once_it_is_harmless() -> None:
    pieces = ["Hi U", "se", "less ", "Us"]
    chunks = stream(IncrementalDetokenizer(Pieces(pieces), stop=["User:"]), range(4))
    assert chunks == ["Hi ", "", "Useless ", "", "Us"]


def test_an_included_stop_string_ends_the_text() -> None:
    detokenizer = IncrementalDetokenizer(
        Pieces(["one. T", "wo"]), stop=["."], include_stop_str_in_output=True
    )
    assert (detokenizer.append(0), detokenizer.stopped) == ("one.", ".")


def test_stop_strings_count_from_min_tokens_on() -> None:
    pieces = ["a.", "b", "c.", "d"]
    early = IncrementalDetokenizer(Pieces(pieces), stop=["."], min_tokens=2)
    assert [early.append(i) for i in range(4)] == ["a.", "b", "c", ""]
    exact = IncrementalDetokenizer(Pieces(pieces), stop=["."], min_tokens=1)
    assert (exact.append(0), exact.stopped) == ("a", ".")


@each_tokenizer
def test_stop_strings_of_many_bytes(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode("今天天气很好。the end").ids
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["气很"])
    assert "".join(stream(detokenizer, token_ids)) == "今天天"
    assert detokenizer.stopped == "气很"
