"""What a request may say, how a refusal is worded, and which turns the model reads."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llava_pipeline.serving import wire
from llava_pipeline.serving.conversation import Turn
from llava_pipeline.serving.wire import ChatRequest, Rejected

URL = "data:image/png;base64,AAAA"
SIZE = 4096  # characters that a refusal has at most: what a client sent is not sent back to it


def user(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image(url: Any = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL} if url is None else url}


def asked(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages or [user()]), **more}


def read(body: Any) -> ChatRequest:
    """As FastAPI reads it: what JSON gives, and nothing is made of anything else."""
    return ChatRequest.model_validate(json.loads(json.dumps(body)))


def refused(body: Any) -> Rejected:
    try:
        read(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return wire.refusal_of(first | {"loc": ("body", *first["loc"])})  # type: ignore[arg-type,typeddict-item]
    raise AssertionError(f"{body} was accepted")


# ---- what is accepted ----

ACCEPTED: dict[str, dict[str, Any]] = {
    "every name for the longest answer": {"max_tokens": 5, "max_completion_tokens": 6},
    "whole numbers where fractions may be": {"temperature": 1, "top_p": 1},
    "the ends of the ranges": {"temperature": 2.0, "top_p": 1.0, "seed": -(2**63), "max_tokens": 1},
    "the other ends": {"temperature": 0.0, "top_p": 1e-9, "seed": 2**63 - 1, "max_tokens": 1_000_000},
    "one stop": {"stop": "."},
    "four stops": {"stop": ["a", "b", "c", "d"]},
    "no stop": {"stop": []},
    "a stream with its usage": {"stream": True, "stream_options": {"include_usage": True}},
    "what is only asked not to be done": {
        "n": 1, "tools": [], "tool_choice": "none", "functions": [], "function_call": "auto", "logprobs": False,
        "response_format": {"type": "text"}, "modalities": ["text"], "top_logprobs": 0, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0,
    },
    "who asks and what is billed": {
        "user": "me", "safety_identifier": "x", "prompt_cache_key": "k", "service_tier": "auto", "store": False,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "reasoning_effort": "low", "verbosity": "low",
        "prompt_cache_retention": "24h",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_parameter_that_can_be_met_or_changes_nothing_is_accepted(name: str) -> None:
    read(asked(**ACCEPTED[name]))


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"messages"}))
def test_a_parameter_that_is_null_is_as_one_that_is_not_there(name: str) -> None:
    assert read(asked(**{name: None})) == read(asked())


@pytest.mark.parametrize(
    "content",
    ["", "words", [words("a")], [words("a"), words("b")], [image(), words("a")], [image(URL)], [words("a"), image()],
     [image({"url": URL, "detail": "low"})], [image({"url": URL, "detail": "original"})]],
)  # fmt: skip
def test_a_question_is_a_string_or_parts(content: Any) -> None:
    read(asked(user(content)))


def test_the_newer_name_of_the_longest_answer_wins() -> None:
    assert read(asked(max_tokens=5, max_completion_tokens=6)).sampling(9).max_tokens == 6
    assert read(asked(max_tokens=5)).sampling(9).max_tokens == 5
    assert read(asked()).sampling(9).max_tokens == 9


def test_sampling_is_greedy_unless_a_temperature_is_given() -> None:
    plain = read(asked()).sampling(9)
    assert (plain.temperature, plain.top_p, plain.seed, plain.stops) == (0.0, 1.0, None, ())
    told = read(asked(temperature=0.5, top_p=0.25, seed=7, stop="x")).sampling(9)
    assert (told.temperature, told.top_p, told.seed, told.stops) == (0.5, 0.25, 7, ("x",))
    assert read(asked(stop=["x", "y"])).sampling(9).stops == ("x", "y")


# ---- what is refused, and how ----

REFUSED: dict[str, tuple[Any, str, str | None]] = {
    "a body that is a list": ([], "invalid_value", None),
    "a body that is a word": ("x", "invalid_value", None),
    "a body that is nothing": (None, "invalid_value", None),
    "no messages": ({}, "missing_required_parameter", "messages"),
    "an empty list of messages": ({"messages": []}, "invalid_value", "messages"),
    "messages that are a word": ({"messages": "hello"}, "invalid_value", "messages"),
    "messages that are null": ({"messages": None}, "invalid_value", "messages"),
    "too many messages": ({"messages": [user()] * 10_000}, "invalid_value", "messages"),
    "a message that is a word": ({"messages": ["x"]}, "invalid_value", "messages[0]"),
    "a message without a role": (asked({"content": "x"}), "invalid_value", "messages[0].role"),
    "a role that is null": (asked({"role": None, "content": "x"}), "invalid_value", "messages[0].role"),
    "another role": (asked({"role": "tool", "content": "x"}), "invalid_value", "messages[0].role"),
    "no content": (asked({"role": "user"}), "missing_required_parameter", "messages[0].content"),
    "content that is null": (asked(user(None)), "invalid_value", "messages[0].content"),
    "content that is a number": (asked(user(5)), "invalid_value", "messages[0].content"),
    "content that is an object": (asked(user({})), "invalid_value", "messages[0].content"),
    "content without parts": (asked(user([])), "invalid_value", "messages[0].content"),
    "too many parts": (asked(user([words("x")] * 65)), "invalid_value", "messages[0].content"),
    "a part without a type": (asked(user([{"text": "x"}])), "invalid_value", "messages[0].content[0].type"),
    "another type of part": (asked(user([{"type": "audio"}])), "invalid_value", "messages[0].content[0].type"),
    "a part that is a word": (asked(user(["x"])), "invalid_value", "messages[0].content[0]"),
    "text that is a number": (
        asked(user([words("x"), {"type": "text", "text": 5}])), "invalid_value", "messages[0].content[1].text"),
    "an unknown key of a text part": (
        asked(user([words("x") | {"a": 1}])), "unknown_parameter", "messages[0].content[0].a"),
    "a picture without its url": (
        asked(user([image({})])), "missing_required_parameter", "messages[0].content[0].image_url.url"),
    "a picture's url that is a number": (
        asked(user(), user([image({"url": 5})])), "invalid_value", "messages[1].content[0].image_url.url"),
    "a picture that is null": (asked(user([image(0)])), "invalid_value", "messages[0].content[0].image_url"),
    "another detail": (
        asked(user([image({"url": URL, "detail": "x"})])), "invalid_value", "messages[0].content[0].image_url.detail"),
    "a picture of the system's": (
        asked({"role": "system", "content": [image()]}, user()), "invalid_value", "messages[0].content[0].type"),
    "an unknown key of a message": (asked(user(age=5)), "unknown_parameter", "messages[0].age"),
    "an unknown key called body": (asked(body=1), "unknown_parameter", "body"),
    "an unknown key called content": (asked(content={"x": 1}), "unknown_parameter", "content"),
    "a chat template": (asked(chat_template="{{ x }}"), "unknown_parameter", "chat_template"),
    "a template's arguments": (asked(chat_template_kwargs={}), "unknown_parameter", "chat_template_kwargs"),
    "more keys than are known": (asked(**{f"k{n}": 1 for n in range(100)}), "invalid_value", None),
    "documents": (asked(documents=[]), "unknown_parameter", "documents"),
    "an answer that called a tool": (
        asked(user(), {"role": "assistant", "content": "x", "tool_calls": [{}]}, user()),
        "invalid_value", "messages[1].tool_calls"),
    "a temperature that is a word": (asked(temperature="hot"), "invalid_value", "temperature"),
    "a temperature that is a number as a word": (asked(temperature="1"), "invalid_value", "temperature"),
    "a temperature below nothing": (asked(temperature=-1), "invalid_value", "temperature"),
    "a temperature far too high": (asked(temperature=1e9), "invalid_value", "temperature"),
    "a temperature that is no number": (asked(temperature=float("nan")), "invalid_value", "temperature"),
    "a temperature without end": (asked(temperature=float("inf")), "invalid_value", "temperature"),
    "a temperature that is true": (asked(temperature=True), "invalid_value", "temperature"),
    "no share": (asked(top_p=0), "invalid_value", "top_p"),
    "more than everything": (asked(top_p=2), "invalid_value", "top_p"),
    "no tokens": (asked(max_tokens=0), "invalid_value", "max_tokens"),
    "less than no tokens": (asked(max_tokens=-5), "invalid_value", "max_tokens"),
    "far too many tokens": (asked(max_tokens=1_000_000_000), "invalid_value", "max_tokens"),
    "tokens as a fraction": (asked(max_tokens=5.0), "invalid_value", "max_tokens"),
    "tokens as a boolean": (asked(max_tokens=True), "invalid_value", "max_tokens"),
    "tokens as a word": (asked(max_completion_tokens="5"), "invalid_value", "max_completion_tokens"),
    "a seed of more than 64 bits": (asked(seed=2**64), "invalid_value", "seed"),
    "a seed that is a boolean": (asked(seed=False), "invalid_value", "seed"),
    "five stops": (asked(stop=["x"] * 5), "invalid_value", "stop"),
    "a hundred thousand stops": (asked(stop=["x"] * 100_000), "invalid_value", "stop"),
    "an empty stop": (asked(stop=["x", ""]), "invalid_value", "stop[1]"),
    "a stop that is empty": (asked(stop=""), "invalid_value", "stop"),
    "a stop that is a number": (asked(stop=[1]), "invalid_value", "stop[0]"),
    "a stream as a number": (asked(stream=1), "invalid_value", "stream"),
    "an unknown option of a stream": (asked(stream_options={"x": 1}), "unknown_parameter", "stream_options.x"),
    "a model that is a number": (asked(model=5), "invalid_value", "model"),
    "metadata that is nested": (asked(metadata={"a": {}}), "invalid_value", "metadata.a"),
    "several answers": (asked(n=2), "unsupported_parameter", "n"),
    "a million answers": (asked(n=1_000_000), "unsupported_parameter", "n"),
    "tools": (asked(tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
    "a choice of tools": (asked(tool_choice="required"), "unsupported_parameter", "tool_choice"),
    "functions": (asked(functions=[{}]), "unsupported_parameter", "functions"),
    "a call of a function": (asked(function_call={"name": "f"}), "unsupported_parameter", "function_call"),
    "JSON": (asked(response_format={"type": "json_object"}), "unsupported_parameter", "response_format.type"),
    "sound": (asked(modalities=["text", "audio"]), "unsupported_parameter", "modalities"),
    "likelihoods": (asked(logprobs=True), "unsupported_parameter", "logprobs"),
    "the likeliest tokens": (asked(top_logprobs=5), "unsupported_parameter", "top_logprobs"),
    "a bias": (asked(logit_bias={"5": 100}), "unsupported_parameter", "logit_bias"),
    "a huge bias": (
        asked(logit_bias={str(n): 1 for n in range(20_000)}), "unsupported_parameter", "logit_bias"),
    "a penalty": (asked(presence_penalty=0.5), "unsupported_parameter", "presence_penalty"),
    "another penalty": (asked(frequency_penalty=-1), "unsupported_parameter", "frequency_penalty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_met_is_refused_by_its_parameter(name: str) -> None:
    body, code, param = REFUSED[name]
    told = refused(body)
    assert (told.status, told.code, told.param) == (400, code, param), told.message
    assert told.message.endswith(".")
    assert "None" not in told.message
    if code == "unsupported_parameter":
        assert param is not None
        assert wire.UNSUPPORTED[param.partition(".")[0]] in told.message


@pytest.mark.parametrize("place", ["request", "message", "metadata"])
def test_a_refusal_is_short_however_long_the_name_that_it_tells(place: str) -> None:
    name = "x" * 1_000_000
    body = {
        "request": asked(**{name: 1}), "message": asked(user(**{name: 1})), "metadata": asked(metadata={name: 1}),
    }[place]  # fmt: skip
    told = refused(body)
    assert len(told.message) + len(told.param or "") < SIZE


def test_half_a_character_is_refused_and_can_be_told() -> None:
    for body in (asked(user("a \ud800")), asked(user([words("\udfff")])), asked(**{"\ud800": 1})):
        told = refused(body)
        assert told.status == 400
        f"{told.message}{told.param}".encode()  # as it goes over the wire


# ---- wild inputs ----

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = [*ChatRequest.model_fields, "unknown", "body", ""]
LIKELY = st.sampled_from(
    [0, 1, -1, 2, 0.5, "", "x", "text", "auto", "none", [], ["x"], [""], {}, {"type": "text"}, {"include_usage": True},
     {"a": "b"}, ["text"], ["text", "text"], [words("x")], [image()], [user()], [image(URL), words("")], 2**63, 2**64,
     1_000_001, "x" * 257, ["x"] * 5, True, False, None]
)  # fmt: skip
VALUES = LIKELY | JUNK
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", None]), "content": VALUES},
    optional={"name": VALUES, "tool_calls": VALUES, "refusal": VALUES, "x": VALUES},
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | VALUES, max_size=4) | VALUES},
    optional={name: VALUES for name in NAMES if name != "messages"},
)
ONE_CHANGED = st.tuples(st.sampled_from(NAMES), VALUES).map(lambda pair: asked() | {pair[0]: pair[1]})


@settings(max_examples=200, deadline=None)
@given(BODIES | ONE_CHANGED | JUNK)
def test_whatever_a_body_says_it_is_read_or_refused_in_one_sentence(body: Any) -> None:
    try:
        request = read(body)
    except ValidationError:
        told = refused(body)
        assert told.status == 400
        assert told.message
        assert len(told.message) < SIZE
        return
    assert request.sampling(5).max_tokens >= 1
    if request.messages[-1].role != "user":
        return
    turns = wire.turns_of(request.messages)
    assert turns[-1].role == "user"
    assert all(before.role != after.role for before, after in pairwise(turns))
    assert sum(turn.num_pictures for turn in turns) == len(wire.pictures_of(request))


def whole_floats(value: Any) -> bool:
    """JSON's schemas call 5.0 an integer; here it is none."""
    if isinstance(value, dict):
        return any(map(whole_floats, value.values()))
    if isinstance(value, list):
        return any(map(whole_floats, value))
    return isinstance(value, float) and value.is_integer()


SCHEMA = jsonschema.Draft202012Validator(ChatRequest.model_json_schema())


@settings(max_examples=200, deadline=None)
@given(ONE_CHANGED | BODIES)
def test_the_schema_that_is_published_says_what_is_accepted(body: Any) -> None:
    body = json.loads(json.dumps(body))
    if whole_floats(body) or type(body.get("logprobs")) is int:  # in Python 0 is False
        return
    assert SCHEMA.is_valid(body) == is_accepted(body)


def is_accepted(body: Any) -> bool:
    try:
        read(body)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_schema_allows_what_is_accepted(name: str) -> None:
    SCHEMA.validate(asked(**ACCEPTED[name]))


NOT_SAID_BY_A_SCHEMA = {"a temperature that is no number", "a temperature without end", "tokens as a fraction"}


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - NOT_SAID_BY_A_SCHEMA))
def test_the_schema_forbids_what_is_refused(name: str) -> None:
    assert not SCHEMA.is_valid(REFUSED[name][0])


# ---- which turns are read ----


def turns(*messages: dict[str, Any]) -> list[Turn]:
    return wire.turns_of(read(asked(*messages)).messages)


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_the_systems_words_are_read_before_the_first_question() -> None:
    assert turns(system("Be short."), user("a")) == [Turn("user", "Be short.\na")]
    assert turns(system("Be short.", "developer"), user("a")) == [Turn("user", "Be short.\na")]
    assert turns(system("1"), system([words("2"), words("3")]), user("a")) == [Turn("user", "1\n2\n3\na")]


def test_the_systems_words_go_first_wherever_they_stand() -> None:
    said = turns(user("a"), assistant("b"), system("Be short."), user("c"))
    assert said == [Turn("user", "Be short.\na"), Turn("assistant", "b"), Turn("user", "c")]


def test_a_side_that_speaks_twice_has_one_turn_with_all_its_pictures() -> None:
    said = turns(user([image(), words("a")]), user([image(), words("b")]), assistant("c"), assistant("d"), user("e"))
    assert said == [Turn("user", "a\nb", 2), Turn("assistant", "c\nd"), Turn("user", "e")]


def test_the_pictures_of_a_turn_are_counted_wherever_they_stand_among_its_words() -> None:
    assert turns(user([words("a"), image(), words("b"), image()])) == [Turn("user", "a\nb", 2)]
    assert turns(user([image()])) == [Turn("user", "", 1)]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    said = turns(system("s"), assistant("Hello!"), user("a"))
    assert said == [Turn("assistant", "Hello!"), Turn("user", "s\na")]


@pytest.mark.parametrize("last", [assistant("b"), system("b"), system("b", "developer")])
def test_the_last_word_has_to_be_a_users(last: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as told:
        turns(user("a"), last)
    assert (told.value.status, told.value.param) == (400, "messages[1].role")


def test_pictures_come_in_the_order_of_the_turns_with_the_names_of_their_parameters() -> None:
    first, second, third = (f"{URL}{number}" for number in range(3))
    request = read(
        asked(user([words("a"), image(first)]), assistant("b"), user([image(second), image({"url": third})]))
    )
    assert wire.pictures_of(request) == [
        ("messages[0].content[1].image_url.url", first),
        ("messages[2].content[0].image_url.url", second),
        ("messages[2].content[1].image_url.url", third),
    ]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answered = wire.Answered(content="A circle.").model_dump()
    more = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    assert turns(user("a"), answered | more, user("b"))[1] == Turn("assistant", "A circle.")
    assert turns(user("a"), answered | {"annotations": [], "tool_calls": []}, user("b"))[1].text == "A circle."


# ---- what is said back ----


def test_usage_adds_up_and_tells_the_tokens_of_pictures() -> None:
    told = wire.usage(10, 4, 3)
    assert (told.prompt_tokens, told.completion_tokens, told.total_tokens) == (10, 3, 13)
    assert told.prompt_tokens_details.image_tokens == 4
