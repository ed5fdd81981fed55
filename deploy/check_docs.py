"""Checks the Markdown files: every relative link and anchor resolves, every `make` target that is named exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1[`~]*\s*?$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"""\]\(\s*<?([^)\s>]+)>?(?:\s+["'][^)]*)?\)""")
REFERENCE = re.compile(r"^ {0,3}\[[^\]^]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
HTML = re.compile(r"""<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=["']([^"']+)["']""", re.IGNORECASE)
HTML_ANCHOR = re.compile(r"""<\w+\b[^>]*?\b(?:id|name)=["']([^"']+)["']""", re.IGNORECASE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
MAKE = re.compile(r"(?:^|[;&|]\s*|\$\s+)(?:[A-Z_]+=\S+\s+)*make\s+([a-z][a-z-]*)", re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z-]*):(?!=)", re.MULTILINE)


def markdown_files() -> list[Path]:
    folders = (ROOT / "docs", ROOT / "llava_pipeline")
    return sorted(ROOT.glob("*.md")) + [path for folder in folders for path in sorted(folder.rglob("*.md"))]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = set(HTML_ANCHOR.findall(text))
    seen: dict[str, int] = {}
    for heading in HEADING.findall(text):
        name = slug(heading)
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found


def broken_links(path: Path, text: str) -> list[str]:
    prose = CODE_SPAN.sub("", FENCE.sub("", text))
    problems = []
    for link in LINK.findall(prose) + REFERENCE.findall(prose) + HTML.findall(prose):
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = path if not name else ROOT / name.lstrip("/") if name.startswith("/") else path.parent / name
        target = target.resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            problems.append(f"link to a missing file: {link}")
        elif anchor and target.suffix == ".md" and anchor.lower() not in anchors(target):
            problems.append(f"link to a missing heading: {link}")
    return problems


def unknown_targets(text: str, targets: set[str]) -> list[str]:
    code = [match.group(0) for match in FENCE.finditer(text)]
    code += [match.group(2) for match in CODE_SPAN.finditer(FENCE.sub("", text))]
    named = {name for part in code for name in MAKE.findall(part)}
    return [f"no such make target: {name}" for name in sorted(named - targets)]


def main() -> int:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    files = markdown_files()
    problems = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        for problem in broken_links(path, text) + unknown_targets(text, targets):
            problems.append(f"{path.relative_to(ROOT)}: {problem}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"docs: {len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
