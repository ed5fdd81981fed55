"""The form of a deployment: a profile's name, and any of its values changed.

Made from ``RunSpec``, so that the server refuses an unknown key or a value out of range and names it, and Prefect's
page shows every value with its description.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args

from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo

from llava_pipeline.spec import Frozen, RunSpec, load_spec, profile_names

NAMES = {"profile", "title", "cost"}  # what a profile says of itself


def part_of(model: type[BaseModel], without: frozenset[str] = frozenset()) -> type[BaseModel]:
    """The same model, of which nothing has to be said."""
    fields: dict[str, Any] = {
        name: (Optional[_annotation(field)], Field(None, description=field.description))  # noqa: UP045  # of a value
        for name, field in model.model_fields.items()
        if name not in without
    }
    return create_model(f"{model.__name__}Changes", __base__=Frozen, __doc__=model.__doc__, **fields)


def _annotation(field: FieldInfo) -> Any:
    kind: Any = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return part_of(kind)
    if field.discriminator is not None:
        return Annotated[kind, Field(discriminator=field.discriminator)]
    for limit in field.metadata:
        kind = Annotated[kind, limit]
    return kind


if TYPE_CHECKING:

    class Changes(Frozen):
        """Values of a profile that are changed."""
else:
    Changes = part_of(RunSpec, frozenset(NAMES))

ProfileName = Annotated[
    str, Field(description="A profile's name.", json_schema_extra={"enum": list[Any](profile_names())})
]
Overrides = Annotated[Changes, Field(description="Values of the profile to change; what is left out stays.")]


def spec_of(profile: str, overrides: Changes) -> RunSpec:
    """The validated spec of a form.

    Raises:
        SpecError: values that contradict each other; single ones have been refused before.
    """
    return load_spec(profile, changes=_said(overrides.model_dump(mode="json", exclude_unset=True), RunSpec))


def _said(changes: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """What was filled in. A page sends null for an empty field; it is a value only where the spec has it as one."""
    said: dict[str, Any] = {}
    for name, value in changes.items():
        kind: Any = model.model_fields[name].annotation
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
            said[name] = _said(value, kind)
        elif value is not None or type(None) in get_args(kind):
            said[name] = value
    return said


def spec_of_parameters(parameters: dict[str, Any]) -> RunSpec:
    """The spec of a flow run of the story, by its parameters: a whole one, or a form's."""
    if "spec" in parameters:
        return RunSpec.model_validate(parameters["spec"])
    return spec_of(parameters["profile"], Changes.model_validate(parameters["overrides"]))
