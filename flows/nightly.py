"""The story as a deployment tells it: a profile and what is changed of it, by a form."""

from __future__ import annotations

import prefect

from flows.form import Changes, Overrides, ProfileName, spec_of
from flows.hooks import HOOKS
from flows.train import train
from llava_pipeline.contracts import Verdict


@prefect.flow(name=train.name, **HOOKS)
def nightly(profile: ProfileName = "pocket", overrides: Overrides = Changes()) -> Verdict:  # noqa: B008
    """Teach a frozen language model to see: only the projector learns.

    Args:
        profile: A profile's name.
        overrides: Values of the profile to change; what is left out stays.
    """
    return train.fn(spec_of(profile, overrides))
