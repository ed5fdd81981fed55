"""Where the servers are that ``llava-pipeline up`` has started: commands that are told nothing else use them."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llava_pipeline.errors import SpecError
from llava_pipeline.spec import Frozen
from llava_pipeline.store import home, write_text


class Addresses(Frozen):
    """What is up, from the first ``up`` to the next ``down``."""

    mlflow: str  # of the tracking server
    prefect: str  # of the API
    serving: str | None  # None where nothing serves
    profile: str  # a name, or the absolute path of a file
    registered_model: str  # that is served


def addresses_file() -> Path:
    """Where they stand."""
    return home() / "services" / "addresses.json"


def read_addresses() -> Addresses | None:
    """The servers of this home; None where ``up`` was not said, or ``down`` after it.

    Raises:
        SpecError: the file is not one that ``up`` has written.
    """
    try:
        return Addresses.model_validate_json(addresses_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise SpecError(f"{addresses_file()} cannot be read; say `llava-pipeline down`, and `up` again") from error


def write_addresses(addresses: Addresses) -> None:
    """Tell the commands that follow."""
    write_text(addresses_file(), addresses.model_dump_json(indent=1) + "\n")


def forget_addresses() -> None:
    """From now on nothing is up."""
    addresses_file().unlink(missing_ok=True)
