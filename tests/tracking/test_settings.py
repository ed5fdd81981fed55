"""mlflow.yml is read, and means what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from llava_pipeline.errors import SpecError
from llava_pipeline.tracking.settings import (
    FILE_VARIABLE,
    URI_VARIABLE,
    Settings,
    load_settings,
    run_address,
    server_command,
    server_environment,
    tracking_uri,
    ui_command,
)

SHIPPED = Path(__file__).parents[2] / "mlflow.yml"


def test_shipped_file_is_the_defaults_and_names_every_key() -> None:
    assert load_settings(SHIPPED) == Settings()
    assert yaml.safe_load(SHIPPED.read_text(encoding="utf-8")) == Settings().model_dump(mode="json")


def test_every_key_has_a_description() -> None:
    def lacking(model: type[BaseModel]) -> list[str]:
        own = [name for name, field in model.model_fields.items() if not field.description]
        nested = [field.annotation for field in model.model_fields.values()]
        return own + [k for m in nested if isinstance(m, type) and issubclass(m, BaseModel) for k in lacking(m)]

    assert lacking(Settings) == []


def test_order_explicit_then_variable_then_here_then_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().tracking.experiment == "llava-pipeline"
    Path("mlflow.yml").write_text("tracking: {experiment: here}", encoding="utf-8")
    assert load_settings().tracking.experiment == "here"
    (tmp_path / "other.yml").write_text("tracking: {experiment: other}", encoding="utf-8")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "other.yml"))
    assert load_settings().tracking.experiment == "other"
    assert load_settings(Path("mlflow.yml")).tracking.experiment == "here"


def test_tracking_uri_variable_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mlflow.yml").write_text("tracking: {uri: 'http://127.0.0.1:1'}", encoding="utf-8")
    assert tracking_uri(load_settings()) == "http://127.0.0.1:1"
    monkeypatch.setenv(URI_VARIABLE, "http://127.0.0.1:2")
    assert tracking_uri(load_settings()) == "http://127.0.0.1:2"
    assert tracking_uri(Settings()) == f"sqlite:///{home}/mlflow.db"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate: {min_margin: 0.1}", r"gate\.min_margin: unknown key; known here: min_grounding_gain, .*remove it"),
        ("gates: {}", r"gates: unknown key; known here: server, tracking, registry, prefect, serving, gate, ui"),
        ("gate: {max_regression: 2}", r"gate\.max_regression: .*less than or equal to 1 \(found 2\)"),
        ("gate: {max_regression: .nan}", r"gate\.max_regression: .*\(found nan\)"),
        ("registry: {champion: latest}", r"registry\.champion: .*\(found 'latest'\)"),
        ("registry: {challenger: champion}", r"registry: .*three different names"),
        ("- 1", r"must be a mapping of keys to values, not list"),
        ("a: [", r"is not valid YAML"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    Path("mlflow.yml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        load_settings()


def test_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "absent.yml")
    with pytest.raises(SpecError, match=r"absent\.yml \(No such file or directory\); check the path or unset"):
        load_settings()


def test_server_and_ui_commands(home: Path) -> None:
    Path("mlflow.yml").write_text("server: {port: 5005, allowed_hosts: ['mlflow:*']}", encoding="utf-8")
    settings = load_settings()
    assert server_command(settings) == [
        *("mlflow", "server", "--backend-store-uri", f"sqlite:///{home}/mlflow.db"),
        *("--artifacts-destination", f"file://{home}/mlartifacts", "--host", "127.0.0.1", "--port", "5005"),
        *("--workers", "1", "--allowed-hosts", "mlflow:*"),
    ]
    assert ui_command(settings)[-6:] == ["--host", "127.0.0.1", "--port", "5001", "--workers", "1"]
    assert server_environment(settings)["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_no_pages_of_our_own_over_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, "http://127.0.0.1:5000")
    with pytest.raises(SpecError, match="serves the pages itself"):
        ui_command(load_settings())


def test_settings_gate_and_client_do_not_load_mlflow() -> None:
    modules = ("settings", "gate", "client", "run", "registry", "listing")
    code = "; ".join(f"import llava_pipeline.tracking.{name}" for name in modules)
    code += "; import sys; assert not {'mlflow', 'torch'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_the_address_of_a_run_has_no_password() -> None:
    settings = Settings.model_validate({"tracking": {"uri": "http://user:secret@mlflow.example:5000/"}})
    assert run_address(settings, "1", "abc") == "http://mlflow.example:5000/#/experiments/1/runs/abc"
