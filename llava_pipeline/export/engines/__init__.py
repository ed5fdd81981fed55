"""Engines that read what was exported, each in a process of its own: ``python -m <engine> <exported> <work>``.

``work`` holds ``asked.json`` with pictures beside it; the answers are written there as ``told.json``.
"""
