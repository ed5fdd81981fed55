"""What a conversation is answered depends on nothing but itself, and everybody is told an end."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import nn

from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.evaluation.questions import Question, cut
from llava_pipeline.evaluation.read import Job, Limits, read, stop_ids
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import full, let_learn
from llava_pipeline.model.processor import Processor
from llava_pipeline.model.template import PLAIN
from llava_pipeline.serving.conversation import Turn, prompt_of, question
from llava_pipeline.serving.engine import Ask, Busy, Closed, Engine, Failed, Kept, Loaded, Piece
from llava_pipeline.serving.pictures import picture_of
from llava_pipeline.serving.sampling import Sampling
from llava_pipeline.serving.text import TextStream
from llava_pipeline.spec import LoraSpec, PartSpec, TrainingSpec
from llava_pipeline.training.features import tower_features
from tests.serving.conftest import other, own, picture

SECONDS = 30.0
NUM_TOKENS = 10
Make = Callable[..., Engine]


@dataclass(eq=False)
class Asked:
    """A conversation, and all that was told of it."""

    ask: Ask
    told: list[Piece | Failed] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def hear(self, told: Piece | Failed) -> None:
        self.told.append(told)
        self.begun.set()
        if isinstance(told, Failed) or told.ended is not None:
            self.ended.set()

    def end(self) -> Piece | Failed:
        assert self.ended.wait(SECONDS), "was told no end"
        return self.told[-1]

    def text(self) -> str:
        end = self.end()
        assert isinstance(end, Piece), end
        return "".join(piece.text for piece in self.told if isinstance(piece, Piece))

    def num_ends(self) -> int:
        return sum(isinstance(told, Failed) or told.ended is not None for told in self.told)


def asked(
    llava: Llava, text: str = "Which color?", numbers: Sequence[int] = (0,), *, loaded: Loaded | None = None,
    turns: Sequence[Turn] | None = None, late: float = SECONDS, **sampling: object,
) -> Asked:  # fmt: skip
    settings = Sampling(**({"max_tokens": NUM_TOKENS} | sampling))  # type: ignore[arg-type]
    prompt = prompt_of(llava.processor, turns or [Turn("user", text, len(numbers))])
    pictures = [picture(llava, number) for number in numbers]
    one = Asked(Ask(loaded or own(llava), prompt, pictures, settings, time.monotonic() + late, lambda told: None))
    one.ask.tell = one.hear
    return one


def generated(llava: Llava, one: Asked, max_tokens: int = NUM_TOKENS) -> str:
    """What transformers' own model generates for a conversation alone, pictures and all."""
    ids = torch.tensor([list(one.ask.prompt)])
    model = copy.deepcopy(llava.model)
    model.model.multi_modal_projector = one.ask.loaded.projector
    seen = {}
    if one.ask.pictures:
        pixels = torch.stack([torch.from_numpy(picture.pixels.copy()) for picture in one.ask.pictures])
        seen = {"pixel_values": llava.processor.normalise(pixels)}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **seen, do_sample=False, max_new_tokens=max_tokens,
        eos_token_id=sorted(stop_ids(llava)), pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    return llava.processor.decode(out[0, ids.shape[1] :].tolist())


@pytest.fixture
def make(lively: Llava) -> Iterator[Make]:
    """Starts engines of the lively model, and closes them."""
    made: list[Engine] = []

    def start(**settings: int) -> Engine:
        made.append(Engine(lively, **settings))
        return made[-1]

    yield start
    for engine in made:
        engine.close(0.0)
        assert not engine.thread.is_alive()


@pytest.fixture
def engine(make: Make) -> Engine:
    return make()


def said(engine: Engine, *asks: Asked) -> list[str]:
    for one in asks:
        engine.submit(one.ask)
    return [one.text() for one in asks]


def at_once(engine: Engine, *asks: Asked) -> list[str]:
    """The answers of conversations that begin as one batch."""
    with engine.changed:  # the engine's thread waits for it, and then takes them all
        for one in asks:
            engine.submit(one.ask)
    return [one.text() for one in asks]


def various(llava: Llava) -> list[Asked]:
    """Conversations of many lengths: with a picture, several, none, an earlier round."""
    rounds = [Turn("user", "Which color?", 1), Turn("assistant", "red"), Turn("user", "And what is below it?")]
    more = [Turn("user", "Which color?", 1), Turn("assistant", "red"), Turn("user", "Are they the same?", 2)]
    return [
        asked(llava),
        asked(llava, "Is there a large circle on the left side of the picture?", (1,)),
        asked(llava, "?", (2,)),
        asked(llava, "What can you see?", ()),
        asked(llava, "Which of the two is larger?", (0, 1)),
        asked(llava, turns=rounds, numbers=(2,)),
        asked(llava, turns=more, numbers=(0, 1, 2)),
    ]


# --------------------------------------------------------------------------------------------- answers


def test_each_conversation_alone_is_answered_as_transformers_own_model_answers_it(
    lively: Llava, engine: Engine
) -> None:
    expected = [generated(lively, one) for one in various(lively)]
    assert len(set(expected)) == len(expected)
    assert [said(engine, one)[0] for one in various(lively)] == expected


def test_conversations_of_one_batch_are_answered_as_each_alone(lively: Llava, make: Make) -> None:
    asks = various(lively)
    assert len({len(one.ask.prompt) for one in asks}) >= 6
    expected = [generated(lively, one) for one in asks]
    assert at_once(make(), *asks) == expected
    backwards = various(lively)[::-1]
    assert at_once(make(max_rows=3), *backwards) == expected[::-1]


def test_an_answer_is_that_of_evaluation(lively: Llava, engine: Engine) -> None:
    texts = ["Which color?", "How many shapes are there in the picture?", "?"]
    pixels = torch.stack([torch.from_numpy(picture(lively, k).pixels.copy()) for k in range(3)])
    features = tower_features(lively.model, lively.processor.normalise(pixels))
    image = lively.processor.image_token_id
    jobs = [
        Job(Question(k, *cut(prompt_of(lively.processor, question(text, True)), image), truth=(0,)), k, True)
        for k, text in enumerate(texts)
    ]
    limits = Limits(8, NUM_TOKENS, engine.stop_ids)
    expected = [
        lively.processor.decode(list(told.answer or ())) for told in read(lively, jobs, features, limits, print)
    ]
    assert said(engine, *(asked(lively, text, (k,)) for k, text in enumerate(texts))) == expected


def test_a_template_that_leaves_out_what_is_asked_is_not_served(lively: Llava) -> None:
    own = lively.processor
    plain = Processor(own.tokenizer, PLAIN, own.images, own.num_image_tokens)
    with pytest.raises(IncompatibleParts, match=r"plain leaves out what is asked.* --stage instruct"):
        Engine(replace(lively, processor=plain))


def test_who_joins_midway_changes_nothing_for_the_others_nor_for_itself(lively: Llava, engine: Engine) -> None:
    asks = various(lively)
    lengths = [40, 3, 25, 10, 7, 30, 1]
    asks = [replace_tokens(one, length) for one, length in zip(asks, lengths, strict=True)]
    expected = [generated(lively, one, length) for one, length in zip(asks, lengths, strict=True)]
    for one in asks:
        engine.submit(one.ask)
        assert one.begun.wait(SECONDS)
    assert [one.text() for one in asks] == expected


def replace_tokens(one: Asked, length: int) -> Asked:
    new = Asked(replace(one.ask, sampling=replace(one.ask.sampling, max_tokens=length)))
    new.ask.tell = new.hear
    return new


def test_two_projectors_answer_in_one_batch_each_as_alone(lively: Llava, engine: Engine) -> None:
    loaded = [own(lively), other(lively), own(lively), other(lively, 6)]
    asks = [asked(lively, loaded=one) for one in loaded]
    expected = [generated(lively, one) for one in asks]
    assert len(set(expected)) == 3
    assert at_once(engine, *asks) == expected
    again = [asked(lively, loaded=one) for one in loaded]
    assert said(engine, *again[::-1]) == expected[::-1]


def adapters_of(llava: Llava, count: int) -> list[adapter.State]:
    """Adapters that change much, each in its own way."""
    model = copy.deepcopy(llava.model)
    spec = TrainingSpec(max_steps=1, language_model=PartSpec(mode="lora"), lora=LoraSpec(rank=4, alpha=8))
    let_learn(model, spec)
    generator = torch.Generator().manual_seed(17)
    shapes = {name: p.shape for name, p in adapter.parameters(model.model.language_model).items()}
    return [
        {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        | {adapter.SCALE: torch.tensor(2.0)}
        for _ in range(count)
    ]


def test_adapters_swap_as_projectors_do_and_answer_in_one_batch_each_as_alone(lively: Llava, engine: Engine) -> None:
    states: list[adapter.State] = [{}, *adapters_of(lively, 2)]
    plain = own(lively)
    loaded = [
        replace(plain, digest=f"{k}", adapter=engine.load_adapter(state) if state else None)
        for k, state in enumerate(states)
    ]
    asks = [asked(lively, text, (0,), loaded=one) for text in ("Which color?", "How many?") for one in loaded]
    found = at_once(engine, *asks)
    alone = copy.deepcopy(lively.model)
    adapter.remove(alone.model.language_model, str(loaded[1].adapter))
    adapter.remove(alone.model.language_model, str(loaded[2].adapter))
    expected = []
    for one, state in zip(asks, states * 2, strict=True):
        adapter.put(alone.model.language_model, state)
        expected.append(generated(replace(lively, model=alone), one))
    assert found == expected
    assert len(set(found[:3])) == 3
    assert said(engine, *(asked(lively, "Which color?", (0,), loaded=one) for one in loaded)) == expected[:3]


def test_an_adapter_goes_while_others_answer_and_the_last_leaves_the_model_as_it_was(
    lively: Llava, engine: Engine
) -> None:
    names = [engine.load_adapter(state) for state in adapters_of(lively, 2)]
    kept, gone = (replace(own(lively), digest=name, adapter=name) for name in names)
    before = said(engine, asked(lively, loaded=kept))
    engine.drop_adapter(str(gone.adapter))
    assert said(engine, asked(lively, "How many?", loaded=kept), asked(lively, loaded=kept))[1:] == before
    engine.drop_adapter(str(kept.adapter))
    one = asked(lively)
    assert said(engine, one) == [generated(lively, one)]
    assert not adapter.layers(lively.model.model.language_model)


def test_a_language_model_trained_whole_answers_beside_the_other(lively: Llava, engine: Engine) -> None:
    generator = torch.Generator().manual_seed(23)
    whole = {
        name: torch.randn(value.shape, generator=generator) * 0.3 + value for name, value in full(lively.model).items()
    }
    both = own(lively), replace(own(lively), digest="whole", engine=engine.beside(whole))
    asks = [asked(lively, text, loaded=one) for text in ("Which color?", "How many?") for one in both]
    found = at_once(engine, *asks)
    alone = copy.deepcopy(lively.model)
    projector.copy_whole(alone, whole)
    expected = [
        generated(replace(lively, model=model), one) for model, one in zip([lively.model, alone] * 2, asks, strict=True)
    ]
    assert found == expected
    assert found[0] != found[1]
    other = both[1].engine
    assert other is not None
    assert other.llava.model.model.vision_tower is lively.model.model.vision_tower
    engine.close(1.0)
    assert not other.thread.is_alive()


def test_an_adapter_that_does_not_fit_harms_nobody(lively: Llava, engine: Engine) -> None:
    (state,) = adapters_of(lively, 1)
    name = next(name for name in state if name.endswith("lora_B.weight"))
    with pytest.raises(WeightsMismatch):
        engine.load_adapter(state | {name: state[name][:-1]})
    assert not adapter.layers(lively.model.model.language_model)
    one = asked(lively)
    assert said(engine, one) == [generated(lively, one)]


def test_the_first_token_is_told_before_the_last_is_chosen(lively: Llava, engine: Engine) -> None:
    one = asked(lively, max_tokens=30)
    said(engine, one)
    pieces = [piece for piece in one.told if isinstance(piece, Piece)]
    assert pieces[0].num_tokens == 1
    assert [piece.num_tokens for piece in pieces] == sorted({piece.num_tokens for piece in pieces})


# ---------------------------------------------------------------------------------------------- caches


class Counting(nn.Module):
    """A projector that counts what it was asked to project; all else is the one within."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within, self.num_patches = within, 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.num_patches += len(features)
        out: torch.Tensor = self.within(features)
        return out


def counted(llava: Llava) -> tuple[Loaded, Counting]:
    counting = Counting(other(llava).projector)
    return Loaded("counted", counting), counting


def test_a_picture_is_read_once_for_all_that_is_asked_about_it(lively: Llava, engine: Engine) -> None:
    loaded, counting = counted(lively)
    texts = ["Which color?", "How many?", "?"]
    first = said(engine, *(asked(lively, text, loaded=loaded) for text in texts))
    again = said(engine, *(asked(lively, text, loaded=loaded) for text in texts))
    assert first == again == [generated(lively, asked(lively, text, loaded=other(lively))) for text in texts]
    assert counting.num_patches == engine.features.get(picture(lively, 0).digest).shape[0]  # type: ignore[union-attr]


def test_equal_beginnings_of_one_batch_are_read_once(lively: Llava, engine: Engine) -> None:
    loaded, counting = counted(lively)
    asks = [asked(lively, text, (number,), loaded=loaded) for text in ("a", "b", "c") for number in (0, 1)]
    at_once(engine, *asks)
    assert counting.num_patches == 2 * len(engine.features.get(picture(lively, 0).digest))  # type: ignore[arg-type]
    assert len(engine.prefixes.values) == len(engine.features.values) == 2


def test_an_engine_that_can_keep_nothing_answers_the_same(lively: Llava, make: Make) -> None:
    asks = various(lively)
    expected = [generated(lively, one) for one in asks]
    forgetful = make(cache_bytes=0)
    assert at_once(forgetful, *asks) == expected
    assert said(forgetful, *(again := various(lively))) == expected, again
    assert len(forgetful.prefixes.values) == len(forgetful.features.values) == 1


def test_what_is_kept_takes_no_more_memory_than_it_says(lively: Llava, make: Make) -> None:
    engine = make(cache_bytes=8_000)
    at_once(engine, *(asked(lively, "?", (number,)) for number in range(8)))
    prefixes, features = list(engine.prefixes.values.values()), list(engine.features.values.values())
    assert 1 < len(prefixes) < 8
    assert 1 < len(features) < 8
    assert memory_of([half for prefix in prefixes for layer in prefix.kept for half in layer]) == (
        engine.prefixes.num_bytes
    )
    assert memory_of(features) == engine.features.num_bytes


def memory_of(tensors: Sequence[torch.Tensor]) -> int:
    """Memory that cannot be freed while these are held."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_pictures_of_equal_bytes_and_other_shapes_are_never_mixed() -> None:
    pixels = np.arange(4 * 8 * 3, dtype=np.uint8)
    assert picture_of(pixels.reshape(4, 8, 3)).digest != picture_of(pixels.reshape(8, 4, 3)).digest


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=60), st.integers(0, 100))
def test_what_is_kept_stays_within_its_bytes_and_the_newest_is_there(
    puts: list[tuple[int, int]], max_bytes: int
) -> None:
    kept: Kept[int, int] = Kept(max_bytes, lambda size: size)
    for key, size in puts:
        kept.put(key, size)
        assert key in kept.values
        assert kept.num_bytes == sum(kept.values.values())
        assert kept.num_bytes <= max_bytes or len(kept.values) == 1


def test_many_short_questions_leave_nothing_but_the_caches(lively: Llava, make: Make) -> None:
    most = 30_000
    engine = make(cache_bytes=most, max_waiting=200)
    asks = [asked(lively, f"How many of {k % 7}?", (k % 50,), max_tokens=1 + k % 3) for k in range(200)]
    said(engine, *asks)
    wait_for(lambda: engine.num_running == 0)
    assert engine.rows is None
    assert not engine.owed
    assert not engine.waiting
    assert 0 < engine.prefixes.num_bytes <= most
    assert 0 < engine.features.num_bytes <= most // 4
    assert len(engine.prefixes.values) < 50


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ----------------------------------------------------------------------------------- leaving and waiting


def forever(llava: Llava, **changes: object) -> Asked:
    """A conversation that ends when it is cancelled."""
    return asked(llava, **({"max_tokens": 1 << 30, "temperature": 2.0, "seed": 1, "numbers": ()} | changes))  # type: ignore[arg-type]


def unending(engine: Engine) -> Engine:
    """No token ends an answer."""
    engine.stop_ids = frozenset()
    return engine


def test_a_row_that_leaves_changes_nothing_for_the_others(lively: Llava, make: Make) -> None:
    engine = unending(make())
    leaving = [forever(lively, numbers=(0,)), forever(lively, text="a much longer question than the other one?")]
    staying = [asked(lively, text, max_tokens=40) for text in ("Which color?", "?")]
    alone = said(unending(make()), *(asked(lively, text, max_tokens=40) for text in ("Which color?", "?")))
    for one in (leaving[0], staying[0], leaving[1], staying[1]):
        engine.submit(one.ask)
    for one in leaving:
        assert one.begun.wait(SECONDS)
        one.ask.cancelled = True
    assert [one.text() for one in staying] == alone
    wait_for(lambda: engine.num_running == 0)
    assert all(one.num_ends() == 0 for one in leaving)
    assert not engine.owed


def test_who_is_cancelled_frees_the_row_within_a_token_and_is_told_nothing_more(lively: Llava, make: Make) -> None:
    engine = unending(make(max_rows=1))
    first, second = forever(lively), asked(lively)
    engine.submit(first.ask)
    assert first.begun.wait(SECONDS)
    engine.submit(second.ask)
    assert not second.begun.wait(0.1)
    with engine.changed:
        first.ask.cancelled = True
        count = len(first.told)
    second.text()
    assert len(first.told) == count


def test_who_is_cancelled_while_waiting_is_never_begun_and_takes_nobodys_place(lively: Llava, make: Make) -> None:
    engine = unending(make(max_rows=1, max_waiting=1))
    first, second, third = forever(lively), asked(lively), asked(lively)
    engine.submit(first.ask)
    assert first.begun.wait(SECONDS)
    engine.submit(second.ask)
    second.ask.cancelled = True
    engine.submit(third.ask)
    first.ask.cancelled = True
    third.text()
    assert second.told == []


def test_more_than_may_wait_are_refused_and_the_others_are_answered(lively: Llava, make: Make) -> None:
    engine = unending(make(max_rows=1, max_waiting=2))
    first, *rest = forever(lively), asked(lively), asked(lively, "?")
    engine.submit(first.ask)
    assert first.begun.wait(SECONDS)
    for one in rest:
        engine.submit(one.ask)
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    refused = asked(lively)
    with pytest.raises(Busy):
        engine.submit(refused.ask)
    first.ask.cancelled = True
    assert all(one.text() for one in rest)
    assert refused.told == []


def test_who_waits_too_long_is_told_so_while_the_rows_are_still_taken(lively: Llava, make: Make) -> None:
    engine = unending(make(max_rows=1))
    first, second = forever(lively), asked(lively, late=0.05)
    engine.submit(first.ask)
    assert first.begun.wait(SECONDS)
    engine.submit(second.ask)
    assert second.end() == Failed("late")
    assert not first.ended.is_set()
    first.ask.cancelled = True


# --------------------------------------------------------------------------------------------- closing


def test_what_was_taken_is_answered_before_the_engine_ends(lively: Llava, make: Make) -> None:
    engine = make(max_rows=2)
    asks = various(lively)
    for one in asks:
        engine.submit(one.ask)
    engine.close(SECONDS)
    assert not engine.thread.is_alive()
    assert all(isinstance(one.end(), Piece) for one in asks)
    with pytest.raises(Closed):
        engine.submit(asked(lively).ask)


def test_who_is_not_answered_in_time_is_told_that_the_engine_closes(lively: Llava, make: Make) -> None:
    engine = unending(make(max_rows=2, max_waiting=3))
    asks = [forever(lively) for _ in range(5)]
    for one in asks[:2]:
        engine.submit(one.ask)
        assert one.begun.wait(SECONDS)
    for one in asks[2:]:
        engine.submit(one.ask)
    began = time.monotonic()
    engine.close(0.1)
    assert time.monotonic() - began < 5
    assert [one.told[-1] for one in asks] == [Failed("closed")] * 5
    assert [one.num_ends() for one in asks] == [1] * 5
    assert not engine.thread.is_alive()


class Slow(nn.Module):
    """A projector that is never done before it may be."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within, self.reached, self.may = within, threading.Event(), threading.Event()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        self.may.wait(SECONDS)
        out: torch.Tensor = self.within(features)
        return out


def test_who_is_just_being_read_is_told_too(lively: Llava, make: Make) -> None:
    engine = make()
    slow = Slow(own(lively).projector)
    one = asked(lively, loaded=Loaded("slow", slow))
    engine.submit(one.ask)
    assert slow.reached.wait(SECONDS)
    with ThreadPoolExecutor(1) as pool:
        closing: Future[None] = pool.submit(engine.close, 0.0)
        assert one.end() == Failed("closed")
        slow.may.set()
        closing.result(SECONDS)
    assert one.told == [Failed("closed")]


def test_whatever_happens_at_once_everybody_is_told_one_end_and_nothing_behind_it(lively: Llava, make: Make) -> None:
    rng = np.random.default_rng(0)
    for seconds in (0.0, 0.02, 0.1):
        engine = make(max_rows=3, max_waiting=100)
        asks = [
            asked(
                lively,
                "?",
                (int(rng.integers(3)),),
                max_tokens=int(rng.integers(1, 40)),
                late=float(rng.uniform(0, 0.3)),
            )
            for _ in range(40)
        ]
        taken = []

        def submit(some: list[Asked], engine: Engine = engine, taken: list[Asked] = taken) -> None:
            for one in some:
                try:
                    engine.submit(one.ask)
                    taken.append(one)
                except Closed:
                    return

        with ThreadPoolExecutor(3) as pool:
            doing = [pool.submit(submit, asks[:20]), pool.submit(submit, asks[20:])]
            doing.append(pool.submit(engine.close, seconds))
            for one in doing:
                one.result(SECONDS)
        assert not engine.thread.is_alive()
        assert [one.num_ends() for one in taken] == [1] * len(taken)
        assert all(one.ended.is_set() and one.told[-1] in ends(one) for one in taken)


def ends(one: Asked) -> list[Piece | Failed]:
    return [told for told in one.told if isinstance(told, Failed) or told.ended is not None]


# ---------------------------------------------------------------------------------------------- faults


class Broken(nn.Module):
    """A projector that cannot be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this projector is broken")


def not_numbers(llava: Llava) -> Loaded:
    loaded = other(llava)
    with torch.no_grad():
        for parameter in loaded.projector.parameters():
            parameter.fill_(float("nan"))
    return Loaded("nan", loaded.projector)


@pytest.mark.parametrize("kind", ["raises", "is not a number", "too few pictures", "no question", "unknown token"])
def test_a_conversation_that_breaks_the_model_takes_no_other_with_it(lively: Llava, engine: Engine, kind: str) -> None:
    bad = asked(lively, "?", (1,), loaded=not_numbers(lively) if kind == "is not a number" else None)
    if kind == "raises":
        bad.ask.loaded = Loaded("broken", Broken())
    elif kind == "too few pictures":
        bad.ask.pictures = ()
    elif kind == "no question":
        bad.ask.prompt = bad.ask.prompt[: len(engine._cut(bad.ask.prompt)[0])]
    elif kind == "unknown token":
        bad.ask.prompt = [*bad.ask.prompt, 1 << 20]
    before, beside, joining, after = (asked(lively, max_tokens=25) for _ in range(4))
    expected = generated(lively, before, 25)
    engine.submit(before.ask)
    assert before.begun.wait(SECONDS)
    with engine.changed:
        for one in (beside, bad, joining):
            engine.submit(one.ask)
    assert bad.end() == Failed("failed")
    engine.submit(after.ask)
    assert [one.text() for one in (before, beside, joining, after)] == [expected] * 4
    assert bad.told == [Failed("failed")]


def test_what_was_not_a_number_is_not_kept(lively: Llava, engine: Engine) -> None:
    bad = asked(lively, loaded=not_numbers(lively))
    engine.submit(bad.ask)
    assert bad.end() == Failed("failed")
    assert not engine.prefixes.values


def test_a_model_that_fails_tells_everybody_and_answers_the_next(lively: Llava, engine: Engine) -> None:
    asks = [asked(lively, max_tokens=1 << 20, stops=()) for _ in range(3)]
    unending(engine)
    with engine.changed:
        for one in asks:
            engine.submit(one.ask)
    for one in asks:
        assert one.begun.wait(SECONDS)
    with engine.changed:
        norm = lively.model.model.language_model.norm
        lively.model.model.language_model.norm = Broken()
    assert [one.end() for one in asks] == [Failed("failed")] * 3
    late = asked(lively)
    engine.submit(late.ask)
    assert late.end() == Failed("failed")
    assert engine.num_failures == 2  # a step, and a reading
    lively.model.model.language_model.norm = norm
    assert said(engine, asked(lively, max_tokens=4))[0]
    assert engine.num_failures == 0
    assert [one.num_ends() for one in asks] == [1] * 3


@pytest.mark.parametrize("at", [0, 3])
def test_who_cannot_be_told_is_no_longer_answered_and_the_others_are(lively: Llava, make: Make, at: int) -> None:
    engine = unending(make())
    gone, beside = forever(lively), asked(lively, max_tokens=30)
    count = 0

    def tell(told: Piece | Failed) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise RuntimeError("Event loop is closed")

    gone.ask.tell = tell
    expected = said(unending(make()), asked(lively, max_tokens=30))
    with engine.changed:
        engine.submit(gone.ask)
        engine.submit(beside.ask)
    assert [beside.text()] == expected
    wait_for(lambda: engine.num_running == 0)
    assert count == at + 1
    assert said(engine, asked(lively, max_tokens=30)) == expected


def test_who_cannot_be_told_that_it_is_late_stops_nobody(lively: Llava, engine: Engine) -> None:
    def tell(told: Piece | Failed) -> None:
        raise RuntimeError("Event loop is closed")

    gone = asked(lively, late=-1.0)
    gone.ask.tell = tell
    engine.submit(gone.ask)
    assert said(engine, asked(lively))[0]


def test_a_thread_that_works_shows_it(lively: Llava, engine: Engine) -> None:
    before = engine.beat
    said(engine, asked(lively))
    assert before < engine.beat <= time.monotonic()


# ---------------------------------------------------------------------------------------------- chance


def test_an_equal_seed_gives_an_equal_answer_whatever_it_is_batched_with(lively: Llava, make: Make) -> None:
    chance = {"temperature": 1.0, "max_tokens": 20}
    alone = said(make(), asked(lively, seed=7, **chance))[0]
    engine = make()
    crowd = [asked(lively, "a longer question that was asked before", (), seed=k, **chance) for k in range(5)]
    again = [asked(lively, seed=7, **chance) for _ in range(2)]
    for one in (*crowd[:3], again[0], *crowd[3:], again[1]):
        engine.submit(one.ask)
        assert one.begun.wait(SECONDS)
    assert [one.text() for one in again] == [alone, alone]
    assert said(engine, asked(lively, seed=8, **chance))[0] != alone


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-40},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 2.0, "top_p": 0},
    ],
)
def test_chance_that_is_left_no_room_is_greedy(lively: Llava, engine: Engine, settings: dict[str, float]) -> None:
    greedy, drawn = said(engine, asked(lively), asked(lively, seed=-1, **settings))
    assert greedy == drawn


@pytest.mark.parametrize("seed", [-(1 << 70), -1, 0, (1 << 64) - 1, 1 << 90])
def test_every_number_is_a_seed(lively: Llava, engine: Engine, seed: int) -> None:
    one, two = (asked(lively, temperature=1.0, seed=seed) for _ in range(2))
    assert len(set(said(engine, one, two))) == 1


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("longest", [1, 2, 9])
def test_an_answer_has_no_more_tokens_than_it_may(lively: Llava, make: Make, longest: int) -> None:
    one = asked(lively, max_tokens=longest)
    said(unending(make()), one)
    assert one.told[-1] == replace(one.told[-1], num_tokens=longest, ended="length")  # type: ignore[arg-type]


def test_an_answer_that_the_model_ends_says_so(lively: Llava, engine: Engine) -> None:
    whole = said(unending(engine), asked(lively))[0]
    ids = lively.processor.tokenizer.encode(whole, add_special_tokens=False)
    engine.stop_ids = frozenset(ids[3:])
    one = asked(lively)
    text = said(engine, one)[0]
    assert whole.startswith(text)
    assert text != whole
    end = one.end()
    assert isinstance(end, Piece)
    assert end.ended == "stop"


def test_a_stop_string_ends_the_answer_wherever_it_lies_between_tokens(lively: Llava, make: Make) -> None:
    engine = unending(make())
    whole = said(engine, asked(lively, max_tokens=30))[0]
    assert len(whole) > 20
    for start in range(2, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        one = asked(lively, max_tokens=30, stops=(stop, "never said"))
        assert said(engine, one)[0] == whole[: whole.find(stop)].rstrip()
        end = one.end()
        assert isinstance(end, Piece)
        assert end.ended == "stop"


def fallback() -> Callable[[list[int]], str]:
    """Decodes as Llama's tokenizers do: characters that are no words are bytes, spoiled where they are cut."""
    vocabulary = {"<unk>": 256, "▁": 257, "▁red": 258, "blue": 259} | {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return lambda ids: str(tokenizer.decode(ids))


def test_characters_of_several_bytes_one_after_the_other_are_whole() -> None:
    stream = TextStream(fallback())
    ids = [*"日本語".encode(), 258, *"émü😀".encode(), 259]
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == "日本語 redémü😀blue"
    assert max(map(len, pieces)) <= 4


WORDS = st.sampled_from([[258], [259], [257], *([*character.encode()] for character in "aé日😀\n")])


@given(st.lists(WORDS, max_size=30))
def test_pieces_are_the_text_for_tokenizers_that_fall_back_to_bytes(words: list[list[int]]) -> None:
    decode = fallback()
    ids = [token for word in words for token in word]
    stream = TextStream(decode)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == decode(ids).strip()
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_no_tokens_however_broken_are_too_much(ids: list[int], stops: list[str]) -> None:
    for decode in (fallback(), lambda some: bytes(some).decode("utf-8", "replace")):
        stream = TextStream(decode, stops)
        for token in ids:
            stream.push(token)
            if stream.stopped:
                break
        stream.finish()


ANYTHING = st.text(max_size=30)


@given(ANYTHING, st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=150)
def test_pieces_are_the_text_less_what_follows_a_stop_string(processor: Processor, text: str, stops: list[str]) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(processor.words, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    shown = "".join([*pieces, stream.finish()])
    whole = processor.words(ids).lstrip()
    ends = [place for stop in stops if (place := whole.find(stop)) >= 0]
    assert shown == whole[: min(ends, default=len(whole))].rstrip()
