"""The projector as MLflow serves it: this file is stored with the weights and run when the model is loaded.

Nothing is unpickled: MLflow runs this text and hands it the folder with the weights. The backbones are fetched as the
spec of the run says. No part of the package imports this file, and its folder is no package.
"""

from typing import Any

import pandas  # type: ignore[import-untyped]  # stubs for one annotation
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]  # exported, but not in so many words


class Projector(PythonModel):
    """Pictures and questions in, answers out."""

    def load_context(self, context: Any) -> None:
        from pathlib import Path

        from llava_pipeline.stages.answering import Answering

        self.answering = Answering.stored(Path(context.artifacts["projector"]), Path(context.artifacts["spec"]))

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per row of ``image`` (bytes of a picture's file) and ``question``."""
        longest = int((params or {}).get("max_new_tokens", 32))
        return self.answering.answers(list(model_input["image"]), list(model_input["question"]), longest)


set_model(Projector())
