"""The Prefect server and the home that flow tests have, for stages that are followed through the flow."""

from tests.flows.conftest import home, prefect_server

__all__ = ["home", "prefect_server"]
