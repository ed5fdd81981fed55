"""Teach a frozen language model to see: a pipeline that trains the projector between a vision tower and a Llama."""

__version__ = "0.1.0"
