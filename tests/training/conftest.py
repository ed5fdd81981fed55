from __future__ import annotations

from tests.tiny import assembled, backbones, home, lively, llava, processor, shared

__all__ = ["assembled", "backbones", "home", "lively", "llava", "processor", "shared"]
