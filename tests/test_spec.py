"""What may be asked for is checked before anything runs, and a wrong word is told with its place and a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import llava_pipeline.spec
from llava_pipeline.errors import SpecError
from llava_pipeline.spec import Frozen, HubSource, ParquetSource, RunSpec, load_spec, profile_names, read_profile

PARTS = [
    part
    for part in vars(llava_pipeline.spec).values()
    if isinstance(part, type) and issubclass(part, Frozen) and part is not Frozen
]


def refusal(profile: str, *overrides: str) -> str:
    """What a person is told, on exit code 2."""
    with pytest.raises(SpecError) as caught:
        load_spec(profile, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def a_file(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --------------------------------------------------------------------------------------------- profiles and models


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads_under_its_name(name: str) -> None:
    spec = load_spec(name)
    assert spec.profile == name
    assert spec.registered_model == f"llava-projector-{name}"
    assert spec.title
    assert spec.cost


def test_the_shipped_profiles_are_the_known_ones() -> None:
    big = {"llava-1.5", "llama-3.1-8b", "smolvlm-like"}
    assert set(profile_names()) == {"budget", "budget-b16", "easy-vqa", "pocket", "real-cpu", "smol", "tiny"} | big


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_has_its_sentence(part: type[BaseModel]) -> None:
    fields = part.model_fields
    assert [name for name, field in fields.items() if not field.description] == []
    assert [text for field in fields.values() if (text := field.description) and not text.endswith(".")] == []


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_is_frozen_and_closed(part: type[BaseModel]) -> None:
    assert part.model_config["frozen"] is True
    assert part.model_config["extra"] == "forbid"


def test_a_spec_cannot_be_changed() -> None:
    spec = load_spec("tiny")
    with pytest.raises(ValidationError, match="frozen"):
        spec.training.max_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", profile_names())
def test_a_spec_survives_json(name: str) -> None:
    spec = load_spec(name, ["training.learning_rate=3e-4", "evaluation.ask=[one, two]"])
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


# --------------------------------------------------------------------------------------------- a folder for the hub

VSFT = "HuggingFaceH4/llava-instruct-mix-vsft"


def a_shard(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00001-9f3c1e7d.parquet").touch()


def path_of(spec: RunSpec) -> str | None:
    """Of the Parquet files that stand in for the hub; None where it is the hub itself."""
    if isinstance(spec.data.source, ParquetSource):
        return spec.data.source.path
    assert isinstance(spec.data.source, HubSource)
    return None


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_that_stands_in_for_the_hub_does_so_for_its_data_set(tmp_path: Path, below: str) -> None:
    a_shard(tmp_path / VSFT / below)
    spec = load_spec("budget", [f"backbones.source={tmp_path}"])
    assert path_of(spec) == str(tmp_path / VSFT)
    assert spec.data.max_samples == load_spec("budget").data.max_samples
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    parts = dict(load_spec("budget"))
    assert path_of(RunSpec(**parts | {"backbones": spec.backbones})) == path_of(spec)
    assert path_of(RunSpec(**parts)) is None


def test_a_folder_without_the_data_set_leaves_it_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / VSFT).mkdir(parents=True)
    assert path_of(load_spec("budget", [f"backbones.source={tmp_path}"])) is None
    assert path_of(load_spec("budget")) is None


def test_a_source_that_was_named_is_kept(tmp_path: Path) -> None:
    a_shard(tmp_path / VSFT)
    overrides = [f"backbones.source={tmp_path}", "data.source={kind: parquet, path: elsewhere}"]
    assert path_of(load_spec("budget", overrides)) == "elsewhere"


# --------------------------------------------------------------------------------------------- profile files


def test_a_file_is_a_profile_too(tmp_path: Path) -> None:
    text = load_spec("tiny").model_copy(update={"profile": "mine"}).model_dump_json()
    assert load_spec(a_file(tmp_path, text)).registered_model == "llava-projector-mine"


def test_an_unknown_profile_is_told_with_those_there_are() -> None:
    told = refusal("tinny")
    assert told == f"no profile 'tinny'; there are: {', '.join(profile_names())}; or give the path of a .yaml file"


def test_a_profile_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "nowhere.yaml' (No such file or directory); check the path" in refusal(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1, 2", r"is not valid YAML: expected ',' or ']', but got '<stream end>' in line 1, column 9; correct it"),
        ("a: 1\nb: c: d", r"is not valid YAML: mapping values are not allowed here in line 2, column 5; correct it"),
        ("a: !!python/object:os.system x", r"could not determine a constructor for the tag"),
        ("a: 2024-13-45", r"is not valid YAML: month must be in 1..12"),
        ("a: \x00", r"is not valid YAML: unacceptable character #x0000"),
        ("", r"must be a mapping of keys to values, not NoneType"),
        ("- a", r"must be a mapping of keys to values, not list"),
        (b"\xff\xfe\x00", r"is not UTF-8 text; save it as such"),
    ],
)
def test_a_file_that_is_no_profile_is_told_with_the_place(text: str | bytes, told: str, tmp_path: Path) -> None:
    found = refusal(a_file(tmp_path, text))
    assert "mine.yaml'" in found
    assert told in found


def test_a_missing_part_is_told_by_name(tmp_path: Path) -> None:
    told = refusal(a_file(tmp_path, "profile: mine"))
    assert told == "; ".join(f"{part}: field required" for part in ("backbones", "data", "training", "evaluation"))


# --------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("training.learning_rate=1E-3", "training.learning_rate", 0.001),
        ("training.learning_rate=2.5e-4", "training.learning_rate", 0.00025),
        ("training.max_steps=20", "training.max_steps", 20),
        ("data.max_samples=1e3", "data.max_samples", 1000),
        ("model.chat_template=llava", "model.chat_template", "llava"),
        ("data.source=scenes", "data.source.kind", "scenes"),
        ("data.source=easy-vqa", "data.source.requirement", "easy-vqa==1.0"),
        ("data.source={kind: hub, repo_id: owner/name}", "data.source.repo_id", "owner/name"),
        ("data.source.seed=9", "data.source.seed", 9),
        ("backbones.source=~/models", "backbones.source", "~/models"),
        ("evaluation.picture=", "evaluation.picture", None),
        ("evaluation.picture=a=b.png", "evaluation.picture", "a=b.png"),
        ("evaluation.ask=['What is it?']", "evaluation.ask", ("What is it?",)),
        ("title=the sea", "title", "the sea"),
    ],
)
def test_an_override_means_what_it_says(override: str, place: str, value: Any) -> None:
    found: Any = load_spec("tiny", [override])
    for name in place.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_the_profile_is_not_touched() -> None:
    assert load_spec("tiny", ["training.max_steps=1", "training.max_steps=2"]).training.max_steps == 2
    assert load_spec("tiny").training.max_steps == read_profile("tiny")["training"]["max_steps"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_steps", "cannot read 'training.max_steps'; write it as --set training.max_steps=20"),
        ("=5", "cannot read '=5'; write it as --set training.max_steps=20"),
        ("", "cannot read ''; write it as"),
        ("training.max_steps.x=1", "--set training.max_steps.x: there is nothing below training.max_steps"),
        ("title.a.b=1", "--set title.a.b: there is nothing below title.a"),
        ("title=[1", "--set title: the value '[1' is not valid YAML (expected ',' or ']', but got '<stream end>'"),
        (
            "title=a: b: c",
            "is not valid YAML (mapping values are not allowed here in line 1, column 5); put it in quotes",
        ),
        ("title=2024-13-45", "--set title: the value '2024-13-45' is not valid YAML (month must be in 1..12); put it"),
    ],
)
def test_an_override_that_cannot_be_read_is_told(override: str, told: str) -> None:
    assert told in refusal("tiny", override)


# --------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize(
    "place",
    ["trainning", "training.max_step", "model.projector", "data.source.sede", "backbones.vision_tower.revision"],
)
def test_an_unknown_key_is_told_with_its_place_and_where_to_look(place: str) -> None:
    told = refusal("tiny", f"{place}=1")
    assert told == f"{place}: unknown key; `llava-pipeline plan --profile tiny --json` shows the known ones"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_steps=0", "training.max_steps: input should be greater than 0 (found 0)"),
        ("training.max_steps=many", "training.max_steps: input should be a valid integer, unable to parse"),
        (
            "training.max_steps=1.5",
            "training.max_steps: input should be a valid integer, got a number with a fractional",
        ),
        ("training.learning_rate=-1e-3", "training.learning_rate: input should be greater than 0 (found -0.001)"),
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number (found inf)"),
        ("training.learning_rate=.nan", "training.learning_rate: input should be a finite number (found nan)"),
        ("training.warmup_share=1", "training.warmup_share: input should be less than 1 (found 1)"),
        ("data.max_rejected_share=2", "data.max_rejected_share: input should be less than or equal to 1 (found 2)"),
        ("data.max_tokens=8", "data.max_tokens: input should be greater than 8 (found 8)"),
        ("data.source.seed=x", "data.source.seed: input should be a valid integer"),
        ("data.source=imagenet", "data.source: input tag 'imagenet' found using 'kind' does not match any of"),
        (
            "model.vision_feature_layer=2",
            "model.vision_feature_layer: input should be less than or equal to -1 (found 2)",
        ),
        (
            "model.chat_template=none",
            "model.chat_template: input should be 'native', 'llava', 'vicuna', 'chatml', 'llama3', 'zephyr' or 'plain' "
            "(found 'none')",
        ),
        (
            "training.precision=int8",
            "training.precision: input should be 'auto', 'fp32', 'bf16' or 'fp16' (found 'int8')",
        ),
        ("profile=My Profile", "profile: string should match pattern '^[a-z0-9][a-z0-9.-]*$' (found 'My Profile')"),
        ("training=", "training: input should be a valid dictionary or instance of TrainingSpec (found None)"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_place_and_what_is_allowed(override: str, told: str) -> None:
    found = refusal("tiny", override)
    assert found.startswith(told)
    assert "(found " in found


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("revision=main", "backbones.language_model.revision"),
        ("sha256={model.safetensors: abc}", "backbones.language_model.sha256.model.safetensors"),
        ("fallback.requirement=llm", "backbones.language_model.fallback.requirement"),
    ],
)
def test_a_pin_that_is_none_is_told_with_its_place(override: str, place: str) -> None:
    assert refusal("smol", f"backbones.language_model.{override}").startswith(f"{place}: string should match pattern")


def test_every_problem_is_told_at_once() -> None:
    told = refusal("tiny", "training.max_steps=0", "evaluation.max_samples=-1", "modell=1")
    assert [problem.split(":")[0] for problem in told.split("; ") if ": " in problem] == [
        "training.max_steps",
        "evaluation.max_samples",
        "modell",
    ]


def keys(part: Any, place: str = "") -> Iterator[str]:
    """Every key of a profile, by its path."""
    for name, value in part.items():
        yield place + name
        if isinstance(value, dict):
            yield from keys(value, f"{place}{name}.")


@settings(deadline=None, max_examples=120)
@given(
    place=st.sampled_from(sorted(keys(load_spec("tiny").model_dump()))) | st.text(max_size=8),
    value=st.text(max_size=8)
    | st.sampled_from(["0x_", "0b_", "1:2:3", "2024-02-30", "&a [*a]", "? {a: b}", "1e999", "9" * 5000]),
)
@example(place="training.learning_rate", value="1e-3")
@example(place="training.max_steps", value="9" * 5000)
def test_any_override_is_a_spec_or_refused_by_name(place: str, value: str) -> None:
    with contextlib.suppress(SpecError):
        assert isinstance(load_spec("tiny", [f"{place}={value}"]), RunSpec)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_steps=null", "training: set a budget: max_steps, max_samples, max_minutes or max_cost"),
        ("training.max_cost=2", "training: max_cost needs the machine's price; set price_per_hour"),
    ],
)
def test_a_budget_that_is_none_is_told_in_one_sentence(override: str, told: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec("tiny", [override])
    assert str(error.value) == told
