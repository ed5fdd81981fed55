"""Image, compose services, job templates, manifests: what can be claimed without an engine and without a cluster."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from kubernetes_validate import validate

from llava_pipeline.cli.app import app
from llava_pipeline.errors import SpecError
from llava_pipeline.operations.services import prefect_server
from llava_pipeline.tracking.settings import Settings, load_settings, server_command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = DEPLOY / "Dockerfile"
YAML_FILES = sorted([*DEPLOY.glob("compose*.y*ml"), *KUBERNETES.glob("*.yaml")])
MANIFESTS = sorted(KUBERNETES.glob("*.yaml"))
TEMPLATES = [DEPLOY / "docker" / "job-template.json", KUBERNETES / "job-template.json"]
# As braces and lines are written in this repository; else yamllint's own rules.
YAMLLINT = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
SECRETS = [
    line.removesuffix("=")
    for line in (DEPLOY / "compose.env.example").read_text().splitlines()
    if line.endswith("=") and not line.startswith("#")
]
FILLED = {name: f"{name.lower()}-secret" for name in SECRETS}
Services = dict[str, dict[str, Any]]


def tool(name: str) -> str:
    """A program of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def compose(
    folder: Path, variables: dict[str, str], *arguments: str, files: tuple[str, ...] = ("compose.yaml",)
) -> subprocess.CompletedProcess[str]:
    """``docker compose config`` of all services, with nothing else in the environment."""
    env_file = folder / "env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    named = [part for file in files for part in ("-f", str(DEPLOY / file))]
    return subprocess.run(
        ["docker", "compose", "--env-file", str(env_file), *named, "--profile", "*", "config", *arguments],
        capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    """The services as compose understands them."""
    read = compose(tmp_path_factory.mktemp("compose"), FILLED, "--format", "json")
    assert read.returncode == 0, read.stderr
    found: Services = json.loads(read.stdout)["services"]
    return found


def one_shots(services: Services) -> set[str]:
    """Services that others wait for until they have ended, and those that a person asks for by name."""
    asked_for = {name for name, service in services.items() if "profiles" in service}
    return asked_for | {
        name
        for service in services.values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }


# ------------------------------------------------------------------------------------------------------- the image


def test_the_linter_has_nothing_to_say_about_the_dockerfile() -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, one line each."""
    joined = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in joined.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def final_stage() -> list[tuple[str, str]]:
    """The instructions behind the last FROM."""
    found = instructions()
    last = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    users = [value for word, value in final_stage() if word == "USER"]
    assert users
    assert all(part.isdigit() and int(part) > 0 for part in users[-1].split(":"))
    after = final_stage()[final_stage().index(("USER", users[-1])) :]
    assert not [word for word, _ in after if word in ("RUN", "COPY", "ADD")]


def test_the_command_receives_signals_itself() -> None:
    entry = [value for word, value in final_stage() if word == "ENTRYPOINT"]
    assert json.loads(entry[-1]) == ["tini", "--", "llava-pipeline"]


def test_the_image_that_runs_gets_no_build_tools() -> None:
    ran = " ".join(value for word, value in final_stage() if word == "RUN")
    for tool_name in ("gcc", "build-essential", "pip install", "uv ", "git", "curl"):
        assert tool_name not in ran
    copied = [value for word, value in final_stage() if word == "COPY" and "--from=" in value]
    assert copied == ["--from=packages /opt/venv /opt/venv"]


def allowed_in_the_image() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("!")]


def test_only_what_is_named_can_reach_an_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    for path in allowed_in_the_image():
        assert (ROOT / path).exists(), path
    for path in ("tests", ".git", ".env", "deploy/.env", "deploy/compose.env.example", ".llava-pipeline", "docs"):
        assert not any(path == one or path.startswith(f"{one}/") for one in allowed_in_the_image()), path
    # What git does not know is no code: caches and settings of editors stay outside also within what is named.
    assert any(fnmatch.fnmatch(".env", line.removeprefix("**/")) for line in lines[1:] if not line.startswith("!"))


def test_everything_that_the_dockerfile_copies_by_name_is_let_in() -> None:
    for word, value in instructions():
        if word == "COPY" and "--from=" not in value and value != ". .":
            for source in value.split()[:-1]:
                assert source in allowed_in_the_image(), source


# ----------------------------------------------------------------------------------------------------- the services


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_is_clean(path: Path) -> None:
    done = subprocess.run([tool("yamllint"), "--strict", "-d", YAMLLINT, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=["cpu", "gpu"])
def test_compose_reads_its_files_without_an_engine(tmp_path: Path, files: tuple[str, ...]) -> None:
    done = compose(tmp_path, FILLED, "-q", files=files)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_names_a_secret_that_is_missing(tmp_path: Path, missing: str) -> None:
    done = compose(tmp_path, {name: value for name, value in FILLED.items() if name != missing}, "-q")
    assert f'\\"{missing}\\" variable is not set' in done.stderr
    assert done.stderr.count("is not set") == done.stderr.count(missing)


def test_a_login_that_was_forgotten_is_none_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose makes of a secret that nobody has set: PostgreSQL refuses it by itself, Prefect would not."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "")
    with pytest.raises(SpecError, match="PREFECT_SERVER_API_AUTH_STRING is set and empty"):
        prefect_server(Settings())


def test_only_the_three_pages_are_published_and_only_on_loopback(services: Services) -> None:
    published = {
        (name, port["host_ip"], port["published"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    loopback = "127.0.0.1"
    assert published == {("mlflow", loopback, "5000"), ("prefect", loopback, "4200"), ("serving", loopback, "8000")}


def test_databases_and_artifacts_have_no_way_out_and_no_way_in_but_the_servers(
    services: Services, tmp_path: Path
) -> None:
    networks = json.loads(compose(tmp_path, FILLED, "--format", "json").stdout)["networks"]
    assert networks["back"]["internal"] is True
    for name in ("postgres", "store"):
        assert list(services[name]["networks"]) == ["back"]
    reach = {name for name, service in services.items() if "back" in (service.get("networks") or {})}
    assert reach == {"postgres", "store", "bucket", "mlflow", "prefect", "care"}


def test_every_service_that_stays_up_tells_whether_it_is_well_and_comes_back(services: Services) -> None:
    lasting = set(services) - one_shots(services)
    assert lasting == {"postgres", "store", "mlflow", "prefect", "worker", "serving"}
    for name in lasting:
        assert services[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert services[name]["restart"] == "unless-stopped", name


def test_every_image_is_pinned(services: Services) -> None:
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert ":" in service["image"], name
        assert tag not in ("latest", "stable", "edge"), name
        if "build" not in service:
            assert sum(part.isdigit() for part in tag.replace("-", ".").split(".")) >= 2, f"{name}: {tag} may move"


def test_no_secret_stands_on_a_command_line(services: Services) -> None:
    for name, service in services.items():
        shown = json.dumps(
            [service.get(key) for key in ("command", "entrypoint", "healthcheck", "labels", "image", "build")]
        )
        for secret in FILLED.values():
            assert secret not in shown, name
    assert all(secret in json.dumps(services) for secret in FILLED.values())


def test_no_service_may_do_more_than_it_has_to(services: Services) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "build" not in service:
            assert service["user"] not in ("root", "0"), name


def test_every_service_of_ours_is_a_command_that_takes_its_options(services: Services) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    started = {}
    for name, service in services.items():
        if "build" in service and service.get("entrypoint") is None and "profiles" not in service:
            word, *options = service["command"]
            commands[word].make_context(word, options)
            started[name] = word
    assert started == {
        "mlflow": "mlflow-server", "prefect": "prefect-server", "setup": "deploy", "worker": "worker",
        "serving": "serve",
    }  # fmt: skip


def test_with_the_gpu_file_worker_and_serving_get_a_gpu(tmp_path: Path) -> None:
    read = compose(tmp_path, FILLED, "--format", "json", files=("compose.yaml", "compose.gpu.yaml"))
    services = json.loads(read.stdout)["services"]
    for name in ("worker", "serving", "setup"):
        [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert services[name]["build"]["args"] == {"ACCELERATOR": "cuda"}
        assert services[name]["read_only"] is True
    assert "deploy" not in services["mlflow"]


def test_the_settings_of_the_services_lead_to_the_services(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(variable, raising=False)
    settings = load_settings(DEPLOY / "compose.mlflow.yml")
    assert settings.tracking.uri == "http://mlflow:5000"
    assert settings.prefect.api_url == "http://prefect:4200/api"
    assert settings.serving.ready_url == "http://serving:8000/readyz"
    assert {"mlflow", "prefect", "serving"} <= set(services)
    assert "mlflow:*" in settings.server.allowed_hosts
    for name, port in (
        ("mlflow", settings.server.port),
        ("prefect", settings.prefect.port),
        ("serving", settings.serving.port),
    ):
        [published] = services[name]["ports"]
        assert published["target"] == port
    assert f"--keys={settings.serving.keys}" in services["serving"]["command"]


def test_the_tracking_server_keeps_its_password_in_the_environment(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in services["mlflow"]["environment"].items():
        monkeypatch.setenv(name, value)
    shown = " ".join(server_command(load_settings(DEPLOY / "compose.mlflow.yml")))
    assert "--host 0.0.0.0" in shown
    assert FILLED["MLFLOW_DB_PASSWORD"] in os.environ["MLFLOW_BACKEND_STORE_URI"]
    assert FILLED["MLFLOW_DB_PASSWORD"] not in shown


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def store_url() -> Iterator[str]:
    """An S3 server in a process of its own."""
    port = free_port()
    server = subprocess.Popen(
        [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


def test_the_bucket_is_made_once_and_asking_again_does_no_harm(services: Services, store_url: str) -> None:
    import boto3

    bucket = services["bucket"]
    assert bucket["entrypoint"][-2:] == ["python", "-c"]
    environment = os.environ | bucket["environment"] | {"MLFLOW_S3_ENDPOINT_URL": store_url}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", *bucket["command"]], env=environment, check=True, timeout=60)
    client = boto3.client(
        "s3", endpoint_url=store_url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    made = [one["Name"] for one in client.list_buckets()["Buckets"]]
    assert made == [services["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://")]


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[int]:
    """The port of a PostgreSQL server with the superuser postgres, in a process of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    folder = Path("/tmp") / f"pg-{tmp_path.parent.name}-{os.getpid()}"  # a socket's path is short
    folder.mkdir(mode=0o700)
    as_owner: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_owner = ["runuser", "-u", "postgres", "--"]
    port = free_port()
    data, options = (
        str(folder / "data"),
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off",
    )
    run = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL, "timeout": 120}
    subprocess.run(
        [
            *as_owner,
            str(programs / "initdb"),
            "-D",
            data,
            "-U",
            "postgres",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "-N",
        ],
        **run,
    )  # type: ignore[call-overload]
    subprocess.run(
        [*as_owner, str(programs / "pg_ctl"), "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start"],
        **run,
    )  # type: ignore[call-overload]
    try:
        yield port
    finally:
        subprocess.run([*as_owner, str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop"], **run)  # type: ignore[call-overload]
        shutil.rmtree(folder)


def test_each_server_gets_a_database_that_the_other_cannot_open(postgres: int, tmp_path: Path) -> None:
    import psycopg2

    folder = next(Path("/tmp").glob(f"pg-{tmp_path.parent.name}-*"))
    owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    psql = ["psql", "-q", "-v", "ON_ERROR_STOP=1", "-h", str(folder), "-p", str(postgres), "-U", "postgres", "-f", "-"]
    # A password that would end a string in SQL: it comes from the environment and is quoted there.
    passwords = {"MLFLOW_DB_PASSWORD": "it's", "PREFECT_DB_PASSWORD": 'a"b\\c'}
    subprocess.run(
        [*owner, *psql],
        input=(DEPLOY / "docker" / "databases.sql").read_text(), text=True, check=True, env=os.environ | passwords,
        cwd="/",
    )  # fmt: skip
    for own, other in (("mlflow", "prefect"), ("prefect", "mlflow")):
        login = {
            "host": "127.0.0.1", "port": postgres, "user": own, "password": passwords[f"{own.upper()}_DB_PASSWORD"],
        }  # fmt: skip
        connection = psycopg2.connect(dbname=own, **login)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE here (number integer)")
        connection.close()
        with pytest.raises(psycopg2.OperationalError, match="permission denied"):
            psycopg2.connect(dbname=other, **login)


# ------------------------------------------------------------------------------------------- work pools and manifests


def job_of(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A job as Prefect's workers fill in a template."""
    from prefect.client.orchestration import PrefectClient
    from prefect.workers.base import BaseJobConfiguration
    from pydantic import ConfigDict

    class Everything(BaseJobConfiguration):
        """Keeps what a kind of worker has besides."""

        model_config = ConfigDict(extra="allow")

    # It is asked nothing: our templates refer to no block and no variable.
    client = PrefectClient("http://127.0.0.1:9/api")
    filled = asyncio.run(Everything.from_template_and_values(base_job_template=template, values=values, client=client))
    return filled.model_dump()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.parent.name)
def test_prefect_takes_the_template_of_a_work_pool(path: Path) -> None:
    from prefect.server.schemas.actions import WorkPoolCreate

    template = json.loads(path.read_text())
    WorkPoolCreate(name="nights", type=path.parent.name, base_job_template=template)
    broken = template | {"job_configuration": template["job_configuration"] | {"image": "{{ imag }}"}}
    with pytest.raises(ValueError, match="imag"):
        WorkPoolCreate(name="nights", type=path.parent.name, base_job_template=broken)


def test_a_job_of_docker_gets_gpus_and_is_not_root() -> None:
    template = json.loads((DEPLOY / "docker" / "job-template.json").read_text())
    job = job_of(template, {"gpus": 2})
    created = job["container_create_kwargs"]
    assert created["device_requests"] == [{"driver": "nvidia", "count": 2, "capabilities": [["gpu"]]}]
    assert created["user"] == next(value for word, value in final_stage() if word == "USER")
    assert (created["read_only"], created["cap_drop"], job["privileged"]) == (True, ["ALL"], False)
    # Prefect's own command follows, and llava-pipeline is not what runs it.
    assert created["entrypoint"] == ["tini", "--"]


def test_a_job_of_docker_lands_beside_the_services(services: Services, tmp_path: Path) -> None:
    read = json.loads(compose(tmp_path, FILLED, "--format", "json").stdout)
    job = job_of(json.loads((DEPLOY / "docker" / "job-template.json").read_text()), {})
    assert job["networks"] == [read["networks"]["front"]["name"]]
    assert job["volumes"] == [f"{read['volumes']['home']['name']}:/home/llava/state"]
    settings = job["env"]["LLAVA_PIPELINE_SETTINGS"].removeprefix("/opt/llava-pipeline/")
    assert settings in allowed_in_the_image()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_ones_that_kubernetes_takes(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        validate(manifest, "1.32", strict=True)


def test_a_job_of_kubernetes_is_one_that_kubernetes_takes_with_a_gpu_and_without_root() -> None:
    template = json.loads((KUBERNETES / "job-template.json").read_text())
    manifest = job_of(template, {"gpus": 4, "name": "night"})["job_manifest"]
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    check_pod(manifest["spec"]["template"]["spec"])
    # What the worker makes of variables and of the command before it creates the job.
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = ["prefect", "flow-run", "execute"]
    manifest["metadata"].setdefault("labels", {})
    validate(manifest, "1.32", strict=True)


def check_pod(pod: dict[str, Any]) -> None:
    """Nobody in it is root, and it cannot become so."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]


def test_no_pod_of_the_manifests_is_root() -> None:
    every = [manifest for path in MANIFESTS for manifest in yaml.safe_load_all(path.read_text())]
    deployments = {one["metadata"]["name"]: one for one in every if one["kind"] == "Deployment"}
    assert set(deployments) == {"prefect-worker", "serving"}
    for deployment in deployments.values():
        check_pod(deployment["spec"]["template"]["spec"])
    [served] = deployments["serving"]["spec"]["template"]["spec"]["containers"]
    word, *options = served["args"]
    typer.main.get_command(app).commands[word].make_context(word, options)  # type: ignore[attr-defined]
