"""Everything this package raises on purpose. A message has the values that were found and what to do about them.

LlavaPipelineError                 exit code 1: something failed
├── UserError                      exit code 2: what was asked for cannot be done as asked
│   ├── SpecError                  unknown profile or key, value out of range, parts that contradict each other
│   ├── IncompatibleParts          a vision tower, language model, template or artifact that do not fit together
│   ├── NotFound                   a folder, file, repository or commit that was named and is not there
│   ├── RevisionMoved              a branch that leads to another commit than the one that was used before
│   ├── NoSuchRun                  a run, version or alias that does not exist
│   ├── NotPromoted                a version that may not become champion, or not be deleted
│   ├── OtherTraining              a folder that holds another training, or one that is running
│   ├── PictureRefused             a picture that cannot be read or is not accepted
│   ├── KeyFileRefused             a file of API keys that is not one, or that others can write
│   ├── AddressRefused             an address that cannot be served on, or not without keys
│   ├── BackupRefused              a backup that is not whole, or a place that is in use or not empty
│   └── ExportRefused              a folder that is taken, or parts that an engine cannot read
├── BackboneError
│   ├── BackboneUnavailable        not reachable now, or not to be read, and not cached
│   ├── DigestMismatch             a file is not the file that was pinned
│   └── WeightsMismatch            missing or unexpected keys or shapes in a checkpoint
├── StoreError
│   ├── MissingArtifact            a stage output that is not (or no longer) in the store
│   ├── DamagedArtifact            a stage output that differs from its manifest
│   └── DiskFull                   no space left for a stage output
├── DataError
│   ├── SourceUnavailable          the data cannot be read
│   ├── TooManyRejected            more rows were refused than the spec allows
│   ├── NothingToLearn             no supervised token in the whole snapshot
│   ├── NothingNew                 the last run has read all there is
│   └── WorkerDied                 a process that checked rows was killed
├── TrainingError
│   ├── Diverged                   the loss or the gradient stopped being a number
│   ├── OutOfMemory                one sample takes more memory than there is
│   ├── Interrupted                asked to stop; it goes on from where it was when it is started again
│   ├── TrainerDied                the process that trained was killed
│   ├── NothingTrained             no combination of a sweep could be trained
│   └── FrozenWeightsChanged       a frozen part's digest differs after training
├── TrackingError                  MLflow refuses
│   ├── TrackingUnavailable        MLflow cannot be reached
│   └── NotShipped                 a night that waited was refused
├── BackupFailed                   a database or an artifact cannot be copied, or not be put back
├── ExportDiffers                  another engine does not answer as this one does
├── NotServing                     the server did not start
└── Regressed                      the champion does not answer any more as it was recorded
"""

from __future__ import annotations


class LlavaPipelineError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UserError(LlavaPipelineError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class SpecError(UserError):
    """Unknown profile or key, a value out of range, or parts of a spec that contradict each other."""


class IncompatibleParts(UserError):
    """A vision tower, language model, template or artifact that do not fit together."""


class NotFound(UserError):
    """A folder, file, repository or commit that was named and is not there."""


class RevisionMoved(UserError):
    """A branch that leads to another commit than the one that was used before."""


class NoSuchRun(UserError):
    """A run, version or alias that does not exist."""


class NotPromoted(UserError):
    """A version that may not become champion, or whose aliases may not be taken from it."""


class PictureRefused(UserError):
    """A picture that cannot be read, or that the image gate does not accept."""


class KeyFileRefused(UserError):
    """A file of API keys that is not one, or that others can write."""


class AddressRefused(UserError):
    """An address that cannot be served on, or not without keys."""


class BackupRefused(UserError):
    """A backup that is not whole, or a place of one, or for one, that is in use or not empty."""


class ExportRefused(UserError):
    """A folder that is taken, parts that an engine cannot read, or an engine that is not installed."""


class BackboneError(LlavaPipelineError):
    """A backbone cannot be had or used."""


class BackboneUnavailable(BackboneError):
    """Not reachable now, or not to be read, and not cached."""


class DigestMismatch(BackboneError):
    """A file is not the file that was pinned."""


class WeightsMismatch(BackboneError):
    """Missing or unexpected keys, or other shapes, in a checkpoint."""


class StoreError(LlavaPipelineError):
    """The store of stage outputs cannot give or take an artifact."""


class MissingArtifact(StoreError):
    """A stage output that is not, or no longer, in the store."""


class DamagedArtifact(StoreError):
    """A stage output that differs from its manifest."""


class DiskFull(StoreError):
    """No space left for a stage output."""


class DataError(LlavaPipelineError):
    """The data set cannot be used."""


class SourceUnavailable(DataError):
    """The data cannot be read."""


class TooManyRejected(DataError):
    """More rows were refused than the spec allows."""


class NothingToLearn(DataError):
    """No supervised token in the whole snapshot."""


class NothingNew(DataError):
    """The last run has read all there is."""


class WorkerDied(DataError):
    """A process that checked rows was killed."""


class TrainingError(LlavaPipelineError):
    """Training cannot go on."""


class Diverged(TrainingError):
    """The loss or the gradient stopped being a number."""


class OutOfMemory(TrainingError):
    """One sample takes more memory than there is."""


class TrainerDied(TrainingError):
    """The process that trained was killed, or failed in a way that it could not tell."""


class NothingTrained(TrainingError):
    """No combination of a sweep could be trained."""


class Interrupted(TrainingError):
    """Training was asked to stop; it has saved where it was, and goes on from there when it is started again."""


class OtherTraining(UserError):
    """A folder that holds another training, or one that is running."""


class FrozenWeightsChanged(TrainingError):
    """A frozen part's digest differs after training."""


class TrackingError(LlavaPipelineError):
    """MLflow refuses."""


class TrackingUnavailable(TrackingError):
    """MLflow cannot be reached."""


class NotShipped(TrackingError):
    """A night that waited for MLflow was refused; it is put aside."""


class BackupFailed(LlavaPipelineError):
    """A database or an artifact that cannot be copied, or not be put back."""


class ExportDiffers(LlavaPipelineError):
    """Another engine does not answer from the exported files as this one does."""


class NotServing(LlavaPipelineError):
    """The server did not start."""


class Regressed(LlavaPipelineError):
    """The champion does not answer any more as it was recorded, or what is served is not the champion."""


class NotStarted(LlavaPipelineError):
    """A service of the installation did not start."""


class NotDeployed(LlavaPipelineError):
    """Prefect's server does not take what is to be deployed."""
