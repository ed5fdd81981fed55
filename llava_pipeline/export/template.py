"""The chat template that other engines get: ours, made to read what their users write.

Ours knows one form (``serving.conversation``): a turn's pictures first, its words on a line of their own, a system's
words before the first question. Others write a plain string, words before a picture, words without the line break;
llama.cpp makes one text of a turn, with a mark in the place of each picture. What stands before the template brings all
of these to our form, so that the template itself stays as it was trained with. Generation marks are for training, and
not every engine knows them.
"""

from __future__ import annotations

import re

_MARKS = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

# Nothing in here that the Jinja of its readers does not have.
_OF_OTHERS = (
    "if message['content'] is string",
    "set turn.words = [message['content']]",
    "else",
    "for item in message['content']",
    "if item['type'] == 'image'",
    "set turn.pictures = turn.pictures + [{'type': 'image'}]",
    "else",
    "set turn.words = turn.words + [item['text']]",
    "endif",
    "endfor",
    "endif",
)
_OF_LLAMA_CPP = (  # pictures are marks of the form <__media...__> within one text
    "for item in message['content']",
    "set part = namespace(text='')",
    "for piece in item['text'].split('__>')",
    "if '<__media' in piece and not loop.last",
    "set ends = piece.split('<__media')",
    "set turn.pictures = turn.pictures + [{'type': 'text', 'text': '<__media' + ends[1] + '__>'}]",
    "set part.text = part.text + ends[0]",
    "if part.text",
    "set turn.words = turn.words + [part.text]",
    "set part.text = ''",
    "endif",
    "else",
    "set part.text = part.text + piece",
    "if not loop.last",
    "set part.text = part.text + '__>'",
    "endif",
    "endif",
    "endfor",
    "if part.text or not turn.words",
    "set turn.words = turn.words + [part.text]",
    "endif",
    "endfor",
)
_BEFORE = (
    "set turns = namespace(all=[], system=[])",
    "for message in messages",
    "set turn = namespace(pictures=[], words=[], text='')",
)
_BEHIND = (
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


def exported_template(template: str, llama_cpp: bool = False) -> str:
    """A template of ours as llama.cpp, or every other engine, is to have it."""
    content = _OF_LLAMA_CPP if llama_cpp else _OF_OTHERS
    to_our_form = "".join(f"{{%- {line} -%}}" for line in (*_BEFORE, *content, *_BEHIND))
    return to_our_form + without_marks(template)


def without_marks(template: str) -> str:
    """A template without its generation marks; a mark that trims white space goes on doing so."""
    return _MARKS.sub(lambda mark: "{{-''}}" if mark[1] else "{{''-}}" if mark[2] else "", template)
