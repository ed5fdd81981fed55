"""What goes along with the weights: a model card, and whose weights these are under which licence."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from llava_pipeline.contracts import Backbones, FetchedBackbone
from llava_pipeline.export.verify import Check, To

DIGITS = 12  # of a digest


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told of an exported version."""

    name: str
    title: str
    run_id: str
    profile: str
    headline: str  # what it scores, in sentences
    data: str  # what it was trained on
    parts: Backbones

    @property
    def licence(self) -> str:
        """The licence of both parts, or ``other`` where they differ."""
        both = {part.license for part in (self.parts.vision_tower, self.parts.language_model)}
        return both.pop() if len(both) == 1 else "other"


def licences(facts: Facts) -> str:
    """LICENSES.md: origin, licence and digest of both parts."""
    rows = "\n".join(_row(part, kind) for kind, part in _parts(facts))
    return (
        "# Licences\n\n"
        "These weights were made from two pretrained parts, which keep their licences; read their cards before you "
        "pass the weights on. What was trained between them is governed by your own terms and theirs.\n\n"
        f"| Part | Origin | Licence | sha256 of its weights |\n|---|---|---|---|\n{rows}\n\n"
        f"It was trained on: {facts.data}. The terms of that data are its publisher's.\n"
    )


def card(facts: Facts, to: To, checks: list[Check]) -> str:
    """README.md, as the Hugging Face hub shows it."""
    bases = [base for _, part in _parts(facts) if (base := _hub_id(part)) is not None]
    front = {
        "library_name": "transformers" if to == "hf" else "llama.cpp",
        "pipeline_tag": "image-text-to-text",
        "license": facts.licence.lower(),
        "tags": ["llava", *(["gguf"] if to == "gguf" else [])],
    } | ({"base_model": bases} if bases else {})
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts.name}",
        facts.title,
        facts.headline,
        f"Profile `{facts.profile}`, run `{facts.run_id}`, trained on {facts.data}. "
        "Licences: [LICENSES.md](LICENSES.md).",
        "## How to ask it",
        _with_transformers() if to == "hf" else _with_llama_cpp(facts),
        "A picture is padded to a square with the tower's mean colour and resized; put it before the question. It "
        "answers the kind of question that it was trained on, and nothing checks whether an answer is true.",
        "## How it was checked",
        checked(checks),
    ]
    return "\n\n".join(sections) + "\n"


def checked(checks: list[Check]) -> str:
    """The verification in Markdown."""
    if not checks:
        return "It was exported without a check (`--no-verify`)."
    rows = "\n".join(
        f"| {check.engine} {check.version} | {check.pictures} | {check.num_same_ids} of {check.num_prompts} | "
        f"{check.num_same_first} of {check.num_prompts} | {check.largest_first:.4f} | {check.largest_top:.4f} |"
        for check in checks
    )
    return (
        "Held-out questions about their pictures, beside the model that was trained; differences of log-probabilities "
        "in nats.\n\n"
        "| Engine | Pictures | Same token ids | Same first token | First token differs by | First five by |\n"
        f"|---|---|---|---|---|---|\n{rows}"
    )


def _parts(facts: Facts) -> tuple[tuple[str, FetchedBackbone], ...]:
    return ("vision tower", facts.parts.vision_tower), ("language model", facts.parts.language_model)


def _row(part: FetchedBackbone, kind: str) -> str:
    return f"| {kind} | {part.origin} | {part.license} | `{part.sha256[part.weights][:DIGITS]}` |"


def _hub_id(part: FetchedBackbone) -> str | None:
    """owner/name of a part that came from the hub."""
    kind, _, rest = part.origin.partition(":")
    return rest.partition("@")[0] if kind == "hub" else None


def _with_transformers() -> str:
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        'ask = pipeline("image-text-to-text", model="path/to/this/folder")\n'
        'content = [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What is on it?"}]\n'
        'print(ask(text=[{"role": "user", "content": content}], return_full_text=False))\n'
        "```"
    )


def _with_llama_cpp(facts: Facts) -> str:
    return (
        "```bash\n"
        f"llama-server -m {facts.name}-*.gguf --mmproj mmproj-{facts.name}-f16.gguf\n"
        "```\n\n"
        "A CLIP tower is written so that llama.cpp's misplaced class token (ggml-org/llama.cpp issue 25814) does no "
        "harm; a llama.cpp that has mended it needs another export."
    )
