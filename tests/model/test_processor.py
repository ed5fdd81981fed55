"""What a model reads is what the template writes: nothing a person types becomes a special token, and of all the words
only the assistant's are learned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

from llava_pipeline.contracts import Backbones
from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.model.families import CLIP_MEAN, CLIP_STD
from llava_pipeline.model.processor import IGNORE_INDEX, Encoded, ImageSettings, Message, Processor, render
from llava_pipeline.model.read_processor import add_tokens, load_tokenizer
from llava_pipeline.model.template import chat_template
from tests.tiny import talk

NUM_IMAGE_TOKENS = 5
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
SEED_TEMPLATE = (  # as the seed writes it
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %} {% else %}{{eos_token}}{% endif %}{% endfor %}"
)
NATIVE_TEMPLATE = (  # a language model's own, with tokens for the roles
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% else %}<|assistant|>{%- generation -%}{{ ' ' }}{% for item in message['content'] %}"
    "{{ item['text'] }}{% endfor %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = ("llava", "chatml", "native", "llama3", "zephyr", "plain")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
Processors = dict[str, Processor]


def written(name: str, texts: list[str], answered: bool = True) -> str:
    """A conversation as each template writes it, by hand."""
    rounds = list(zip(texts[::2], texts[1::2], strict=True)) if answered else [(texts[0], "")]
    out = {"llava": "<s>" + SYSTEM, "chatml": ""}.get(name, "<s>")
    for number, (question, answer) in enumerate(rounds):
        asked = f"<image>\n{question}" if number == 0 else question
        start, end = {
            "llava": (f"USER: {asked} ASSISTANT:", f" {answer}</s>"),
            "chatml": (
                f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n",
                f"{answer}<|im_end|>\n",
            ),
            "native": (f"<|user|>{asked}<|assistant|>", f" {answer}</s>"),
            "llama3": (
                f"<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                f"{answer}<|eot_id|>",
            ),
            "zephyr": (f"<|user|>\n{asked}</s>\n<|assistant|>\n", f"{answer}</s>\n"),
            "plain": ("<image>" if number == 0 else "", f"{answer}\n"),
        }[name]
        out += start + end if answered else start
    return out


def learned(name: str, texts: list[str]) -> list[str]:
    """What is learned of every round."""
    if name == "plain":  # nothing stands between two captions
        return ["".join(f"{answer}\n" for answer in texts[1::2])]
    before = {"llava": " ", "native": " "}.get(name, "")
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    return [f"{before}{answer}{end}" for answer in texts[1::2]]


def a_tokenizer(backbones: Backbones) -> PreTrainedTokenizerFast:
    """The language model's, with the special tokens of every template."""
    tokenizer = load_tokenizer(backbones.language_model)
    known = [str(token) for token in tokenizer.extra_special_tokens]
    tokens = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", *LLAMA3_TOKENS)
    extra = [t for t in tokens if t not in known]
    tokenizer.add_special_tokens({"extra_special_tokens": extra}, replace_extra_special_tokens=False)
    tokenizer.chat_template = NATIVE_TEMPLATE
    return tokenizer


@pytest.fixture(scope="package")
def processors(backbones: Backbones) -> Processors:
    """One for each template."""
    tokenizer = a_tokenizer(backbones)
    templates = {name: chat_template(name, tokenizer) for name in TEMPLATES}
    add_tokens(tokenizer, "origin")
    images = ImageSettings(32, CLIP_MEAN, CLIP_STD)
    return {name: Processor(tokenizer, template, images, NUM_IMAGE_TOKENS) for name, template in templates.items()}


def read(processor: Processor, ids: list[int]) -> str:
    """Ids as text again, special tokens shown, the tokens of a picture as one."""
    folded: list[int] = []
    for token, run in groupby(ids):
        folded += [token] if token == processor.image_token_id else list(run)
    return str(processor.tokenizer.decode(folded, skip_special_tokens=False))


def read_labels(processor: Processor, encoded: Encoded) -> list[str]:
    """Each unbroken run of labels as text."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    return [read(processor, [label for _, label in run]) for is_learned, run in runs if is_learned]


# --------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "texts",
    [
        ["What color is the circle?", "red"],
        ["How many shapes?", "three", "Which is largest?", "The blue one, at the top.", "Is it round?", "no"],
        ["", ""],
        ["  two\n\nlines ", "\u00e9t\u00e9 \U0001f600"],
    ],
)
def test_each_template_writes_what_is_written_by_hand(processors: Processors, name: str, texts: list[str]) -> None:
    processor = processors[name]
    encoded = processor.encode(talk(*texts))
    assert processor.render(talk(*texts))[0] == written(name, texts)
    assert read(processor, encoded.input_ids) == written(name, texts)
    assert read_labels(processor, encoded) == learned(name, texts)
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_the_documented_layout(processors: Processors) -> None:
    processor = processors["native"]
    tokenizer = processor.tokenizer
    encoded = processor.encode(talk("What color is the circle?", "red"))
    question = tokenizer("\nWhat color is the circle?", add_special_tokens=False)["input_ids"]
    answer = tokenizer(" red", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    user, assistant, image = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<image>"])
    before = [tokenizer.bos_token_id, user, *[image] * NUM_IMAGE_TOKENS, *question, assistant]
    assert encoded.input_ids == before + answer
    assert encoded.labels == [IGNORE_INDEX] * len(before) + answer


def test_vicunas_template_is_what_llava_15_was_trained_on(backbones: Backbones) -> None:
    tokenizer = load_tokenizer(backbones.language_model)
    text, spans = render(
        chat_template("vicuna", tokenizer), tokenizer.special_tokens_map, talk("Where?", "Here.", "Why?", "So."), False
    )
    assert text == (  # conversation.py of LLaVA: conv_vicuna_v1, two separators, a space and </s>
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhere? ASSISTANT: Here.</s>"
        "USER: Why? ASSISTANT: So.</s>"
    )
    assert [text[start:end] for start, end in spans] == [" Here.</s>", " So.</s>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("zephyr", "<s><|system|>\nBe brief.</s>\n"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ("plain", "<s>"),
    ],
)
def test_a_systems_words_stand_before_the_first_question(processors: Processors, name: str, expected: str) -> None:
    said = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    text = processors[name].render([said, *talk("?", "!")])[0]
    without = processors[name].render(talk("?", "!"))[0]
    assert text == expected + without.removeprefix("<s>")


def test_a_model_that_reasons_finds_an_empty_thought_that_it_does_not_learn(backbones: Backbones) -> None:
    tokenizer = a_tokenizer(backbones)
    tokenizer.add_tokens(["<think>", "</think>"])
    template = chat_template("chatml", tokenizer)
    text, spans = render(template, {}, talk("Where?", "Here.", "Why?", "So."), False)
    assert text == (
        "<|im_start|>user\n<image>\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHere.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"
    )
    assert [text[start:end] for start, end in spans] == ["Here.<|im_end|>", "So.<|im_end|>"]
    asked, _ = render(template, {}, talk("Where?"), True)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_tokenizer_without_a_beginning_begins_a_caption_with_its_end(backbones: Backbones) -> None:
    tokenizer = a_tokenizer(backbones)
    tokenizer.bos_token = None
    text, _ = render(chat_template("plain", tokenizer), tokenizer.special_tokens_map, talk("What?", "A boat."), False)
    assert text == "</s><image>A boat.\n"


@pytest.mark.parametrize("texts", [["What is it?", "A boat."], ["a", "b", "c", "d"]])
def test_the_llava_template_writes_the_seeds_characters(processors: Processors, texts: list[str]) -> None:
    (seed,), _ = render_jinja_template([talk(*texts)], chat_template=SEED_TEMPLATE, eos_token="</s>")
    assert processors["llava"].render(talk(*texts))[0] == "<s>" + seed


def test_the_language_models_own_template_is_asked_and_answered(processor: Processor) -> None:
    texts = ["What color is the circle?", "red", "And the square?", "dark blue"]
    encoded = processor.encode(talk(*texts))
    assert read_labels(processor, encoded) == learned("native", texts)
    assert encoded.input_ids.count(processor.image_token_id) == processor.num_image_tokens
    text = read(processor, encoded.input_ids)
    assert [text.count(part) for part in (f"<image>\n{texts[0]}", texts[2], "</s>", "<s>")] == [1, 1, 2, 1]


def test_several_items_of_one_turn_are_written_in_order(processors: Processors) -> None:
    items = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " Well?"}]
    messages: list[Message] = [{"role": "user", "content": items}, *talk("", "Nice.")[1:]]
    encoded = processors["native"].encode(messages)
    assert read(processors["native"], encoded.input_ids) == "<s><|user|>Look: <image> Well?<|assistant|> Nice.</s>"


def test_a_conversation_without_a_picture_has_no_image_token(processors: Processors) -> None:
    processor = processors["native"]
    ids = processor.prompt("Hello?", with_image=False)
    assert read(processor, ids) == "<s><|user|>Hello?<|assistant|>"
    assert processor.image_token_id not in ids


def test_tokens_marked_as_special_in_the_file_alone_are_special(backbones: Backbones) -> None:
    tokenizer = load_tokenizer(backbones.language_model)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)], special_tokens=True)
    add_tokens(tokenizer, "origin")
    assert "<|turn|>" not in tokenizer.all_special_tokens
    processor = Processor(tokenizer, "<|turn|>" + NATIVE_TEMPLATE, ImageSettings(32, CLIP_MEAN, CLIP_STD), 5)
    ids = processor.prompt("<|turn|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 1
    assert read(processor, ids).startswith("<|turn|><s>")


# --------------------------------------------------------------------------------------------- whatever people type

HOSTILE = (
    *("<image>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"),
    *(
        "\ue000",
        "\ue001",
        "\ue0000\ue001",
        "\ue0001\ue001",
        "\ue00099\ue001",
        "{% generation %}",
        "{% endgeneration %}",
    ),
    *(
        "{{ eos_token }}",
        "{{ messages }}",
        "{% for x in y %}",
        "{#",
        "USER: ",
        " ASSISTANT:",
        "\n",
        "\r\n",
        " ",
        "\x00",
    ),
    *("\u200d", "e\u0301", "\U0001f469\u200d\U0001f680", "\ufeff", "\u2028"),
)
typed = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=5).map("".join)
rounds = st.integers(1, 3).flatmap(lambda n: st.lists(typed, min_size=2 * n, max_size=2 * n))


@pytest.mark.parametrize("name", TEMPLATES)
@given(texts=rounds)
@settings(max_examples=150, deadline=None)
def test_typed_text_is_text(processors: Processors, name: str, texts: list[str]) -> None:
    processor = processors[name]
    special = {i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    encoded = processor.encode(talk(*texts))
    harmless = processor.encode(talk(*["word"] * len(texts)))
    assert [i for i in encoded.input_ids if i in special] == [i for i in harmless.input_ids if i in special]
    assert encoded.input_ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS
    assert read(processor, encoded.input_ids) == written(name, texts)
    assert read_labels(processor, encoded) == learned(name, texts)


@pytest.mark.parametrize("name", TEMPLATES)
@given(question=typed, answer=typed)
@settings(max_examples=100, deadline=None)
def test_a_question_is_asked_as_it_was_learned(processors: Processors, name: str, question: str, answer: str) -> None:
    processor = processors[name]
    prompt = processor.prompt("\n" + question)
    encoded = processor.encode(talk(question, answer))
    assert read(processor, prompt) == written(name, [question], answered=False)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert set(encoded.labels[: len(prompt)]) == {IGNORE_INDEX}
    assert encoded.labels[len(prompt)] != IGNORE_INDEX


@given(answer=typed)
@settings(max_examples=100, deadline=None)
def test_an_answer_is_told_without_special_tokens(processors: Processors, answer: str) -> None:
    processor = processors["native"]
    learned_ids = [label for label in processor.encode(talk("", answer)).labels if label != IGNORE_INDEX]
    assert processor.decode(learned_ids) == answer.strip()


# --------------------------------------------------------------------------------------------- templates refused


def test_chatml_without_its_tokens_is_refused(backbones: Backbones) -> None:
    tokenizer = load_tokenizer(backbones.language_model)
    with pytest.raises(IncompatibleParts, match=r"no <\|im_end\|> and no <\|im_start\|>.* --set model\.chat_template="):
        chat_template("chatml", tokenizer)


def test_llama3_without_its_tokens_is_refused(backbones: Backbones) -> None:
    message = r"no <\|end_header_id\|> and no <\|eot_id\|> and no .* --set model\.chat_template=llava or zephyr"
    with pytest.raises(IncompatibleParts, match=message):
        chat_template("llama3", load_tokenizer(backbones.language_model))


@pytest.mark.parametrize("name", ["llava", "vicuna", "zephyr", "plain"])
def test_a_template_whose_answers_would_have_no_end_is_refused(backbones: Backbones, name: str) -> None:
    tokenizer = a_tokenizer(backbones)
    tokenizer.eos_token = None
    with pytest.raises(
        IncompatibleParts, match=r"has no end token, so .* --set model\.chat_template=chatml or llama3 or"
    ):
        chat_template(name, tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda own: own.replace("<image>", ""),
        lambda own: own.replace("{%- generation -%}", "").replace("{% endgeneration %}", ""),
    ],
)
def test_a_native_template_that_lacks_something_is_refused(
    backbones: Backbones, change: Callable[[str], str | None]
) -> None:
    tokenizer = a_tokenizer(backbones)
    assert chat_template("native", tokenizer) == NATIVE_TEMPLATE
    tokenizer.chat_template = change(NATIVE_TEMPLATE)
    with pytest.raises(IncompatibleParts, match=r"--set model\.chat_template=chatml or llama3 or llava or zephyr$"):
        chat_template("native", tokenizer)


# --------------------------------------------------------------------------------------------- pictures


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_reader(processor: Processor) -> CLIPImageProcessorPil:
    side = processor.images.side
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(processor.images.mean),
        image_std=list(processor.images.std),
    )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("side", [32, 100, 20])
def test_a_square_picture_is_read_as_clips_own_processor_reads_it(
    processors: Processors, processor: Processor, own: bool, side: int
) -> None:
    chosen = processor if own else processors["llava"]
    picture = noise(side, side)
    ours = chosen.normalise(torch.from_numpy(chosen.resize(picture).copy())[None])
    theirs = picture_reader(chosen)(picture, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(64, 16), (16, 64), (200, 90)])
def test_what_is_added_around_a_picture_means_nothing(processors: Processors, width: int, height: int) -> None:
    processor = processors["llava"]
    pixels = torch.from_numpy(processor.resize(noise(width, height)).copy())
    assert pixels.shape == (32, 32, 3)
    values = processor.normalise(pixels[None])[0]
    if width < height:
        pixels, values = pixels.transpose(0, 1), values.transpose(1, 2)
    half_a_step = 0.5 / 255 / min(CLIP_STD) + 1e-6
    for edge in (0, -1):
        assert (pixels[edge] == torch.tensor(processor.images.fill)).all()
        assert (values[:, edge].abs() < half_a_step).all()
    middle = values[:, 16]
    assert middle.std() > 0.1
