"""Why an attempt ended: one word, its cause (which budget it costs, and whether a retry can help), and a hint.

The trainer picks the word, the operator acts on the cause, users grep for the word; docs/troubleshooting.md is
generated from this table. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["user", "application", "infrastructure", "preemption"]
"""user: never retried, a person must change something. The others have a budget each; preemption's is endless."""


@dataclass(frozen=True)
class Reason:
    name: str
    cause: Cause
    exit_code: int
    meaning: str
    hint: str


_ALL = (
    # Input that a person must change.
    Reason("InvalidConfig", "user", 64, "The resolved configuration can't be carried out.",
           "Change the field that the message names."),
    Reason("DatasetNotFound", "user", 65, "The data set, or its bucket, isn't there.",
           "Check dataset.uri and that the credentials may read it."),
    Reason("DatasetInvalid", "user", 65, "The data set holds rows that can't be used, or none at all.",
           "Mend the rows that the message numbers, or set dataset.onInvalid: drop."),
    Reason("ModelNotFound", "user", 66, "The base model isn't there.",
           "Check model.uri, model.revision and that the credentials may read it."),
    Reason("ModelInvalid", "user", 66, "The folder isn't a model that can be loaded safely.",
           "Give a folder with config.json, a tokenizer and *.safetensors weights; pickle files are never loaded."),
    Reason("LicenceRefused", "user", 66, "The base model's licence isn't one of those that are allowed.",
           "Take another base model, or have the licence added to model.allowedLicenses or to the operator's "
           "models.allowedLicenses, whichever the message names."),
    Reason("OutputNotFound", "user", 67, "The destination's bucket isn't there.",
           "Create the bucket, or change output.uri."),
    Reason("OutputOccupied", "user", 67, "The destination holds another job's result.",
           "Choose another output.uri, or delete what lies there."),
    Reason("AccessDenied", "user", 68, "The store refused the credentials.",
           "Check the keys in the Secret that credentialsRef names, and what they may do."),
    Reason("CredentialsMissing", "user", 68, "A Secret lacks a key that is needed.",
           "Add the key that the message names to the Secret."),
    # The training program.
    Reason("OutOfMemory", "application", 70, "A process was killed for memory, or a GPU had none left.",
           "A restart computes half as much at once. Else raise resources.memory, "
           "lower training.microBatchSize or dataset.maxSequenceLength, or take zero2/zero3."),
    Reason("NonFiniteLoss", "application", 71, "Too many steps whose loss or gradient is NaN or infinite.",
           "Look at the rows that the message numbers; lower training.learningRate; see training.maxSkippedSteps."),
    Reason("LossSpike", "user", 77, "The training loss left the ones before it behind.",
           "Lower training.learningRate or training.maxGradNorm, or take training.lossSpike.action: rollback."),
    Reason("TrainingError", "application", 1, "The training program raised an error.",
           "Read failure.logTail; the same error again on a restart means it is no accident."),
    Reason("ResultMismatch", "application", 78, "The written result, loaded again, isn't the trained one.",
           "Nothing was uploaded; it is written again from the last checkpoint. The same again is a bug of this family "
           "and method: report it with the message; output.merge: false leaves the merged model out."),
    Reason("RankKilled", "infrastructure", 72, "A process was killed by a signal that nobody here sent.",
           "Usually the node: look at its events. It is restarted from the last checkpoint."),
    Reason("Stalled", "infrastructure", 73, "No step was finished for runPolicy.stallSeconds.",
           "The message names the rank that the others wait for, failure.logTail its stack, the pods' logs all stacks: "
           "look at that pod's node and network. Raise stallSeconds when steps are that long."),
    Reason("StorageUnavailable", "infrastructure", 74, "Object storage didn't answer.",
           "It is tried again; look at the store's endpoint and the network."),
    Reason("PeerLost", "infrastructure", 75, "Another pod of the group went away.",
           "Look at the other pods' failure; the group is restarted together."),
    Reason("DiskFull", "infrastructure", 76, "The pod's scratch disk is full.",
           "Raise resources.scratch."),
    # Found by the operator.
    Reason("PodDeleted", "infrastructure", 0, "A pod was deleted while it ran.",
           "The group is restarted from the last checkpoint."),
    Reason("NodeLost", "infrastructure", 0, "A pod's node went away.", "The group is restarted on other nodes."),
    Reason("PodFailed", "infrastructure", 0, "A pod ended without telling why.",
           "Look at the pod's events and logs."),
    Reason("Preempted", "preemption", 143, "The pods were asked to leave, and saved a checkpoint.",
           "Nothing to do: it goes on from the checkpoint."),
    Reason("Evicted", "preemption", 0, "The cluster removed a pod (drain, preemption or pressure).",
           "Nothing to do: it goes on from the last checkpoint."),
    Reason("NameConflict", "user", 0, "An object of the name that is needed belongs to somebody else.",
           "Rename the FineTuneJob, or remove the other object."),
    Reason("InvalidSpec", "user", 0, "The spec can't be carried out.", "Change the field that the message names."),
    Reason("DeadlineExceeded", "user", 0, "runPolicy.activeDeadlineSeconds passed.",
           "Raise the deadline, or give more hardware."),
    Reason("RestartBudgetSpent", "user", 0, "It failed more often than runPolicy.maxRestarts allows.",
           "Look at failure: the last cause is told there."),
)  # fmt: skip

REASONS = {reason.name: reason for reason in _ALL}


def cause(reason: str) -> Cause:
    """The cause of a reason; what an unknown version calls something else counts as infrastructure."""
    known = REASONS.get(reason)
    return known.cause if known else "infrastructure"
