"""Chat templates with an image slot and generation marks: what lies between the marks is learned, the rest is not."""

from __future__ import annotations

from llava_pipeline.errors import IncompatibleParts

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

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{% for item in message['content'] %}{{ item['text'] }}"
    "{% endfor %}<|im_end|>{% endgeneration %}\n{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(name: str, native: str | None) -> str:
    """The template of this name; ``native`` is the language model's own.

    Raises:
        IncompatibleParts: the native template is missing, or has no image slot or no generation marks.
    """
    if name == "llava":
        return LLAVA
    if name == "chatml":
        return CHATML
    if not native or "<image>" not in native or "{% generation %}" not in native:
        raise IncompatibleParts(
            "the language model's own chat template has no <image> slot or no {% generation %} marks; "
            "choose another with --set model.chat_template=llava or chatml"
        )
    return native
