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


_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template of this name for a language model's tokenizer; ``native`` is the tokenizer's own.

    Raises:
        IncompatibleParts: chatml without its two special tokens, or a native template that is missing or has no image
            slot or no generation marks.
    """
    if name == "llava":
        return LLAVA
    if name == "chatml":
        if lacking := sorted({"<|im_start|>", "<|im_end|>"} - set(tokenizer.get_vocab())):
            raise IncompatibleParts(
                f"the language model's tokenizer has no {' and no '.join(lacking)}, so an answer in chatml would have "
                "no end; choose another with --set model.chat_template=llava or native"
            )
        return CHATML
    native = tokenizer.chat_template
    if not native or "<image>" not in native or not _GENERATION_MARK.search(native):
        raise IncompatibleParts(
            "the language model's own chat template has no <image> slot or no {% generation %} marks; "
            "choose another with --set model.chat_template=llava or chatml"
        )
    return str(native)
