"""The data report: what was read, refused and kept for training and for the held-out set, side by side.

Two forms of the same facts: a page of HTML with pictures, which needs nothing but itself, and tables in Markdown.
``survey`` reads the snapshots, ``facts`` puts numbers into words, ``html_page`` and ``tables`` lay them out.
"""

from llava_pipeline.data.report.html_page import page
from llava_pipeline.data.report.tables import markdown

__all__ = ["markdown", "page"]
