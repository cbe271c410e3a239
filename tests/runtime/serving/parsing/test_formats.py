"""Each way of writing calls and reasoning: what is read of it, whole and a character at a time."""

import json

import pytest
from answers import Answer, as_coder, as_hermes, by_names, read

CITY = '{"city": "Ulm"}'
CALL = ("weather", CITY)

HERMES = [
    ("plain text", Answer("plain text")),
    (" a < b\n", Answer(" a < b\n")),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>', (CALL,)),
    ('{"name": "weather", "arguments": {}}', Answer('{"name": "weather", "arguments": {}}')),
    (
        'Let me look.\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n',
        Answer("Let me look.", calls=(("now", "{}"),)),
    ),
    # Content behind a call keeps the space that parts it from what was before.
    ('A\n<tool_call>{"name": "now"}</tool_call> B', Answer("A\n B", calls=(("now", "{}"),))),
    ('<tool_call>{"name": "now"}</tool_call>\nB\n', Answer("B", calls=(("now", "{}"),))),
    # Arguments first, other members, no arguments, null, JSON within a string.
    ('<tool_call>{"arguments": {"city": "Ulm"}, "name": "weather"}</tool_call>', (CALL,)),
    ('<tool_call>{"id": {"a": [1]}, "name": "now", "x": null}</tool_call>', (("now", "{}"),)),
    ('<tool_call>{"name": "now", "arguments": null}</tool_call>', (("now", "{}"),)),
    ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>', (CALL,)),
    # An unknown tool is given as it is.
    ('<tool_call>{"name": "fly", "arguments": {"to": 1}}</tool_call>', (("fly", '{"to": 1}'),)),
    # What models get wrong: a tag, a brace or a comma, a line break within a string.
    ('<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}', (CALL,)),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}</tool_call>', (CALL,)),
    (
        '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}}</tool_call>.',
        Answer(".", calls=(CALL,)),
    ),
    ('<tool_call>{"name": "now"}\n{"name": "now"}</tool_call>', (("now", "{}"), ("now", "{}"))),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}</tool_call>',
        (("f", '{"a": "1\\n2"}'),),
    ),
    # Arguments that are no JSON are given as text; the closing tag ends them.
    ('<tool_call>{"name": "f", "arguments": {"a": x}}</tool_call>', (("f", '{"a": x}'),)),
    (
        '<tool_call>{"name": "f", "arguments": {"a": [1}</tool_call>B',
        Answer("B", calls=(("f", '{"a": [1}'),)),
    ),
    # What is no call is content as it stands.
    ("say <tool_call>no</tool_call>", Answer("say <tool_call>no</tool_call>")),
    ("<tool_call>{'name': 'now'}</tool_call>", Answer("<tool_call>{'name': 'now'}</tool_call>")),
    ('<tool_call>{"x": 1}</tool_call>', Answer('<tool_call>{"x": 1}</tool_call>')),
    ("</tool_call>", Answer("</tool_call>")),
    ("a <tool", Answer("a <tool")),
    ("<tool_calls>", Answer("<tool_calls>")),
    # Cut off: arguments as far as they came, or text without the marker.
    ('<tool_call>{"name": "weather", "arguments": {"city": "U', (("weather", '{"city": "U'),)),
    ('<tool_call>{"name": "weather", "argu', (("weather", ""),)),
    ('Hm <tool_call>\n{"name": "wea', Answer('Hm {"name": "wea')),
    ("<tool_call>\n", Answer()),
]
LLAMA = [
    ('{"name": "weather", "parameters": {"city": "Ulm"}}', (CALL,)),
    ('\n{"type": "function", "name": "weather", "parameters": {"city": "Ulm"}}\n', (CALL,)),
    ('<|python_tag|>{"name": "weather", "arguments": {"city": "Ulm"}}', (CALL,)),
    (
        '{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "now", "parameters": {}}',
        (CALL, ("now", "{}")),
    ),
    ('{"name": "weather", "parameters": {"city": "Ulm"}}; so', Answer("; so", calls=(CALL,))),
    # JSON that the user asked for.
    ('{"name": "Ann", "age": 7}', Answer('{"name": "Ann", "age": 7}')),
    ('{"name": "Ann"}', Answer('{"name": "Ann"}')),
    ('{"name": "Ann", "parameters": 3}', Answer('{"name": "Ann", "parameters": 3}')),
    ('{"a": {"name": "f", "parameters": {}}}', Answer('{"a": {"name": "f", "parameters": {}}}')),
    ('[{"name": "f", "parameters": {}}]', Answer('[{"name": "f", "parameters": {}}]')),
    ('So: {"name": "f", "parameters": {}}', Answer('So: {"name": "f", "parameters": {}}')),
    ('<|python_tag|>search("x")', Answer('search("x")')),
]
MISTRAL = [
    (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}, "id": "123456789"}]',
        (CALL,),
    ),
    (
        'Ok[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "now"}] then',
        Answer("Ok then", calls=(CALL, ("now", "{}"))),
    ),
    ('[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}', (CALL,)),
    ('[TOOL_CALLS]weather{"city": "Ulm"}[TOOL_CALLS]now[ARGS]{}', (CALL, ("now", "{}"))),
    ('[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Ulm"}', (CALL,)),
    ('[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]"}', (("f", '{"a": "[TOOL_CALLS]"}'),)),
    ('[TOOL_CALLS]f[ARGS]{"a": [1[TOOL_CALLS]now[ARGS]{}', (("f", '{"a": [1'), ("now", "{}"))),
    ("[TOOL_CALLS] not so", Answer("[TOOL_CALLS] not so")),
    ("[TOOL_CALLS][1]", Answer("[TOOL_CALLS][1]")),
    ("[TOOL", Answer("[TOOL")),
    ("[TOOL_CALLS]wea", Answer("wea")),
]
CODER = [
    (
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        Answer("I look.", calls=(("weather", '{"city": "Ulm", "days": 3}'),)),
    ),
    ("<function=now>\n</function>", (("now", "{}"),)),
    (
        as_coder("weather", {"city": '"a"\n\n<b>\\'}),
        (("weather", '{"city": "\\"a\\"\\n\\n<b>\\\\"}'),),
    ),
    (as_coder("weather", {"city": "12"}), (("weather", '{"city": "12"}'),)),
    (as_coder("weather", {"exact": "True"}), (("weather", '{"exact": true}'),)),
    (as_coder("weather", {"exact": "None"}), (("weather", '{"exact": null}'),)),
    (as_coder("weather", {"near": ["Au", "é"]}), (("weather", '{"near": ["Au", "\\u00e9"]}'),)),
    # No value of its type is a string, and so is what no schema tells of.
    (as_coder("weather", {"days": "soon"}), (("weather", '{"days": "soon"}'),)),
    (as_coder("fly", {"to": 1}), (("fly", '{"to": "1"}'),)),
    # Tags that are missing.
    ("<function=weather><parameter=city>Ulm</function>", (CALL,)),
    ("<function=weather><parameter=city>Ulm</tool_call>", (CALL,)),
    ("<tool_call>no</tool_call>", Answer("<tool_call>no</tool_call>")),
    ("<function=>", Answer("<function=>")),
    # Cut off.
    ("<function=weather><parameter=city>\nUl", (("weather", '{"city": "Ul'),)),
    ("<tool_call><function=weat", Answer("weat")),
]
HARMONY = [
    ("<|channel|>final<|message|>Hello<|return|>", Answer("Hello")),
    (
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi",
        Answer("Hi", "Hm"),
    ),
    (
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Ulm"}<|call|>',
        (CALL,),
    ),
    (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Ulm"}', (CALL,)),
    ("<|channel|>commentary to=functions.now<|message|><|call|>", (("now", "{}"),)),
    ("<|channel|>analysis to=python<|message|>print(1)<|call|>", (("python", "print(1)"),)),
    ("<|channel|>commentary<|message|>First,<|end|>", Answer("First,")),
    ("no channels", Answer("no channels")),
    ("<|channel|>final says nothing", Answer("final says nothing")),
    ("<|channel|>ana", Answer()),
    (f"<|channel|>{' ' * 9999}so", Answer(f"{' ' * 9999}so")),
    (
        '<|channel|>commentary to=functions.f<|message|>{"a": "<|end|>"}<|call|>',
        (("f", '{"a": "<|end|>"}'),),
    ),
]
TABLE = [
    *[("hermes", text, answer) for text, answer in HERMES],
    *[("llama3_json", text, answer) for text, answer in LLAMA],
    *[("mistral", text, answer) for text, answer in MISTRAL],
    *[("qwen3_coder", text, answer) for text, answer in CODER],
    *[("openai", text, answer) for text, answer in HARMONY],
]


@pytest.mark.parametrize(("name", "text", "answer"), TABLE)
def test_what_is_read_of_a_text(
    name: str, text: str, answer: Answer | tuple[tuple[str, str], ...]
) -> None:
    expected = Answer(calls=answer) if isinstance(answer, tuple) else answer
    answers = by_names(name, "openai" if name == "openai" else "none")
    assert read(answers, [text]) == expected
    assert read(answers, text) == expected


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nHi\n", "", Answer("Hi\n", "Hm.")),
        ("\n<think></think>Hi", "", Answer("Hi")),
        ("Hm.\n</think>\n\nHi", "…assistant\n<think>\n", Answer("Hi", "Hm.")),
        ("<think>Hm</think>Hi", "<think>", Answer("Hi", "Hm")),
        ("Hi </think>", "<think>\n\n</think>\n\n", Answer("Hi </think>")),
        ("\nHi", "what is <think>?\nassistant:", Answer("\nHi")),
        ("a <think> b", "", Answer("a <think> b")),
        ("<thin", "", Answer("<thin")),
        ("<think>Hm </thi", "", Answer("", "Hm </thi")),
        ("<think>so", "", Answer("", "so")),
    ],
)
def test_reasoning_stands_where_the_answer_or_the_prompt_opens_it(
    text: str, prompt: str, answer: Answer
) -> None:
    for pieces in ([text], text):
        assert read(by_names("hermes", "think"), pieces, prompt=prompt) == answer


def test_a_call_within_reasoning_is_a_call_if_it_is_whole() -> None:
    text = f"<think>so{as_hermes('now', {})} and <tool_call> is a tag</think>Hi"
    answer = Answer("Hi", "so\n and <tool_call> is a tag", (("now", "{}"),))
    assert read(by_names("hermes", "think"), text) == answer


def test_mistral_has_marks_of_its_own_for_reasoning() -> None:
    text = "[THINK]Hm[/THINK]Ok[TOOL_CALLS]now[ARGS]{}"
    assert read(by_names("mistral", "mistral"), text) == Answer("Ok", "Hm", (("now", "{}"),))


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "qwen3_coder"])
def test_without_tools_or_by_choice_nothing_is_a_call(name: str) -> None:
    texts = [text for own, text, _ in TABLE if own == name]
    assert texts
    for text in texts:
        assert read(by_names(name), text, tools=None) == Answer(text)
        assert read(by_names(name), text, tool_choice="none") == Answer(text)


def test_harmony_has_calls_as_content_without_tools_and_reasoning_unparsed() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
    )
    assert read(by_names("openai", "openai"), text, tools=None) == Answer("{}", "Hm")
    assert read(by_names("openai"), text) == Answer("Hm", calls=(("now", "{}"),))


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("<|start|>assistant", "<|channel|>final<|message|>Hi", Answer("Hi")),
        ("<|start|>assistant<|channel|>analysis<|message|>Hm", " so<|end|>", Answer("", "so")),
        ("<|start|>assistant<|channel|>analysis", "<|message|>Hm<|end|>", Answer("", "Hm")),
        ("<|start|>user<|message|>x<|end|>", "Hi", Answer("Hi")),
    ],
)
def test_harmony_goes_on_with_what_the_prompt_began(prompt: str, text: str, answer: Answer) -> None:
    for pieces in ([text], text):
        assert read(by_names("openai", "openai"), pieces, prompt=prompt) == answer


def test_messages_of_one_channel_are_parted() -> None:
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b"
        "<|end|><|start|>assistant<|channel|>final<|message|>c"
    )
    assert read(by_names("openai", "openai"), text) == Answer("c", "a\nb")


def test_half_a_character_in_an_escape_goes_no_further() -> None:
    bad = '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'
    assert read(by_names("hermes"), [bad]) == Answer(bad)
    text = '<tool_call>{"name": "now", "arguments": "\\ud83d"}</tool_call>'
    ((_, arguments),) = read(by_names("hermes"), [text]).calls
    assert json.loads(arguments) == "\ud83d"
    arguments.encode()
