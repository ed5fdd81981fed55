"""The chat template that other engines get: ours, made to read what their users write.

Our own rows hold one list of items per turn, with the line break between a picture and the words about it in the words.
Others write a plain string, or words without the line break; llama.cpp puts a text in the place of a picture before
the template sees it. Lines before the template bring all of these to our form, so that the template itself stays as it
was trained with. Generation marks are for training, and not every engine knows them.
"""

from __future__ import annotations

import re

_MARKS = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

# No comment, macro or loop variable in here that llama.cpp's own Jinja does not have.
_TO_OUR_FORM = (
    "{%- set turns = namespace(all=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set turns.all = turns.all + [{'role': message['role'], "
    "'content': [{'type': 'text', 'text': message['content']}]}] -%}"
    "{%- else -%}"
    "{%- set turn = namespace(items=[], after_picture=false) -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'text' -%}"
    "{%- if turn.after_picture and not item['text'].startswith('\\n') -%}"
    "{%- set turn.items = turn.items + [{'type': 'text', 'text': '\\n' + item['text']}] -%}"
    "{%- else -%}"
    "{%- set turn.items = turn.items + [{'type': 'text', 'text': item['text']}] -%}"
    "{%- endif -%}"
    "{%- set turn.after_picture = false -%}"
    "{%- else -%}"
    "{%- if item['type'] == 'image' -%}"
    "{%- set turn.items = turn.items + [{'type': 'image'}] -%}"
    "{%- else -%}"
    "{%- set turn.items = turn.items + [{'type': 'text', 'text': item['text']}] -%}"
    "{%- endif -%}"
    "{%- set turn.after_picture = true -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turns.all = turns.all + [{'role': message['role'], 'content': turn.items}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = turns.all -%}"
)


def exported_template(template: str) -> str:
    """A template of ours as other engines are to have it."""
    return _TO_OUR_FORM + without_marks(template)


def without_marks(template: str) -> str:
    """A template without its generation marks; a mark that trims white space goes on doing so."""
    return _MARKS.sub(lambda mark: "{{-''}}" if mark[1] else "{{''-}}" if mark[2] else "", template)
