"""What tokens are in bytes is what the tokenizer's own decoder makes of them."""

import pytest
import vocabularies
import zoo
from tokenizers import Regex, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vkv.runtime.execution.token_bytes import SPECIAL, TextCutter, token_bytes
from vkv.tiny_chat import model_path
from vkv.vmem.errors import InvalidSamplingParams

_TEXTS = ['{"name": "Grüße, 日本語"}', " the 12  names", "é", "x\n\ty", "<0x41></s><end>"]


def _tiny() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize("make", [vocabularies.byte_level, vocabularies.byte_fallback, _tiny])
@pytest.mark.parametrize("text", _TEXTS)
def test_a_text_is_cut_into_tokens_that_spell_it(make: object, text: str) -> None:
    tokenizer = make()  # type: ignore[operator]
    table = token_bytes(tokenizer, len(tokenizer), ())
    cutter = TextCutter(tokenizer, table)
    by_bytes = {data: i for i, data in reversed(list(enumerate(table)))}
    cutter.longest_first = lambda text: [by_bytes[bytes([byte])] for byte in text.encode()]
    ids = cutter(text)
    assert b"".join(table[i] for i in ids) == text.encode()
    seen = tokenizer.decode([ids[0]] * 2, skip_special_tokens=False)
    assert tokenizer.decode([ids[0], ids[0], *ids], skip_special_tokens=False) == seen + text


def test_a_text_is_cut_as_the_model_was_taught() -> None:
    tokenizer = vocabularies.byte_level()
    cutter = TextCutter(tokenizer, token_bytes(tokenizer, len(tokenizer), ()))
    assert cutter(b'{"name": ') == tokenizer.encode('{"name": ', add_special_tokens=False)
    tokenizer = vocabularies.byte_fallback()
    cutter = TextCutter(tokenizer, token_bytes(tokenizer, len(tokenizer), ()))
    assert cutter('{"name": "') == tokenizer.convert_tokens_to_ids(['{"', "name", '":', '▁"'])


def test_what_the_vocabulary_lacks_ends_the_cut() -> None:
    tokenizer = zoo.letter_tokenizer()
    table = token_bytes(tokenizer, len(tokenizer), ())
    cutter = TextCutter(tokenizer, table)
    cutter.longest_first = lambda text: [table.index(c.encode()) for c in text if c.isascii()]
    assert cutter("größe") == [table.index(b"g"), table.index(b"r")]


def test_special_tokens_ends_and_empty_ids_are_no_text() -> None:
    tokenizer = vocabularies.byte_level()
    letter = tokenizer.convert_tokens_to_ids("a")
    table = token_bytes(tokenizer, 600, [1, letter])
    assert len(table) == 600
    assert table[1] == SPECIAL + b"<end>"
    assert table[letter] == SPECIAL + b"a"
    assert all(table[i].startswith(SPECIAL) for i in range(len(tokenizer), 600))
    assert token_bytes(tokenizer, 300, [1, letter]) == table[:300]


def test_a_decoder_that_looks_around_is_refused() -> None:
    with pytest.raises(InvalidSamplingParams, match="its decoder is WordPiece"):
        token_bytes(vocabularies.word_piece(), 4, ())


def test_a_decoder_that_says_otherwise_is_refused() -> None:
    tokenizer = vocabularies.byte_fallback()
    parts = [decoders.Replace(Regex("[a-f]"), "x"), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    with pytest.raises(InvalidSamplingParams, match="do not know what token"):
        token_bytes(tokenizer, len(tokenizer), ())


def test_a_tokenizer_of_another_library_is_refused() -> None:
    with pytest.raises(InvalidSamplingParams, match=r"tokenizer\.json"):
        token_bytes(object(), 4, ())  # type: ignore[arg-type]
