"""Chat templates with an image slot and generation marks: what lies between the marks is learned, the rest is not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llava_pipeline.errors import IncompatibleParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

# The seed's template: a conversation renders to the same characters. Two things are added: the marks, and what a
# person asks of it, "ASSISTANT:", when an answer is to be generated. The space before an answer belongs to the
# answer, because a Llama tokenizer makes one token of both.
LLAVA = (
    "{{ bos_token }}" + SYSTEM_PROMPT + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT:{% generation %} {% for item in message['content'] %}{{ item['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# transformers renders with trim_blocks, which eats a plain newline after a tag: hence {{ '\\n' }} after the marks.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{% for item in message['content'] %}{{ item['text'] }}"
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Qwen3 reasons before it answers unless it finds that it has; the empty thought is written for it, and not learned.
NO_THOUGHT = "<think>\n\n</think>\n\n"
_CHATML_THOUGHTLESS = CHATML.replace("{% generation %}", NO_THOUGHT + "{% generation %}").replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n" + NO_THOUGHT + "{% endif %}"
)

# Llama 3's headers. Its own template trims what people write and tells a date; neither is done here.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{% for item in message['content'] %}{{ item['text'] }}"
    "{% endfor %}<|eot_id|>{% endgeneration %}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# Zephyr's, which TinyLlama-chat speaks. A line ends behind every end token, so a turn begins a line.
ZEPHYR = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{% for item in message['content'] %}{{ item['text'] }}"
    "{% endfor %}{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}{{ eos_token }}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)

# LLaVA's for the first stage: what is asked is left out, a caption ends with a line break. Something has to stand
# before an answer without a picture, so a tokenizer that knows no beginning begins with its end.
PLAIN = (
    "{{ bos_token or eos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{{ '\\n' }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}"
)

TEMPLATES = {  # vicuna is LLaVA-1.5's, which the seed's is character by character
    "llava": LLAVA, "vicuna": LLAVA, "chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR, "plain": PLAIN,
}  # fmt: skip
_NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template of this name for a language model's tokenizer; ``native`` is the tokenizer's own.

    Raises:
        IncompatibleParts: a template whose special tokens the tokenizer does not have, or a native template that is
            missing or has no image slot or no generation marks.
    """
    if name == "native":
        return _native(tokenizer)
    if lacking := _lacking(name, tokenizer):
        raise IncompatibleParts(
            f"the language model's tokenizer has no {' and no '.join(lacking)}, so an answer in {name} would have "
            f"no end; choose another with --set model.chat_template={_others(tokenizer)}"
        )
    if name == "chatml" and "<think>" in tokenizer.get_vocab():
        return _CHATML_THOUGHTLESS
    return TEMPLATES[name]


def _native(tokenizer: PreTrainedTokenizerFast) -> str:
    native = tokenizer.chat_template
    if not isinstance(native, str) or "<image>" not in native or not _GENERATION_MARK.search(native):
        raise IncompatibleParts(
            "the language model's own chat template has no <image> slot or no {% generation %} marks; "
            f"choose another with --set model.chat_template={_others(tokenizer)}"
        )
    return native


def _lacking(name: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Tokens that a template writes and the tokenizer does not have."""
    known = tokenizer.get_vocab()
    lacking = sorted(token for token in _NEEDED.get(name, ()) if token not in known)
    if "eos_token" in TEMPLATES[name] and tokenizer.eos_token is None:
        lacking.append("end token")
    return lacking


def _others(tokenizer: PreTrainedTokenizerFast) -> str:
    """Templates that the tokenizer can speak, those of its own tokens first; its own is one where it is a chat's."""
    chats = ("chatml", "llama3", "llava", "zephyr")
    native = tokenizer.chat_template
    fitting = [name for name in chats if not _lacking(name, tokenizer)]
    if isinstance(native, str) and "<image>" in native and _GENERATION_MARK.search(native):
        fitting.append("native")
    return " or ".join(fitting) or "native, with a template beside the tokenizer"
