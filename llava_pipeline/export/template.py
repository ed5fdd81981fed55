"""The chat template that other engines get: ours, made to read what their users write.

Ours knows one form (``serving.conversation``): a turn's pictures first, its words on a line of their own, a system's words
before the first question. Others write a plain string, words before a picture, words without the line break; llama.cpp
puts a text in the place of a picture before the template sees it. What stands before the template brings all of these
to our form, so that the template itself stays as it was trained with. Generation marks are for training, and not every
engine knows them.
"""

from __future__ import annotations

import re

_MARKS = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

# Nothing in here that llama.cpp's own Jinja does not have.
_LINES = (
    "set turns = namespace(all=[], system=[])",
    "for message in messages",
    "set turn = namespace(pictures=[], words=[], text='')",
    "if message['content'] is string",
    "set turn.words = [message['content']]",
    "else",
    "for item in message['content']",
    "if item['type'] == 'image'",
    "set turn.pictures = turn.pictures + [{'type': 'image'}]",
    "elif item['type'] == 'text'",
    "set turn.words = turn.words + [item['text']]",
    "else",
    "set turn.pictures = turn.pictures + [{'type': 'text', 'text': item['text']}]",
    "endif",
    "endfor",
    "endif",
    "if message['role'] == 'system'",
    "set turns.system = turns.system + turn.words",
    "else",
    "if message['role'] == 'user'",
    "set turn.words = turns.system + turn.words",
    "set turns.system = []",
    "endif",
    "set turn.text = turn.words | join('\\n')",
    "if turn.pictures and not turn.text.startswith('\\n')",
    "set turn.text = '\\n' + turn.text",
    "endif",
    "set turns.all = turns.all + [{'role': message['role'], "
    "'content': turn.pictures + [{'type': 'text', 'text': turn.text}]}]",
    "endif",
    "endfor",
    "set messages = turns.all",
)
_TO_OUR_FORM = "".join(f"{{%- {line} -%}}" for line in _LINES)


def exported_template(template: str) -> str:
    """A template of ours as other engines are to have it."""
    return _TO_OUR_FORM + without_marks(template)


def without_marks(template: str) -> str:
    """A template without its generation marks; a mark that trims white space goes on doing so."""
    return _MARKS.sub(lambda mark: "{{-''}}" if mark[1] else "{{''-}}" if mark[2] else "", template)
