"""Lists the reasons why an attempt can end, each with its cause, exit code, meaning and a hint.

The cause determines which restart budget a failure costs and whether a retry can help. The trainer
chooses the reason, the operator acts on its cause, and users grep for it; docs/troubleshooting.md
is generated from this table. It does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["user", "application", "memory", "infrastructure", "preemption"]
"""Why an attempt ended. A failure with cause user is never retried, since a person must change
something. Each other cause has a restart budget of its own; that of preemption is large."""


@dataclass(frozen=True)
class Reason:
    """One reason why an attempt ends; exit code 0 means that the trainer never exits with it."""

    name: str
    cause: Cause
    exit_code: int
    meaning: str
    hint: str


_ALL = (
    # Input that a person must change.
    Reason("InvalidConfig", "user", 64, "The resolved configuration can't be run.",
           "Change the field that the message names and raise runPolicy.retry; if it can't be changed, create a new "
           "job."),
    Reason("DatasetNotFound", "user", 65, "The dataset or its bucket doesn't exist.",
           "Check whether the dataset exists and the credentials allow reading it, then raise runPolicy.retry; for "
           "another dataset.uri, create a new job."),
    Reason("DatasetInvalid", "user", 65, "The dataset has rows that can't be used, or no rows at all.",
           "Fix the rows that the message lists and raise runPolicy.retry, or create a job with "
           "dataset.onInvalid: drop."),
    Reason("ModelNotFound", "user", 66, "The base model doesn't exist.",
           "Check whether the model exists and the credentials allow reading it, then raise runPolicy.retry; for "
           "another model.uri or model.revision, create a new job."),
    Reason("ModelInvalid", "user", 66, "The folder contains no model that can be loaded safely and trained.",
           "Correct the file that the message names and raise runPolicy.retry, or create a job with another model.uri. "
           "A folder needs config.json, a tokenizer and *.safetensors weights that belong together; pickle files are "
           "never loaded."),
    Reason("CheckpointInvalid", "user", 66, "The job can't start from what model.checkpoint names.",
           "The message says what differs, is damaged or is missing. Create a job that names another checkpoint, has "
           "the same recipe, or has model.checkpoint.use: weights."),
    Reason("LicenceRefused", "user", 66, "The license of the base model isn't allowed.",
           "Have the license added to the list that the message names, the job's model.allowedLicenses or the "
           "operator's models.allowedLicenses, and raise runPolicy.retry; or create a job with another base model."),
    Reason("OutputNotFound", "user", 67, "The bucket of the output doesn't exist.",
           "Create the bucket and raise runPolicy.retry, or create a job with another output.uri."),
    Reason("OutputOccupied", "user", 67, "Another job has claimed the output folder, or has left files in it.",
           "Delete what the message names and raise runPolicy.retry, or create a job with another output.uri. If a "
           "deleted job of the same name has left it, output.existing: discard deletes it."),
    Reason("AccessDenied", "user", 68, "The storage rejected the credentials.",
           "Check the keys in the Secret that credentialsRef names, and their permissions, then raise "
           "runPolicy.retry."),
    Reason("CredentialsMissing", "user", 68, "A Secret lacks a required key, or the pod has no identity.",
           "Add the key that the message names to the Secret; without a Secret, give the ServiceAccount that "
           "pod.serviceAccountName names an identity in the cloud. Then raise runPolicy.retry."),
    Reason("PreflightTimeout", "user", 83, "The checks before training took longer than runPolicy.preflightSeconds.",
           "The message names what was being done. If a storage is slow, look at its endpoint and the network; if a "
           "file never ends, correct it. If the inputs really take that long, raise runPolicy.preflightSeconds, and "
           "runPolicy.activeDeadlineSeconds if it is lower. Then raise runPolicy.retry."),
    # The training program.
    Reason("OutOfMemory", "memory", 70, "A process was killed for lack of memory, or a GPU ran out of memory.",
           "Each restart halves the micro-batches, at most runPolicy.maxRestarts.memory times. If that isn't enough, "
           "raise resources.memory, lower training.microBatchSize or use zero2 or zero3, and raise runPolicy.retry; or "
           "create a job with a lower dataset.maxSequenceLength."),
    Reason("InsufficientMemory", "user", 81, "Memory ran out although micro-batches can't get any smaller.",
           "The largest micro-batch is a single example, so a restart would run out of memory again, and there is "
           "none. Raise resources.memory, use GPUs with more memory, or set distribution.strategy to zero3 or fsdp, "
           "and raise runPolicy.retry; or create a job with a lower dataset.maxSequenceLength."),
    Reason("NonFiniteLoss", "application", 71, "The loss or the gradient was NaN or infinite in too many steps.",
           "Look at the rows that the message lists. If a restart doesn't help, create a job with other rows, a lower "
           "training.learningRate or a higher training.maxSkippedSteps."),
    Reason("LossSpike", "user", 77, "The training loss jumped far above the recent losses and stayed there.",
           "Create a job with a lower training.learningRate or training.maxGradNorm, or with "
           "training.lossSpike.action: rollback."),
    Reason("TrainingError", "application", 1, "The training program raised an error.",
           "Read failure.logTail. If the same error occurs again after a restart, it has a permanent cause: correct "
           "it, for example by another pod.image, and raise runPolicy.retry."),
    Reason("ResultNotStored", "application", 82, "The storage didn't accept the result within output.holdSeconds.",
           "The message has the words of the storage. Correct the permissions or make room. A restart trains the steps "
           "since the last stored checkpoint again; if there was none, the whole run. If no restart is left, raise "
           "runPolicy.retry."),
    Reason("ResultMismatch", "application", 78, "The written result, loaded again, differs from the trained model.",
           "Nothing was uploaded; a restart writes the result again from the last checkpoint. If that fails too, this "
           "is a bug with this model family and method: report it with the message. If it is the merged model that "
           "differs, create a job with output.merge: false, which can start from this one's checkpoint by "
           "model.checkpoint."),
    Reason("GpuUnavailable", "infrastructure", 79, "A GPU was requested, and the pod can't use it.",
           "The message names the driver of the node and the one that is needed. Usual causes are a driver that is "
           "too old or still being installed, and libraries of the driver that aren't mounted into the container. A "
           "restart prefers other nodes; if all nodes are alike, update the driver or build a trainer image whose "
           "PyTorch suits it."),
    Reason("GpuFault", "infrastructure", 80, "A GPU failed: memory errors, a lost device, or a fatal Xid error.",
           "The message names the GPU by its UUID and explains the Xid number, and the pod names the node. A restart "
           "prefers other nodes. Drain the node and reset or replace the GPU. Xid errors that programs cause (13, 31, "
           "43, 45, 68, 109) are TrainingErrors."),
    Reason("RankKilled", "infrastructure", 72, "A process was killed by a signal that this project didn't send.",
           "The node is the usual cause: look at its events. A restart resumes from the last checkpoint."),
    Reason("Stalled", "infrastructure", 73, "No step finished for runPolicy.stallSeconds.",
           "The message names the rank that the others wait for, also by the collectives that each rank has called "
           "(PyTorch's flight recorder). failure.logTail has its stack trace, and the logs of the pods have all stack "
           "traces and the last collectives. Look at the node and the network of that pod. If steps really take that "
           "long, raise runPolicy.stallSeconds and, if the job has failed, runPolicy.retry."),
    Reason("StorageUnavailable", "infrastructure", 74, "Object storage didn't respond.",
           "The operation was tried several times. Look at the storage endpoint and the network. A restart resumes "
           "from the last checkpoint."),
    Reason("PeerLost", "infrastructure", 75, "Another pod of the group is gone.",
           "Look at why the other pod ended. A restart of the whole group resumes from the last checkpoint."),
    Reason("DiskFull", "user", 76, "A pod used more local disk than resources.scratch allows, or the output is full.",
           "Raise resources.scratch above the size of the model, the rows, a checkpoint and the result together, or "
           "free space on the volume that the message names; then raise runPolicy.retry. A restart would fill the disk "
           "again, so there is none."),
    # Detected by the operator.
    Reason("PodDeleted", "infrastructure", 0, "A pod was deleted while it was running.",
           "A restart resumes from the last checkpoint. If nobody has deleted the pod, look at its events, and at "
           "those of its Job."),
    Reason("NodeLost", "infrastructure", 0,
           "The node of a pod is gone, hasn't answered for 5 minutes, or doesn't remove a pod that was deleted.",
           "A restart uses other nodes. Look at the node; if it comes back, it removes the pod by itself."),
    Reason("PodRefused", "infrastructure", 0, "The kubelet refused a pod that the scheduler had sent to its node.",
           "The message is the kubelet's. Usual causes are a node that is full, a device that has become unhealthy, "
           "and labels that have changed. A restart goes through the scheduler again."),
    Reason("PodFailed", "infrastructure", 0, "A pod ended without reporting a reason.",
           "The message names the container that ended, if it wasn't the trainer's. Look at the events and the logs of "
           "the pod. A restart resumes from the last checkpoint."),
    Reason("Preempted", "preemption", 143, "The pods were asked to stop and saved a checkpoint.",
           "Nothing to do: training resumes from the checkpoint."),
    Reason("Evicted", "preemption", 0, "The cluster removed a pod (drain, preemption or pressure).",
           "Nothing to do: training resumes from the last checkpoint."),
    Reason("NameConflict", "user", 0, "An object whose name the job needs belongs to another owner.",
           "Remove the other object and raise runPolicy.retry, or create a job with another metadata.name."),
    Reason("InvalidSpec", "user", 0, "The spec can't be run.",
           "Change the field that the message names and raise runPolicy.retry; if it can't be changed, create a new "
           "job."),
    Reason("DeadlineExceeded", "user", 0, "The job didn't finish within runPolicy.activeDeadlineSeconds.",
           "Raise runPolicy.activeDeadlineSeconds, or distribution.nodes, and runPolicy.retry."),
    Reason("RestartBudgetSpent", "user", 0, "The job failed more often than runPolicy.maxRestarts allows.",
           "Look at status.failure, which describes the last failure. Raise runPolicy.retry to go on from the last "
           "checkpoint with new budgets."),
)  # fmt: skip

REASONS = {reason.name: reason for reason in _ALL}


def cause(reason: str) -> Cause:
    """Returns the cause of a reason; one of an unknown version counts as infrastructure."""
    entry = REASONS.get(reason)
    return entry.cause if entry else "infrastructure"


def hint(reason: str) -> str:
    """Returns what a person can do about a reason; empty for one of an unknown version."""
    entry = REASONS.get(reason)
    return entry.hint if entry else ""
