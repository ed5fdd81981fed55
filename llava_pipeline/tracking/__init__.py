"""The record of every run, the registry of projectors, and the gate between them.

The only package here that imports MLflow, and only inside functions: reading settings or deciding costs no import.
"""
