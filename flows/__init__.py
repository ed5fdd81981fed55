"""Prefect lives here and nowhere else: the story (``train``), and one table of how each stage is run (``stages``)."""
