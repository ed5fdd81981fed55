"""A projector as an MLflow model: ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` take it.

Code, weights as safetensors, signature and an example; no pickle, and the backbones by reference. Loading runs the code
that is stored with it, so ``MLFLOW_ALLOW_MODEL_CODE_EXECUTION=false`` refuses it as it does every pyfunc model.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CODE = Path(__file__).parent / "served" / "model.py"
REQUIREMENTS = ("llava-pipeline", "mlflow", "torch", "transformers", "safetensors", "pillow", "peft")
MAX_NEW_TOKENS = 32
EXAMPLE_QUESTION = "What is in the picture?"


def save_model(folder: Path, projector: Path, spec: Path, picture: Path) -> None:
    """Write the model into a new folder; ``projector`` and ``spec`` are copied, ``picture`` is the example's."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)]),
    )
    with warnings.catch_warnings():  # MLflow asks for type hints and an example: the signature and an own one are there
        warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.")
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(CODE),
            artifacts={"projector": str(projector), "spec": str(spec)},
            signature=signature,
            pip_requirements=[f"{name}=={found}" for name in REQUIREMENTS if (found := _version(name))],
        )
    _write_example(folder, picture)


def _write_example(folder: Path, picture: Path) -> None:
    """What a request looks like. Written here: MLflow would load the model to try its own example."""
    import base64
    import json

    from mlflow.models import Model

    example = {
        "dataframe_split": {
            "columns": ["image", "question"],
            "data": [[base64.b64encode(picture.read_bytes()).decode(), EXAMPLE_QUESTION]],
        },
        "params": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    name = "serving_input_example.json"
    (folder / name).write_text(json.dumps(example) + "\n", encoding="utf-8")
    model = Model.load(str(folder))
    model.saved_input_example_info = {
        "artifact_path": name, "serving_input_path": name, "type": "json_object", "pandas_orient": "split",
    }  # fmt: skip
    model.save(str(folder / "MLmodel"))


def _version(name: str) -> str | None:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None
