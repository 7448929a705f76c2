"""Defines every name that two components must agree on, such as labels, ports and paths.

It does no I/O and has no logic except for composing names.
"""

from __future__ import annotations

from typing import Final

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION: Final = "finetune-operator.io/v1alpha1"
KIND: Final = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"

FIELD_MANAGER = "finetune-operator"

# A job's name becomes the prefix of child names (`<name>-<attempt>-<index>` must stay a DNS label).
MAX_NAME_LENGTH = 50

LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_ROLE = f"{GROUP}/role"  # ROLE_TRAINER | ROLE_PREFLIGHT | ROLE_CLEANUP
ROLE_TRAINER = "trainer"
ROLE_PREFLIGHT = "preflight"
ROLE_CLEANUP = "cleanup"

# On a FineTuneJob whose deletion policy isn't Retain.
FINALIZER = f"{GROUP}/output"

# The owner of a ServiceAccount or a claim allows jobs to name it by this label.
LABEL_USE = f"{GROUP}/use"
USE_TRAINING = "training"  # on a ServiceAccount
USE_INPUT = "input"  # on a claim: jobs may read it
USE_OUTPUT = "output"  # on a claim: jobs may read it and write to it

COMMON_LABELS = {
    "app.kubernetes.io/name": "finetune-trainer",
    "app.kubernetes.io/part-of": "finetune-operator",
    "app.kubernetes.io/managed-by": "finetune-operator",
}

# The operator's watches and lists of Jobs and pods select these. They prove nothing: anybody can
# set and remove labels.
WATCHED_LABELS = {"app.kubernetes.io/managed-by": COMMON_LABELS["app.kubernetes.io/managed-by"]}

ANNOTATION_RUN_CONFIG = f"{GROUP}/run-config"  # the RunConfig as JSON, on the pod template
ANNOTATION_RENDEZVOUS_SECRET = f"{GROUP}/rendezvous-secret"  # on the pod template, if there are several nodes
ANNOTATION_SPEC_DIGEST = f"{GROUP}/spec-digest"
ANNOTATION_PODS_DIGEST = f"{GROUP}/pods-digest"  # of the fields that shape pods, on a Job
ANNOTATION_AVOIDED_NODES = f"{GROUP}/avoided-nodes"  # nodes with failed GPUs, as JSON, on a Job
ANNOTATION_RELEASED_AT = f"{GROUP}/released-at"  # when an incomplete group was suspended, on a Job
ANNOTATION_RELEASES = f"{GROUP}/releases"  # how often that happened, on a Job
ANNOTATION_RESTARTS = f"{GROUP}/restarts"  # previous restarts by cause, as JSON, on a Job

# Kueue: the queue of a Job, and the topology that its pods share.
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
ANNOTATION_QUEUE_TOPOLOGY = "kueue.x-k8s.io/podset-{policy}-topology"  # required or preferred

CONTAINER_TRAINER = "trainer"

# Ports. Container ports are named, since Prometheus and PodMonitors select by name.
METRICS_PORT_NAME = "metrics"
TRAINER_METRICS_PORT = 9400
RENDEZVOUS_PORT = 29500
OPERATOR_METRICS_PORT = 9090
OPERATOR_PROBES_PORT = 8081
OPERATOR_PROGRESS_PORT = 8443

PROGRESS_AUDIENCE = GROUP
PROGRESS_PATH = "/v1/progress"

# Paths inside a trainer pod.
RUN_CONFIG_PATH = "/etc/finetune/run/run.json"
RENDEZVOUS_FILE = "rendezvous-secret"  # next to run.json
CREDENTIALS_ROOT = "/etc/finetune/credentials"  # + /<role>/<key of the Secret>
CA_BUNDLE_PATH = "/etc/finetune/ca/ca.crt"
PROGRESS_TOKEN_PATH = "/var/run/secrets/finetune-operator.io/progress/token"  # noqa: S105 (a path)
SCRATCH_ROOT = "/scratch"
PVC_ROOT = "/mnt/pvc"
VOLUMES_ROOT = "/mnt/volumes"
MODEL_CACHE_ROOT = "/mnt/model-cache"
TERMINATION_LOG_PATH = "/dev/termination-log"

# Environment variables that the Job controller or the manifests set; the supervisor reads them at
# start.
ENV_NODE_RANK = "JOB_COMPLETION_INDEX"
ENV_RUN_CONFIG = "FINETUNE_RUN_CONFIG"  # path, default RUN_CONFIG_PATH
ENV_TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
ENV_POD_NAME = "POD_NAME"

# Keys of a Secret that `credentialsRef` names.
SECRET_HF_TOKEN = "HF_TOKEN"  # noqa: S105 (a key's name)
SECRET_AWS_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
)
SECRET_GOOGLE_KEYS = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BASE_URL")  # the JSON itself, and another server
SECRET_AZURE_KEYS = (
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_TENANT_ID",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_AUTHORITY_HOST",
)

# Keys of a tracker's Secret. They become environment variables of only one process: the one that
# talks to trackers.
SECRET_TRACKER_KEYS = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
)

# Inside an output folder.
FINETUNE_DIR = "finetune"
MANIFEST_PATH = f"{FINETUNE_DIR}/manifest.json"
OWNER_PATH = f"{FINETUNE_DIR}/owner.json"  # while a job claims the folder
HISTORY_PATH = f"{FINETUNE_DIR}/history.jsonl"
DATA_REPORT_PATH = f"{FINETUNE_DIR}/data-report.json"
SAMPLES_PATH = f"{FINETUNE_DIR}/samples.jsonl"
EVALUATION_PATH = f"{FINETUNE_DIR}/evaluation.json"
REPORT_PATH = f"{FINETUNE_DIR}/report.html"
TENSORBOARD_DIR = f"{FINETUNE_DIR}/tensorboard"
WANDB_DIR = f"{FINETUNE_DIR}/wandb"
CHECKPOINTS_DIR = "checkpoints"
CHECKPOINT_MANIFEST = "manifest.json"
CHECKPOINT_HISTORY = "history.jsonl"
CHECKPOINT_STATE = "state.json"


def attempt_job_name(name: str, attempt: int) -> str:
    """Returns the name of the batch/v1 Job of an attempt; attempts count from 1."""
    return f"{name}-{attempt}"


def preflight_job_name(name: str) -> str:
    """Returns the name of the batch/v1 Job that checks inputs and output without a GPU."""
    return f"{name}-check"


def cleanup_job_name(name: str) -> str:
    """Returns the name of the batch/v1 Job that deletes what a deleted FineTuneJob leaves."""
    return f"{name}-clean"


def service_name(name: str) -> str:
    """Returns the name of the headless Service that gives an attempt's pods DNS names.

    It isn't the job's own name, so that a job called `postgres` makes no Service `postgres`.
    """
    return f"{name}-ranks"


def network_policy_name(name: str) -> str:
    """Returns the name of the NetworkPolicy of a job's pods."""
    return f"{name}-pods"


def master_address(name: str, attempt: int) -> str:
    """Returns the DNS name, within the namespace, of the pod of node rank 0."""
    return f"{attempt_job_name(name, attempt)}-0.{service_name(name)}"


def checkpoint_dir(step: int) -> str:
    """Returns the folder, relative to the output, of the checkpoint after optimizer step `step`."""
    return f"{CHECKPOINTS_DIR}/step-{step}"
