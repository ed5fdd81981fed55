"""Servers with logins: nobody comes in without, and the pipeline does with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from tests.deploy.installation import Installation

pytestmark = pytest.mark.slow  # every one of them shares what takes long to come up

PASSWORD = "a long pass/word of letters"
LOGIN = "admin:an0ther-one"
SECRETS = {
    "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "c2VjcmV0",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "PREFECT_SERVER_API_AUTH_STRING": LOGIN,
    "PREFECT_API_AUTH_STRING": LOGIN,
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation that asks for logins."""
    made = Installation(tmp_path_factory.mktemp("locked"))
    settings = yaml.safe_load((made.folder / "mlflow.yml").read_text(encoding="utf-8"))
    settings["server"]["auth"] = True
    (made.folder / "mlflow.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    try:
        made.say("up", "--no-serving", **SECRETS)
        yield made
    finally:
        made.say("down", expect=None)
        made.receiver.close()


def test_mlflow_answers_only_with_a_login(locked: Installation) -> None:
    search = f"{locked.addresses.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(search, timeout=30).status_code == 401
    assert requests.get(search, auth=("admin", "password1234"), timeout=30).status_code == 401
    assert requests.get(search, auth=("admin", PASSWORD), timeout=30).status_code == 200


def test_prefect_answers_only_with_a_login(locked: Installation) -> None:
    count = f"{locked.addresses.prefect}/admin/version"
    assert requests.get(count, timeout=30).status_code == 401
    assert requests.get(count, auth=("admin", "guessed"), timeout=30).status_code == 401
    assert requests.get(count, auth=("admin", "an0ther-one"), timeout=30).status_code == 200


def test_a_page_of_somebody_else_can_do_nothing(locked: Installation) -> None:
    """Neither by a name that leads here (DNS rebinding), nor from a person's own browser."""
    search = f"{locked.addresses.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    named = requests.get(search, auth=("admin", PASSWORD), headers={"Host": "evil.example"}, timeout=30)
    assert named.status_code == 403
    posted = requests.post(
        f"{locked.addresses.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "x"}, auth=("admin", PASSWORD),
        headers={"Origin": "http://evil.example"}, timeout=30,
    )  # fmt: skip
    assert posted.status_code == 403
    filtered = requests.post(
        f"{locked.addresses.prefect}/flows/filter", json={}, auth=("admin", "an0ther-one"), timeout=30
    )  # fmt: skip
    assert (filtered.status_code, filtered.json()["detail"]) == (403, "Missing CSRF token.")
    other = requests.options(
        f"{locked.addresses.prefect}/flows/filter", timeout=30,
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )  # fmt: skip
    assert other.headers.get("access-control-allow-origin") not in ("*", "http://evil.example")


def test_nothing_listens_but_on_loopback(locked: Installation) -> None:
    listening = [
        connection.laddr.ip
        for process in locked.left()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2
    assert set(listening) == {"127.0.0.1"}


def test_no_secret_stands_on_a_command_line_or_in_a_log(locked: Installation) -> None:
    said = " ".join(" ".join(process.cmdline()) for process in locked.left())
    said += "".join(locked.said(service) for service in ("mlflow", "prefect", "worker"))
    said += Path(locked.home / "services" / "mlflow-auth.ini").read_text(encoding="utf-8")
    assert "mlflow" in said
    for secret in (PASSWORD, LOGIN.partition(":")[2]):
        assert secret not in said


def test_the_pipeline_comes_in_with_the_logins_of_the_environment(locked: Installation) -> None:
    findings = {one["name"]: one for one in locked.json("doctor", expect=None, **SECRETS)["findings"]}
    told = [one for one in findings.values() if one["status"] == "problem"]
    assert told == []
    assert locked.json("runs", **SECRETS) == []
    refused = locked.say("runs", expect=None)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
