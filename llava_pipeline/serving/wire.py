"""OpenAI's chat completions: what a request may say, what is said back, and how a refusal is worded.

What is not known is refused by name. What is known and changes nothing here (who asks, what is billed) is read over;
what would change the answer and cannot be done (tools, several answers, a schema) may only be asked not to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from llava_pipeline.serving.conversation import Turn
from llava_pipeline.serving.sampling import Sampling

MAX_MESSAGES, MAX_PARTS = 256, 64
MAX_PARAM = 200  # characters of a name that are told back
TAGS = ("text", "image_url", "system", "developer", "user", "assistant")  # alternatives of a part and of a message
MAX_KEYS = 64  # more than any object that is known here has
MAX_TOKENS = 1_000_000  # a context's length is what bounds them; this keeps numbers within reason
Finish = Literal["stop", "length"]
NO_TOOLS, AS_IS = "this model calls no tools", "this model's likelihoods are taken as they are"
UNSUPPORTED = {
    "n": "one answer is given to a question", "tools": NO_TOOLS, "tool_choice": NO_TOOLS, "functions": NO_TOOLS,
    "function_call": NO_TOOLS, "response_format": "only text is written", "modalities": "only text is written",
    "logprobs": "likelihoods are not told", "top_logprobs": "likelihoods are not told", "logit_bias": AS_IS,
    "presence_penalty": AS_IS, "frequency_penalty": AS_IS,
}  # fmt: skip


class Rejected(Exception):
    """A request that cannot be answered: status, and code, sentence and parameter of the error object."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(code)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, given: Any) -> Any:
        """Each key that is not known costs an error, and a body has room for a million of them."""
        if isinstance(given, dict) and len(given) > MAX_KEYS:
            raise ValueError(f"an object has at most {MAX_KEYS} keys here, this one {len(given)}")
        return given


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ---- what a request may say ----


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("half_a_character", "Half of a surrogate pair is not text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]  # JSON can say what no tokenizer reads


class TextPart(_Read):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Read):
    """A picture: a data URI, or an address where the server allows its host."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="Changes nothing.")


def _with_url(given: Any) -> Any:
    return {"url": given} if isinstance(given, str) else given


class ImagePart(_Read):
    """A picture among the words."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_with_url, json_schema_input_type=ImageUrl | str)]


def _kind(content: Any) -> str:
    return "text" if isinstance(content, str) else "parts"


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
Words = Annotated[Annotated[Text, Tag("text")] | Annotated[TextParts, Tag("parts")], Discriminator(_kind)]
Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_kind)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class SystemMessage(_Read):
    """How to answer; it is read before the first question."""

    role: Literal["system", "developer"]
    content: Words
    name: str | None = None


class UserMessage(_Read):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Read):
    """What the model said before, as a client repeats it."""

    role: Literal["assistant"]
    content: Words
    name: str | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=4), Tag("parts")], Discriminator(_kind)
]
Zero = Annotated[float, Field(ge=0, le=0)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class StreamOptions(_Read):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Changes nothing.")


class TextFormat(_Read):
    """The one format there is."""

    type: Literal["text"]


class ChatRequest(_Read):
    """Turns, and how the next one is to be chosen."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = Field(None, max_length=256, description="An alias or a version; the default alias.")
    max_tokens: Tokens | None = Field(None, description="Longest answer; what the context leaves, 256 at most.")
    max_completion_tokens: Tokens | None = Field(None, description="The same, by its newer name, which wins.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, as evaluated, unless another is given.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Equal seeds give equal answers.")
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # what may only be asked not to be done
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    # what changes nothing here
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_KEYS)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def sampling(self, longest: int) -> Sampling:
        """How the answer is chosen, at most ``longest`` tokens of it."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.wanted_tokens or longest, temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p, seed=self.seed, stops=tuple(stops),
        )  # fmt: skip

    @property
    def wanted_tokens(self) -> int | None:
        """Longest answer, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def pictures_of(request: ChatRequest) -> list[tuple[str, str]]:
    """Every picture in the order of the turns: the name of its parameter, and its url."""
    return [
        (f"messages[{number}].content[{place}].image_url.url", part.image_url.url)
        for number, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """The turns that were said: a system's words before the first question, and one turn where a side spoke twice.

    Raises:
        Rejected: the last word is not a user's.
    """
    if not isinstance(messages[-1], UserMessage):
        param = f"messages[{len(messages) - 1}].role"
        raise Rejected(400, "invalid_value", "The last message has to be of the role user.", param)
    system = [_words(message) for message in messages if isinstance(message, SystemMessage)]
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, SystemMessage):
            continue
        text = _words(message)
        if system and isinstance(message, UserMessage):
            text, system = "\n".join([*system, text]), []
        turns = _with(turns, Turn(message.role, text, _num_pictures(message)))
    return turns


def _with(turns: list[Turn], turn: Turn) -> list[Turn]:
    if not turns or turns[-1].role != turn.role:
        return [*turns, turn]
    last = turns[-1]
    both = Turn(turn.role, f"{last.text}\n{turn.text}", last.num_pictures + turn.num_pictures)
    return [*turns[:-1], both]


def _words(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _num_pictures(message: Message) -> int:
    return 0 if isinstance(message.content, str) else sum(isinstance(part, ImagePart) for part in message.content)


# ---- what is said back ----


class PromptDetails(_Told):
    """What the prompt's tokens are."""

    cached_tokens: int
    image_tokens: int


class Usage(_Told):
    """Tokens that were read, those of pictures among them, and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage(prompt_tokens: int, image_tokens: int, completion_tokens: int) -> Usage:
    """What an answer took."""
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=0, image_tokens=image_tokens),
    )  # fmt: skip


class Answered(_Told):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Told):
    """The one answer."""

    index: Literal[0] = 0
    message: Answered
    logprobs: None = None
    finish_reason: Finish


class Completion(_Told):
    """A whole answer. ``model`` is the version that gave it, whatever name it was asked by."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


class Delta(_Told):
    """What is new in a piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Told):
    """A piece of the one answer."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Finish | None = None


class Chunk(_Told):
    """A piece of an answer as a server-sent event. What was not set is not written."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class Model(_Told):
    """A name to ask by. ``alias`` is null for the name of one version."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["llava-pipeline"] = "llava-pipeline"
    alias: str | None
    default: bool
    version: str
    digest: str
    scores: dict[str, float | str]
    run_url: str


class ModelList(_Told):
    """Every name to ask by."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(_Told):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(_Told):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


class Ready(_Told):
    """What answers now."""

    ready: bool
    model: str
    version: str | None
    run_id: str | None
    digest: str | None
    loaded_at: float | None = Field(description="Seconds since the epoch.")
    last_error: str | None = Field(description="Why a newer version does not answer.")


class Health(_Told):
    """Whether the process works."""

    healthy: bool
    loop_seconds: float = Field(description="How long the event loop takes to come round.")
    engine_seconds: float = Field(description="How long ago the engine's thread came round.")


class Sample(_Told):
    """A question about a picture that was held back from training."""

    picture: str
    question: str
    truth: str


class Samples(_Told):
    """Questions to begin with."""

    data: list[Sample]


# ---- refusals ----


def refusal_of(error: ErrorDetails) -> Rejected:
    """What is wrong with a request, by the first thing that was found."""
    loc = error["loc"][1:]  # without the part of the request that it was found in
    param = _param(loc)[:MAX_PARAM] or None
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return Rejected(400, "invalid_json", "The body is not JSON.")
    if kind == "missing":
        return Rejected(400, "missing_required_parameter", f"{param or 'The body'} is missing.", param)
    if kind == "extra_forbidden":
        return Rejected(400, "unknown_parameter", f"{param} is not known here.", param)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = str(context["discriminator"]).strip("'")
        expected = f", one of {context['expected_tags']}" if "expected_tags" in context else ""
        return Rejected(400, "invalid_value", f"{param}.{key} has to be given{expected}.", f"{param}.{key}")
    if (name := str(loc[0]) if loc else "") in UNSUPPORTED:
        return Rejected(400, "unsupported_parameter", f"{name}: {UNSUPPORTED[name]}.", param)
    message = error["msg"]
    return Rejected(400, "invalid_value", f"{param or 'The body'}: {message[:1].lower()}{message[1:]}.", param)


def _param(loc: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].text`` from where Pydantic found it, without the names of the alternatives it tried."""
    written = ""
    for before, part, after in zip(("", *loc), loc, (*loc[1:], None), strict=False):
        if isinstance(part, int):
            written += f"[{part}]"
        elif not (before in ("content", "stop") or (isinstance(before, int) and part in TAGS and after is not None)):
            written += f".{part}" if written else part
    return written
