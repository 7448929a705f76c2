"""The table of valid and invalid jobs on which pydantic and the API server must agree. It contains
only values."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

ABSENT = object()

MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune-operator.io/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "minimal", "namespace": "default"},
    "spec": {
        "model": {"uri": "hf://org/model"},
        "dataset": {"uri": "s3://data/train.jsonl"},
        "method": {"type": "lora", "lora": {}},
        "output": {"uri": "s3://models/minimal"},
    },
}


@dataclass(frozen=True)
class Case:
    """One change to a valid job. `changes` are dotted paths under spec (or `metadata.…`) and their
    values; `field` is the field that a refusal names."""

    id: str
    changes: tuple[tuple[str, Any], ...]
    field: str | None = None

    @property
    def valid(self) -> bool:
        return self.field is None

    @property
    def body(self) -> dict[str, Any]:
        return changed(MINIMAL, *self.changes)


def changed(body: dict[str, Any], *changes: tuple[str, Any]) -> dict[str, Any]:
    """Return a copy with values set, or removed if the value is ABSENT. A list index is a number in
    the path."""
    new = copy.deepcopy(body)
    for path, value in changes:
        at: Any = new if path.split(".")[0] in ("metadata", "apiVersion", "kind", "spec", "") else new["spec"]
        *parents, last = path.split(".")
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at.setdefault(parent, {})
        if value is ABSENT:
            at.pop(last, None)
        else:
            at[last] = copy.deepcopy(value)
    return new


def ok(id_: str, *changes: tuple[str, Any]) -> Case:
    return Case(id_, changes)


def bad(id_: str, field: str, *changes: tuple[str, Any]) -> Case:
    return Case(id_, changes, field)


def one(path: str, *values: Any, also: tuple[tuple[str, Any], ...] = ()) -> tuple[Case, ...]:
    """Cases for valid values of one field."""
    return tuple(ok(f"{path}={_short(value)}", *also, (path, value)) for value in values)


def none_of(path: str, *values: Any, also: tuple[tuple[str, Any], ...] = ()) -> tuple[Case, ...]:
    """Cases for values of one field that are refused by the field's name."""
    return tuple(bad(f"{path}!={_short(value)}", f"spec.{path}", *also, (path, value)) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]}…{len(text)}"


FULL = {"method": {"type": "full"}}
GPU = ("resources.gpu", {"name": "nvidia.com/gpu"})
TEST_FILE = (("dataset.test", {"uri": "s3://data/test.jsonl"}),)
EARLIER = (("model.checkpoint", {"uri": "s3://models/first"}),)
LONG = "x" * 1100
A_CLAIM = {"name": "work", "claim": {"name": "team-data"}}
A_BUCKET = {"name": "rows", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "attributes": {"bucketName": "b"}}}
AN_IMAGE = {"name": "base", "image": {"reference": "registry.test/models/llama:1"}}
ON_A_VOLUME = (
    ("model.uri", "volume://work/models/llama"), ("dataset.uri", "volume://rows/a/*.jsonl"),
    ("dataset.validation.uri", "volume://rows/b.jsonl"), ("dataset.test.uri", "volume://work/c.jsonl"),
)  # fmt: skip
SETTABLE = (
    "NCCL_SOCKET_IFNAME", "NCCL_IB_PKEY", "GLOO_SOCKET_IFNAME", "TORCH_NCCL_TRACE_BUFFER_SIZE", "PYTORCH_ALLOC_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_CACHE_DISABLE", "FI_MR_CACHE_MONITOR", "NCCL_TOPO_FILE",
    "FI_EFA_USE_DEVICE_RDMA", "UCX_TLS", "OMP_PROC_BIND", "HF_HUB_DOWNLOAD_TIMEOUT",
    "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy",
)  # fmt: skip
NOT_SETTABLE = (
    "PATH", "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "HOME", "FINETUNE_SCRATCH", "JOB_COMPLETION_INDEX",
    "POD_NAME", "NVIDIA_VISIBLE_DEVICES", "AWS_REGION", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HF_TOKEN_PATH",
    "HF_hub_token", "NCCL_API_KEY", "UCX_KEY", "TORCH_PASSWORD", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT",
    "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_INJECTION64_PATH", "UCX_MODULE_DIR", "NCCL_CONF_FILE",
    "TORCH_EXTENSIONS_DIR", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_HOME", "PYTORCH_TRANSFORMERS_CACHE",
    "CUDA_HOME", "CUDA_CACHE_PATH", "CUDA_INJECTION32_PATH", "CUDNN_PATH", "NCCL_COMM_ID", "NCCL_RAS_ADDR",
    "NCCL_CUDA_PATH", "UCX_GDB_COMMAND", "IBV_DRIVERS", "RDMAV_DRIVERS", "IBV_CONFIG_DIR", "FI_PROVIDER_PATH",
    "OMP_TOOL_LIBRARIES", "HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_TRUST_REMOTE_CODE", "HF_ALLOW_CODE_EVAL",
    "HF_INFERENCE_ENDPOINT", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DEBUG", "TRUST_REMOTE_CODE",
    "TRANSFORMERS_CACHE", "PYTHONSTARTUP", "LD_AUDIT", "PYTORCH_NVCC", "TORCH_ADDR2LINE_BINARY",
    "TORCH_WORKER_SERVER_SOCKET", "CUDA_NVCC_EXECUTABLE", "CUDA_HOST_COMPILER", "UCX_STATS_DEST", "UCX_ERROR_MAIL_TO",
    "Https_Proxy", "XNCCL_DEBUG", "NCCL_", "NCCL-DEBUG", "NCCL DEBUG", "", "N" * 129,
)  # fmt: skip

CASES: tuple[Case, ...] = (
    ok("the smallest job"),
    ok("full training", ("method", {"type": "full"})),
    ok("everything together",
       ("metadata.labels", {"team": "support"}),
       ("model.revision", "main"), ("model.dtype", "float32"), ("model.credentialsRef", {"name": "hf-token"}),
       ("dataset.validation", {"fraction": 0.05}), ("dataset.test", {"uri": "s3://data/test.jsonl"}),
       ("dataset.columns", {"messages": "chat"}), ("dataset.labels", ["no", "yes"]),
       ("dataset.credentialsRef", {"name": "s3-reader"}), ("dataset.format", "messages"),
       ("method.lora", {"rank": 8, "alpha": 16, "dropout": 0.1, "targetModules": ["q_proj"], "bias": "none"}),
       ("training", {"epochs": 1.5, "globalBatchSize": 128, "microBatchSize": 4, "learningRate": 1e-5,
                     "scheduler": "cosine", "earlyStopping": {"patience": 2}, "seed": 7}),
       ("distribution", {"nodes": 2, "processesPerNode": 8, "strategy": "zero3"}), GPU,
       ("resources.cpu", "16"), ("resources.memory", "128Gi"), ("resources.sharedMemory", "16Gi"),
       ("checkpoint", {"every": 100, "keep": 3}), ("output.credentialsRef", {"name": "s3-writer"}),
       ("evaluation", {"samples": 20, "maxNewTokens": 32}),
       ("runPolicy", {"suspend": True, "preflight": "never", "maxRestarts": {"application": 0}, "stallSeconds": 0}),
       ("pod", {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "serviceAccountName": "trainer", "labels": {"example.com/team": "a"},
                "annotations": {"example.com/note": "two words"}, "imagePullSecrets": [{"name": "pull"}]})),
    # The object itself.
    bad("unknown field in spec", "spec.color", ("color", "red")),
    bad("unknown field deep inside", "spec.method.lora.r", ("method.lora", {"r": 8})),
    bad("a field in the wrong case", "spec.runPolicy.max_restarts", ("runPolicy", {"max_restarts": {}})),
    bad("no model", "spec.model", ("model", ABSENT)),
    bad("no dataset", "spec.dataset", ("dataset", ABSENT)),
    bad("no method", "spec.method", ("method", ABSENT)),
    bad("no output", "spec.output", ("output", ABSENT)),
    bad("no model uri", "spec.model.uri", ("model", {})),
    bad("a null where a value is required", "spec.model.uri", ("model.uri", None)),
    bad("no spec", "spec", ("spec", ABSENT)),
    bad("spec is a list", "spec", ("spec", [])),
    bad("model is a string", "spec.model", ("model", "hf://org/model")),
    ok("nulls count as absent", ("training", {"epochs": None}), ("model.revision", None), ("pod", None)),
    ok("a null in a map counts as absent", ("pod.labels", {"team": None})),
    ok("an integer written as a float", ("training.maxSteps", 3.0)),
    ok("name of 50 characters", ("metadata.name", "a" * 50)),
    bad("name of 51 characters", "metadata.name", ("metadata.name", "a" * 51)),
    bad("name with a dot", "metadata.name", ("metadata.name", "a.b")),
    bad("name that begins with a digit", "metadata.name", ("metadata.name", "7b")),
    bad("name in capitals", "metadata.name", ("metadata.name", "Replies")),
    # Storage locations.
    *one("model.uri", "hf://gpt2", "hf://org/model-1.5_b", "s3://models/base", "s3://models/base/",
         "pvc://claim/path/to/model", "s3://models/überraschung", "gs://models/base", "az://models/base/"),
    *none_of("model.uri", "", 7, "org/model", "hf://", "hf://a/b/c", "file:///etc/shadow", "http://169.254.169.254/x",
             "s3://models", "s3://models/", "S3://models/x", "s3://Models/x", "s3://models/../x", "s3://models/a//b",
             "s3://models/./x", "s3://models/x/..", "s3://models/a b", "s3://models/a?b",
             "s3://models/a#b", "s3://models/a\\b", "s3://models/a\nb", "pvc://claim", "pvc://../x",
             "pvc://claim/../../other", "gs://models", "az://models/../x", "gcs://models/x", f"s3://models/{LONG}",
             "hf://org/model\n", " hf://org/model"),
    *one("dataset.uri", "hf://org/data/train.jsonl", "pvc://claim/train.jsonl", "s3://data/a/b.jsonl", "gs://data/*.jsonl",
         "az://data/train/"),
    *none_of("dataset.uri", "hf://org/data", "s3://data//x", "gs://data//x.jsonl", "/data/x.jsonl"),
    *one("output.uri", "gs://models/v1", "az://models/v1", "s3://models/v1", "pvc://claim/out", "s3://models/v1/", "s3://models/a\u00a0b"),
    *none_of("output.uri", "hf://org/model", "gs://models", "az://models/./v1", "azure://models/v1",
             "az://my_models/v1", "az://my.models/v1", "az://my--models/v1", "az://-models/v1", "az://ab/v1",
             "s3://models/a/../b", "file:///tmp/x", "s3://m/x"),
    # The model.
    *one("model.revision", "main", "v1.0", "refs/pr/1", "0123456789abcdef0123456789abcdef01234567"),
    *none_of("model.revision", "", "-x", "a b", 1, "x" * 129),
    bad("a revision of what is not on a hub", "spec.model.revision",
        ("model", {"uri": "s3://models/base", "revision": "main"})),
    *one("model.dtype", "auto", "float32", "bfloat16"),
    *none_of("model.dtype", "float16", "fp32", "", 32, True),
    *one("model.quantization", "none", "int8", "nf4"),
    *none_of("model.quantization", "int4", 4, True),
    bad("full training of a quantised base", "spec.model.quantization",
        ("model.quantization", "nf4"), ("method", {"type": "full"})),
    ok("a quantised base with ddp", ("model.quantization", "nf4"), ("distribution.strategy", "ddp")),
    *(bad(f"a quantised base with {name}", "spec.distribution.strategy", ("model.quantization", "int8"),
          ("distribution.strategy", name)) for name in ("zero1", "zero2", "zero3", "fsdp")),
    ok("a base in nf4 with fsdp", ("model.quantization", "nf4"), ("distribution.strategy", "fsdp")),
    *(bad(f"a base in nf4 with {name}", "spec.distribution.strategy", ("model.quantization", "nf4"),
          ("distribution.strategy", name)) for name in ("zero1", "zero2", "zero3")),
    *(bad(f"{name} on a base in nf4 with fsdp", "spec.method.lora", ("model.quantization", "nf4"),
          ("distribution.strategy", "fsdp"), (f"method.lora.{name}", value))
      for name, value in (("dora", True), ("addedTokens", ["<tool>"]))),
    *(bad(f"a quantised base with {name}", "spec.method.lora.init", ("model.quantization", "nf4"),
          ("method.lora.init", name)) for name in ("pissa", "olora")),
    *none_of("model.trustRemoteCode", True, "true", 1),
    *one("model.trustRemoteCode", False),
    *one("model.allowedLicenses", [], ["apache-2.0", "unknown"]),
    *none_of("model.allowedLicenses", "mit", ["mit"] * 65),
    bad("a license without a name", "spec.model.allowedLicenses[0]", ("model.allowedLicenses", [""])),
    *none_of("model.credentialsRef", "hf-token", []),
    bad("a Secret without a name", "spec.model.credentialsRef.name", ("model.credentialsRef", {})),
    bad("a Secret of another namespace", "spec.model.credentialsRef.name",
        ("model.credentialsRef", {"name": "other/hf-token"})),
    bad("a Secret's namespace", "spec.model.credentialsRef.namespace",
        ("model.credentialsRef", {"name": "hf-token", "namespace": "other"})),
    # The data.
    *one("dataset.format", "auto", "prompt-completion", "messages", "preference", "text", "alpaca", "sharegpt",
         "label-studio", "snorkel"),
    *none_of("dataset.format", "csv", "jsonl", "Alpaca", ""),
    *one("dataset.uri", "s3://data/train/", "s3://data/train/*.jsonl.gz", "pvc://claim/rows/**/part-*.parquet"),
    bad("neither a place nor places", "spec.dataset.uri", ("dataset", {})),
    bad("a place and places", "spec.dataset.uri", ("dataset.sources", [{"uri": "s3://data/a.jsonl"}])),
    ok("a mixture", ("dataset", {"sources": [{"uri": "s3://data/a/", "weight": 2}, {"uri": "s3://data/b.csv",
       "weight": 0.5, "format": "alpaca", "columns": {"output": "answer"}}], "columns": {"prompt": "q"}})),
    *(bad(f"a source with {key} {_short(value)}", f"spec.dataset.sources[0].{key}",
          ("dataset", {"sources": [{"uri": "s3://data/a.jsonl", key: value}]}))
      for key, value in (("weight", 0), ("weight", -1), ("weight", 101), ("weight", "2"), ("uri", "gs://data/../a.jsonl"),
                         ("uri", "s3://data/../a.jsonl"), ("format", "csv"), ("name", "x"))),
    bad("a source without uri", "spec.dataset.sources[0].uri", ("dataset", {"sources": [{"weight": 1}]})),
    *one("dataset.columns", {}, {"prompt": "question", "completion": "answer"}, {"role": "from", "content": "value"}),
    *none_of("dataset.columns", "question", []),
    bad("a column without a name", "spec.dataset.columns.prompt", ("dataset.columns", {"prompt": ""})),
    bad("a column that we don't have", "spec.dataset.columns.query", ("dataset.columns", {"query": "q"})),
    *one("dataset.labels", [], ["ham", "spam"]),
    *none_of("dataset.labels", "spam", {}, ["<" * 256] * 257),
    ok("many classes", ("dataset.labels", ["<" * 65] * 1000)),
    *one("dataset.minLabelProbability", 0, 0.7, 1),
    *none_of("dataset.minLabelProbability", -0.1, 1.5, "sure"),
    *one("dataset.chatTemplate", "{% for m in messages %}{{ m.content }}{% endfor %}", "chat_template.jinja", "none"),
    *none_of("dataset.chatTemplate", "", "chatml", "../x.jinja", "a/b.jinja", 7),
    *one("dataset.rendering.date", "2026-11-30", "2028-02-29"),
    *none_of("dataset.rendering.date", "", "today", "2026-13-01", "2026-02-29", "2026-11-31", "2026-11-30T00:00:00Z"),
    *one("dataset.rendering.answers", "all", "last"),
    *none_of("dataset.rendering.answers", "first", True),
    *one("dataset.rendering.reasoning", "train", "mask", "remove"),
    *one("dataset.rendering.openTurns", "refuse", "cut"),
    *one("dataset.rendering.whitespace", "keep", "strip"),
    *one("dataset.rendering.controlTokens", "keep", "refuse", "encode"),
    bad("control tokens as text in rows that were rendered already", "spec.dataset.rendering.controlTokens",
        ("dataset.rendering.controlTokens", "encode"), ("dataset.chatTemplate", "none")),
    bad("a rendering that we don't have", "spec.dataset.rendering.style", ("dataset.rendering", {"style": "x"})),
    *one("dataset.maxSequenceLength", 8, 1048576),
    *none_of("dataset.maxSequenceLength", 7, 1048577, -1, "2048", 2.5, True, 2**63),
    *none_of("dataset.packing", "yes", 1, "true"),
    *one("dataset.onInvalid", "fail", "drop"),
    *none_of("dataset.onInvalid", "ignore", ""),
    *one("dataset.validation", {"fraction": 0.05}, {"fraction": 0.499}, {"uri": "s3://data/val.jsonl"}),
    *(Case(f"validation {_short(value)}", (("dataset.validation", value),), "spec.dataset.validation.fraction")
      for value in ({}, {"fraction": 0.1, "uri": "s3://data/val.jsonl"}, {"fraction": 0}, {"fraction": 0.5},
                    {"fraction": "0.1"}, {"fraction": -0.1})),
    *one("dataset.validation", {"uri": "gs://data/val.jsonl"}, {"uri": "az://data/val.jsonl"}),
    *none_of("dataset.validation.uri", "gs://data//val.jsonl", "s3://data/../val.jsonl", "val.jsonl"),
    *one("dataset.test", {"fraction": 0.1}, {"uri": "s3://data/test/"}),
    *(Case(f"test {_short(value)}", (("dataset.test", value),), "spec.dataset.test.fraction")
      for value in ({}, {"fraction": 0.1, "uri": "s3://data/test.jsonl"}, {"fraction": 0.5})),
    # The method.
    bad("a method without type", "spec.method.type", ("method", {"lora": {}})),
    *none_of("method.type", "qlora", "LoRA", "", also=(("method", {}),)),
    bad("lora without its settings", "spec.method.lora", ("method", {"type": "lora"})),
    bad("full with lora's settings", "spec.method.lora", ("method", {"type": "full", "lora": {}})),
    *one("method.lora.rank", 1, 1024),
    *none_of("method.lora.rank", 0, -1, 1025, "16", 16.5, 2**63, True),
    *none_of("method.lora.alpha", 0, 4097, "32"),
    *one("method.lora.dropout", 0, 0.999),
    *none_of("method.lora.dropout", 1, -0.1, "0.1"),
    *one("method.lora.targetModules", ["all-linear"], ["model.layers.0.q_proj"]),
    *none_of("method.lora.targetModules", [], "q_proj", ["m"] * 65),
    bad("a target module that is no name", "spec.method.lora.targetModules[0]",
        ("method.lora.targetModules", ["q proj"])),
    bad("a null among target modules", "spec.method.lora.targetModules[1]",
        ("method.lora.targetModules", ["q_proj", None])),
    *one("method.lora.bias", "none", "all", "lora_only"),
    *none_of("method.lora.bias", "some", True),
    *one("method.lora.rankStabilized", True, False),
    *none_of("method.lora.rankStabilized", "true", 1),
    *one("method.lora.dora", True, False),
    *none_of("method.lora.dora", "true", 1),
    bad("biases of a quantised base", "spec.method.lora.bias",
        ("model.quantization", "nf4"), ("method.lora.bias", "all")),
    bad("a quantised base merged", "spec.output.merge", ("model.quantization", "nf4"), ("output.merge", True)),
    bad("added tokens merged", "spec.output.merge", ("method.lora.addedTokens", ["<t>"]), ("output.merge", True)),
    bad("dora with zero3", "spec.method.lora.dora", ("method.lora.dora", True), ("distribution.strategy", "zero3")),
    *(bad(f"{field} {value} with zero3", f"spec.method.lora.{field}",
          (f"method.lora.{field}", value), ("distribution.strategy", "zero3"))
      for field, value in (("init", "pissa"), ("init", "olora"), ("addedTokens", ["<t>"]))),
    ok("dora with fsdp", ("method.lora.dora", True), ("distribution.strategy", "fsdp")),
    *one("method.lora.addedTokens", [], ["<tool>", "</tool>", "größer"]),
    *none_of("method.lora.addedTokens", "<tool>", ["t"] * 257),
    *(bad(f"an added token {_short(value)}", "spec.method.lora.addedTokens[0]", ("method.lora.addedTokens", [value]))
      for value in ("", "two words", "a\n", "x" * 65)),
    *one("method.lora.init", "default", "pissa", "olora"),
    *none_of("method.lora.init", "gaussian", True),
    *(bad(f"{name} with dora", "spec.method.lora.init", ("method.lora", {"init": name, "dora": True}))
      for name in ("pissa", "olora")),
    *one("method.lora.modulesToSave", [], ["lm_head"], ["embed_tokens", "lm_head"]),
    *none_of("method.lora.modulesToSave", "lm_head", ["m"] * 17),
    bad("a module to save that is no name", "spec.method.lora.modulesToSave[0]",
        ("method.lora.modulesToSave", ["lm head"])),
    ok("full training of some weights", ("method", {"type": "full", "full": {"trainable": ["model.layers.[0-3].*"]}})),
    ok("full training but for some weights", ("method", {"type": "full", "full": {"freeze": ["*embed_tokens*"]}})),
    bad("lora with full's settings", "spec.method.full", ("method", {"type": "lora", "lora": {}, "full": {}})),
    *(bad(f"a pattern of weights {value!r}", "spec.method.full.freeze[0]",
          ("method", {"type": "full", "full": {"freeze": [value]}})) for value in ("a b", "", "a/b", "(x|y)")),
    *one("method.lora.plusRatio", 1, 16, 2.5),
    *none_of("method.lora.plusRatio", 0, 0.5, 1000.5, "16"),
    # The recipe.
    *one("training.objective", "supervised", "dpo"),
    *none_of("training.objective", "ppo", ""),
    ok("dpo with its settings", ("training", {"objective": "dpo", "dpo": {"beta": 0.3}})),
    bad("dpo's settings without it", "spec.training.dpo", ("training.dpo", {"beta": 0.3})),
    *none_of("training.dpo.beta", 0, -0.1, 101, "0.1", also=(("training.objective", "dpo"),)),
    ok("dpo of a full model", ("training.objective", "dpo"), ("method", {"type": "full"})),
    ok("epochs alone", ("training.epochs", 0.5)),
    ok("maxSteps alone", ("training.maxSteps", 100)),
    bad("both epochs and maxSteps", "spec.training.maxSteps", ("training", {"epochs": 3, "maxSteps": 100})),
    *none_of("training.epochs", 0, -1, 1000.5, "3"),
    *none_of("training.maxSteps", 0, 100000001, 1.5),
    *one("training.learningRate", 1, 1e-12, 2e-4),
    *none_of("training.learningRate", 0, -1e-4, 1.0001, 1e308, "NaN", "2e-4", True, [2e-4]),
    *one("training.globalBatchSize", 1, 1048576),
    *none_of("training.globalBatchSize", 0, 1048577),
    *one("training.microBatchSize", "auto", 1, 64),
    *none_of("training.microBatchSize", 0, -1, 65, "4", "Auto", "", 1.5, True, [], 2**40),
    *one("training.scheduler", "constant", "linear", "cosine", "wsd", "inverse_sqrt"),
    *none_of("training.scheduler", "exponential"),
    *(ok(f"a floor with {name}", ("training", {"scheduler": name, "minLearningRateRatio": 0.1}))
      for name in ("linear", "cosine", "wsd")),
    *(bad(f"a floor with {name}", "spec.training.minLearningRateRatio",
          ("training", {"scheduler": name, "minLearningRateRatio": 0.1})) for name in ("constant", "inverse_sqrt")),
    *one("training.minLearningRateRatio", 0, 0.0),
    *none_of("training.minLearningRateRatio", -0.1, 1.1, "0", also=(("training.scheduler", "cosine"),)),
    *one("training.decayRatio", 0, 0.25, 1),
    *none_of("training.decayRatio", -0.1, 1.1),
    *one("training.warmupRatio", 0, 1, 0.5),
    *none_of("training.warmupRatio", -0.01, 1.01),
    *one("training.optimizer", "adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"),
    *none_of("training.optimizer", "sgd", "AdamW"),
    *(bad(f"muon with {name}", "spec.training.optimizer", ("training.optimizer", "muon"),
          ("distribution.strategy", name)) for name in ("zero1", "zero2", "zero3", "fsdp")),
    ok("muon with ddp", ("training.optimizer", "muon"), ("distribution.strategy", "ddp")),
    ok("constants of adam", ("training.adam", {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6})),
    ok("one constant of adam", ("training.adam", {"beta2": 0.95})),
    bad("constants of adam with adafactor", "spec.training.adam",
        ("training", {"optimizer": "adafactor", "adam": {"beta2": 0.95}})),
    *none_of("training.adam.beta1", 1, -0.1),
    *none_of("training.adam.beta2", 1, "0.95"),
    *none_of("training.adam.epsilon", 0, 1.5),
    *one("training.groupByLength", True, False),
    *none_of("training.groupByLength", "yes", 1),
    *none_of("training.weightDecay", -0.1, 1.1),
    *none_of("training.maxGradNorm", -1, 1000001),
    *one("training.maxGradNorm", 0),
    *none_of("training.evalEverySteps", -1, 100000001),
    bad("early stopping without validation rows", "spec.training.earlyStopping", ("training.earlyStopping", {})),
    ok("early stopping with validation rows",
       ("training.earlyStopping", {}), ("dataset.validation", {"fraction": 0.1})),
    *none_of("training.earlyStopping.patience", 0, 1001, also=(("dataset.validation", {"fraction": 0.1}),)),
    *one("training.seed", 0, 4294967295),
    *none_of("training.seed", -1, 4294967296),
    *one("training.maxSkippedSteps", 0, 1000000),
    *none_of("training.maxSkippedSteps", -1, 1000001, "auto"),
    *one("training.lossSpike", {}, {"action": "report"}, {"action": "rollback", "maxRollbacks": 0}, {"action": "fail"}),
    *none_of("training.lossSpike.action", "ignore", ""),
    *none_of("training.lossSpike.maxRollbacks", -1, 1001),
    *one("training.activationCheckpointing", "auto", "selective", "always", "never"),
    *none_of("training.activationCheckpointing", "sometimes", True),
    *one("training.gradientMessages", "auto", "float32", "bfloat16"),
    *none_of("training.gradientMessages", "float16", "half", ""),
    ok("gradients in bfloat16 with ddp", ("training.gradientMessages", "bfloat16"), ("distribution.strategy", "ddp")),
    *(bad(f"gradients in bfloat16 with {name}", "spec.training.gradientMessages",
          ("training.gradientMessages", "bfloat16"), ("distribution.strategy", name))
      for name in ("zero1", "zero2", "zero3", "fsdp")),
    # The hardware.
    ok("as many examples as processes", ("distribution", {"nodes": 8, "processesPerNode": 8})),
    bad("fewer examples than processes", "spec.training.globalBatchSize",
        ("distribution", {"nodes": 8, "processesPerNode": 9}), GPU),
    *none_of("distribution.nodes", 0, -1, 1025, 1e9, "2"),
    *none_of("distribution.processesPerNode", 0, 17),
    *one("distribution.strategy", "auto", "ddp", "zero1", "zero2", "zero3", "fsdp"),
    *none_of("distribution.strategy", "zero4", "zero", "fsdp2"),
    *one("distribution", {"strategy": "zero2", "offload": "optimizer"},
         {"strategy": "zero3", "offload": "optimizer"}, {"strategy": "zero3", "offload": "parameters"},
         {"strategy": "fsdp", "offload": "parameters"}, {"offload": "optimizer"}, {"offload": "parameters"}),
    *(bad(f"offload of {offload} under {strategy}", "spec.distribution.offload",
          ("distribution", {"strategy": strategy, "offload": offload}))
      for strategy, offload in (("ddp", "optimizer"), ("zero1", "optimizer"), ("fsdp", "optimizer"),
                                ("ddp", "parameters"), ("zero2", "parameters"))),
    *none_of("distribution.offload", "disk"),
    *one("distribution", {"sequenceParallelSize": 1}, {"processesPerNode": 8, "sequenceParallelSize": 8},
         {"nodes": 2, "processesPerNode": 3, "sequenceParallelSize": 6},
         {"processesPerNode": 4, "sequenceParallelSize": 2, "strategy": "fsdp"}),
    *none_of("distribution.sequenceParallelSize", 0, -1, 65, "auto", 1.5),
    *(bad(f"rows shared by {size} of {processes} processes", "spec.distribution.sequenceParallelSize",
          ("distribution", {"processesPerNode": processes, "sequenceParallelSize": size}))
      for processes, size in ((1, 2), (4, 3), (2, 4))),
    bad("shared rows that aren't packed", "spec.distribution.sequenceParallelSize", ("dataset.packing", False),
        ("distribution", {"processesPerNode": 2, "sequenceParallelSize": 2})),
    ok("shared rows of preference pairs", ("training.objective", "dpo"),
       ("distribution", {"processesPerNode": 2, "sequenceParallelSize": 2})),
    ok("a GPU of the default kind", ("resources.gpu", {})),
    ok("a GPU of another kind", ("resources.gpu", {"name": "nvidia.com/a100"})),
    *none_of("resources.gpu.name", "", "nvidia.com/", "a/b/c", "nvidia gpu"),
    *one("resources.cpu", 16, "16", "500m", "1.5", "auto"),
    *none_of("resources.cpu", "", "-1", -1, "four", 1.5, "16 ", "1e3", "0", 0, "0m", True, 2**51),
    *one("resources.memory", "128Gi", "2000M", 2000000000000, "1Pi", "auto"),
    *none_of("resources.memory", "128GB", "0", "128gi", "١Gi", "Auto", "auto8Gi", "1025Ti", "9999999999999999999999Ei"),
    *none_of("resources.cpu", "2Pi"),
    *one("resources.scratch", "auto", "1Ti"),
    *none_of("resources.scratch", "0Gi", "lots"),
    *none_of("resources.sharedMemory", "auto", "0"),
    bad("shared memory as large as the memory", "spec.resources.sharedMemory",
        ("resources", {"memory": "8Gi", "sharedMemory": "8192Mi"})),
    ok("shared memory a little smaller", ("resources", {"memory": "8Gi", "sharedMemory": "8191Mi"})),
    # Checkpoints, evaluation, tracking.
    *one("checkpoint.every", "auto", 1, 500),
    *none_of("checkpoint.every", 0, "never", "500", -5, 1.5),
    *none_of("checkpoint.keep", 0, 101),
    *one("output.merge", True, False),
    *none_of("output.merge", "yes", 1),
    *one("output.existing", "resume", "discard"),
    *none_of("output.existing", "", "Discard", "replace"),
    *one("model.checkpoint", {"uri": "s3://models/first"}, {"uri": "gs://bucket/x", "step": 4, "use": "weights"},
         {"uri": "pvc://team/x", "credentialsRef": {"name": "s"}}),
    *none_of("model.checkpoint.uri", "hf://org/x", "s3://", "s3://models/../x", ""),
    *none_of("model.checkpoint.step", 0, -1, also=EARLIER),
    *none_of("model.checkpoint.use", "", "Weights", "optimizer", also=EARLIER),
    bad("a checkpoint of its own output", "spec.model.checkpoint.uri", ("model.checkpoint.uri", "s3://models/minimal")),
    bad("a checkpoint of its own output with a slash", "spec.model.checkpoint.uri",
        ("model.checkpoint.uri", "s3://models/minimal/")),
    bad("a checkpoint of its own output without its slash", "spec.model.checkpoint.uri",
        ("model.checkpoint.uri", "s3://models/minimal"), ("output.uri", "s3://models/minimal/")),
    bad("weights into pissa", "spec.model.checkpoint.use", *EARLIER, ("model.checkpoint.use", "weights"),
        ("method.lora.init", "pissa")),
    ok("the training state of pissa", *EARLIER, ("method.lora.init", "pissa")),
    bad("a checkpoint in a volume that isn't listed", "spec.model.checkpoint.uri",
        ("model.checkpoint.uri", "volume://none/x")),
    *one("output.deletionPolicy", "Retain", "DeleteCheckpoints", "Delete"),
    *none_of("output.deletionPolicy", "", "retain", "Orphan"),
    *one("output.holdSeconds", 0, 14400, 604800),
    *none_of("output.holdSeconds", -1, 604801, "1h"),
    bad("merging a full model", "spec.output.merge", ("method", {"type": "full"}), ("output.merge", True)),
    bad("metrics without a test file", "spec.evaluation.metrics", ("evaluation.metrics", ["rouge"])),
    *one("evaluation.metrics", [], ["rouge"], ["rouge", "bleu", "exactMatch", "f1"], also=TEST_FILE),
    *none_of("evaluation.metrics", "rouge", ["bleu", "rouge", "bleu"], also=TEST_FILE),
    bad("an unknown metric", "spec.evaluation.metrics[0]", ("evaluation.metrics", ["accuracy"])),
    *one("evaluation.rows", 1, 10000),
    *none_of("evaluation.rows", 0, 10001, "all"),
    *one("evaluation.generation", {}, {"temperature": 0.7, "topP": 0.9}, {"repetitionPenalty": 1.1}, {"topP": 1.0}),
    *none_of("evaluation.generation.temperature", -0.1, 2.1),
    *none_of("evaluation.generation.repetitionPenalty", 0, 11),
    *none_of("evaluation.generation.topP", 0, 1.1, 0.9),
    bad("topP without temperature", "spec.evaluation.generation.topP", ("evaluation.generation", {"topP": 0.5})),
    bad("samples without a test file", "spec.evaluation.samples", ("evaluation.samples", 5)),
    ok("samples with a test file", ("evaluation.samples", 5), ("dataset.test", {"uri": "s3://data/test.jsonl"})),
    *none_of("evaluation.samples", -1, 1001, also=TEST_FILE),
    *none_of("evaluation.maxNewTokens", 0, 4097),
    *one("tracking.mlflow", {"uri": "http://mlflow:5000"}, {"uri": "https://mlflow.example.com/team-a", "experiment":
         "Support replies v1.2", "registeredModel": "support-replies", "credentialsRef": {"name": "mlflow"}}),
    *(Case(f"mlflow at {_short(uri)}", (("tracking.mlflow", {"uri": uri}),), "spec.tracking.mlflow.uri")
      for uri in ("", "mlflow:5000", "sqlite:///mlflow.db", "file:///tmp", "http://user:secret@mlflow", "http://a b",
                  "http://mlflow?token=1", "http://mlflow/\xa0",
                  "http://mlflow/\u2028x", 5000)),
    *none_of("tracking.mlflow.experiment", "a/b", " a", 1, also=(("tracking.mlflow", {"uri": "http://mlflow"}),)),
    *none_of("tracking.mlflow.registeredModel", "a/b", "x" * 257, also=(("tracking.mlflow", {"uri": "http://mlflow"}),)),
    bad("mlflow without uri", "spec.tracking.mlflow.uri", ("tracking.mlflow", {})),
    *one("tracking.tensorboard", True, False),
    *none_of("tracking.tensorboard", "yes", 1),
    *one("tracking.wandb", {"project": "support"}, {"project": "support", "entity": "team-a", "mode": "offline",
         "credentialsRef": {"name": "wandb"}}),
    *none_of("tracking.wandb.mode", "disabled", "", also=(("tracking.wandb", {"project": "support"}),)),
    bad("wandb without project", "spec.tracking.wandb.project", ("tracking.wandb", {})),
    bad("a key in the file", "spec.tracking.wandb.apiKey", ("tracking.wandb", {"project": "p", "apiKey": "secret"})),
    # Additional resources.
    *one("resources.extra", {}, {"rdma/hca": 8}, {"rdma/hca": "1", "hugepages-2Mi": "5120Mi"},
         {"vpc.amazonaws.com/efa": 32}, {"nvidia.com/hostdev": 1}, {f"example.com/r{n}": 1 for n in range(8)},
         {"hugepages-1Gi": "2Gi"}, {"hugepages-1Gi": "2048Mi"}, {"hugepages-64Ki": 65536}, {"hugepages-2Mi": 2097152}),
    *none_of("resources.extra", {"cpu": 1}, {"memory": "1Gi"}, {"ephemeral-storage": "1Gi"}, {"kubernetes.io/x": 1},
             {"node.kubernetes.io/x": 1}, {"nvidia.com/gpu": 1}, {"nvidia.com/mig-1g.10gb": 1}, {"rdma/hca": 0},
             {"rdma/hca": "1.5"}, {"rdma/hca": "1Gi"}, {"hugepages-2Mi": 0}, {"a b": 1}, {"": 1}, ["rdma/hca"],
             {f"example.com/r{n}": 1 for n in range(9)}, {"hugepages-2Mi": "3Mi"}, {"hugepages-1Gi": "512Mi"},
             {"hugepages-2Mi": 1}, {"hugepages-2Mi": "2097152m"}, {"hugepages-": "2Mi"}, {"hugepages-many": "2Mi"},
             {"hugepages-0Mi": "2Mi"}, {"hugepages-2M": "2M"}, {"hugepages-1Gi": "0.5Gi"}),
    *(bad(f"resource amount {_short(value)}", "spec.resources.extra.rdma/hca", ("resources.extra", {"rdma/hca": value}))
      for value in ("many", -1, True)),
    bad("the GPU again", "spec.resources.extra", ("resources.gpu", {"name": "nvidia.com/h100"}),
        ("resources.extra", {"nvidia.com/h100": 1})),
    # GPUs.
    *one("resources.gpu.name", "nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "nvidia.com/gpu.shared"),
    *none_of("resources.gpu.name", "amd.com/gpu", "habana.ai/gaudi", "gpu.intel.com/xe", "google.com/tpu", "gpu"),
    *(bad(f"two processes on {name}", "spec.distribution.processesPerNode", ("resources.gpu", {"name": name}),
          ("distribution.processesPerNode", 2)) for name in ("nvidia.com/mig-1g.10gb", "nvidia.com/gpu.shared")),
    ok("several nodes with a slice each", ("resources.gpu", {"name": "nvidia.com/mig-1g.10gb"}),
       ("distribution.nodes", 2)),
    # Life cycle.
    *none_of("runPolicy.suspend", "true", 1),
    *one("runPolicy.queueName", "", "team-a"),
    *none_of("runPolicy.queueName", "Team", "x" * 64),
    *one("runPolicy.schedulingTimeoutSeconds", 0, 600, 86400),
    *none_of("runPolicy.schedulingTimeoutSeconds", -1, 86401, "60"),
    *none_of("runPolicy.preflight", "sometimes"),
    *one("runPolicy.maxRestarts", {}, {"application": 0, "infrastructure": 1000}, {"memory": 0}, {"memory": 1000}),
    *none_of("runPolicy.maxRestarts.application", -1, 1001),
    *none_of("runPolicy.maxRestarts.memory", -1, 1001),
    *none_of("runPolicy.activeDeadlineSeconds", -1, 31536001, "1h"),
    *none_of("runPolicy.preflightSeconds", 0, 604801, "1h"),
    *none_of("runPolicy.stallSeconds", -1, 86401),
    *none_of("runPolicy.ttlSecondsAfterFinished", -1, 31536001),
    # The pods.
    *one("pod.labels", {"a": "b"}, {"example.com/a.b_c": "D-1"}, {"a": ""}, {"a" * 63: "b" * 63}),
    *none_of("pod.labels", {"job-name": "x"}, {"controller-uid": "x"}),
    *none_of("pod.labels", {"finetune-operator.io/job-name": "x"}, {"app.kubernetes.io/name": "x"},
             {"batch.kubernetes.io/job-name": "x"}, {f"l{n}": "x" for n in range(33)}, ["a"]),
    *none_of("pod.annotations", {"finetune-operator.io/run-config": "{}"}),
    *(Case(f"{place} key {_short(key)}", ((f"pod.{place}", {key: "x"}),), f"spec.pod.{place}")
      for place in ("labels", "annotations", "nodeSelector") for key in ("a b", "", "a" * 64, "/a", "UPPER.com/a")),
    *(Case(f"label value {_short(value)}", (("pod.labels", {"a": value}),), "spec.pod.labels.a")
      for value in ("two words", "b" * 64, "-x", 1, True)),
    ok("an annotation of 1024 characters", ("pod.annotations", {"a": "ü" * 1024})),
    bad("an annotation of 1025 characters", "spec.pod.annotations.a", ("pod.annotations", {"a": "ü" * 1025})),
    ok("any taint", ("pod.tolerations", [{"operator": "Exists"}])),
    ok("a taint for a while",
       ("pod.tolerations", [{"key": "a", "value": "b", "effect": "NoExecute", "tolerationSeconds": 60}])),
    *(Case(f"toleration {_short(value)}", (("pod.tolerations", [value]),), f"spec.pod.tolerations[0].{field}")
      for field, value in (
          ("operator", {"value": "x"}), ("operator", {"key": "a", "operator": "In"}),
          ("value", {"key": "a", "operator": "Exists", "value": "x"}),
          ("tolerationSeconds", {"key": "a", "tolerationSeconds": 60}),
          ("tolerationSeconds", {"key": "a", "effect": "NoSchedule", "tolerationSeconds": 60}),
          ("tolerationSeconds", {"key": "a", "effect": "NoExecute", "tolerationSeconds": -1}),
          ("effect", {"key": "a", "effect": "No"}), ("key", {"key": "a b"}),
      )),
    *none_of("pod.tolerations", [{"operator": "Exists"}] * 17, {}),
    *one("pod.serviceAccountName", "", "trainer"),
    *none_of("pod.serviceAccountName", "other/trainer", "-x", "X"),
    *one("pod.image", "", "trainer", "registry.test:5000/team/trainer:1.2", "a/b@sha256:" + "0" * 64),
    *none_of("pod.image", "a b", "a@sha256:0", "-x", "https://a/b@c"),
    # Volumes.
    *one("pod.volumes", [], [A_CLAIM], [A_BUCKET], [AN_IMAGE], [A_CLAIM, A_BUCKET, AN_IMAGE],
         [{"name": f"v{n}", "claim": {"name": "c"}} for n in range(8)],
         [{"name": "v", "csi": {"driver": "d.example.com", "attributes": {}, "secretRef": {"name": "s"}}}],
         [{"name": "v", "image": {"reference": "r.test/m@sha256:" + "0" * 64, "pullPolicy": "Always"}}]),
    *none_of("pod.volumes", [{"name": f"v{n}", "claim": {"name": "c"}} for n in range(9)], [A_CLAIM, A_CLAIM],
             [{"name": "v"}], [{**A_CLAIM, "csi": A_BUCKET["csi"]}], [{**AN_IMAGE, **A_BUCKET}],
             [{"name": "v", "hostPath": {"path": "/"}}], [{"name": "v", "emptyDir": {}}],
             [{"name": "v", "claim": {"name": "c"}, "mountPath": "/etc"}]),
    *(Case(f"volume {_short(value)} {number}", (("pod.volumes", [value]),), f"spec.pod.volumes[0].{field}")
      for number, (field, value) in enumerate((
          ("name", {"name": "V", "claim": {"name": "c"}}), ("name", {"name": "a/b", "claim": {"name": "c"}}),
          ("name", {"name": "..", "claim": {"name": "c"}}), ("name", {"name": "v" * 51, "claim": {"name": "c"}}),
          ("name", {"claim": {"name": "c"}}), ("name", {"name": "", "claim": {"name": "c"}}),
          ("claim.name", {"name": "v", "claim": {}}), ("claim.name", {"name": "v", "claim": {"name": "A b"}}),
          ("claim.readOnly", {"name": "v", "claim": {"name": "c", "readOnly": "no"}}),
          ("claim.subPath", {"name": "v", "claim": {"name": "c", "subPath": "../.."}}),
          ("csi.driver", {"name": "v", "csi": {}}), ("csi.driver", {"name": "v", "csi": {"driver": "a b"}}),
          ("csi.readOnly", {"name": "v", "csi": {"driver": "d", "readOnly": False}}),
          ("csi.attributes", {"name": "v", "csi": {"driver": "d", "attributes": {"a b": "c"}}}),
          ("csi.attributes", {"name": "v", "csi": {"driver": "d", "attributes": {f"k{n}": "" for n in range(33)}}}),
          ("image.reference", {"name": "v", "image": {"reference": ""}}),
          ("image.reference", {"name": "v", "image": {"reference": "a b"}}),
          ("image.pullPolicy", {"name": "v", "image": {"reference": "a", "pullPolicy": "never"}}),
      ))),
    *(ok(f"{path} on a volume", (path, uri), ("pod.volumes", [A_CLAIM, A_BUCKET])) for path, uri in ON_A_VOLUME),
    *(bad(f"{path} on an unknown volume of {len(volumes)}", f"spec.{path}", (path, uri), ("pod.volumes", volumes))
      for path, uri in ON_A_VOLUME for volumes in ([], [AN_IMAGE])),
    ok("one of several sources on a volume",
       ("dataset", {"sources": [{"uri": "s3://data/a"}, {"uri": "volume://work/b"}]}), ("pod.volumes", [A_CLAIM])),
    bad("one of several sources on an unknown volume", "spec.dataset.sources",
        ("dataset", {"sources": [{"uri": "volume://work/a"}, {"uri": "volume://b/c"}]}), ("pod.volumes", [A_CLAIM])),
    bad("a volume whose name is only the beginning", "spec.model.uri",
        ("model.uri", "volume://work-2/m"), ("pod.volumes", [A_CLAIM])),
    *none_of("model.uri", "volume://work", "volume://work/", "volume://Work/m", "volume://work/../m", "volume:///m",
             also=(("pod.volumes", [A_CLAIM]),)),
    ok("the output on a writable claim", ("output.uri", "volume://work/out"),
       ("pod.volumes", [{"name": "work", "claim": {"name": "c", "readOnly": False}}])),
    *(bad(f"the output on {_short(volume)}", "spec.output.uri", ("output.uri", f"volume://{volume['name']}/out"),
          ("pod.volumes", [volume])) for volume in (A_CLAIM, A_BUCKET, AN_IMAGE)),
    *one("resources.scratchStorageClass", "", "local-nvme"),
    *none_of("resources.scratchStorageClass", "Local NVMe"),
    *one("pod.network", "", "infiniband"),
    *none_of("pod.network", "Infini Band"),
    *one("pod.onePodPerNode", "auto", "required", "preferred"),
    *none_of("pod.onePodPerNode", "never"),
    *(ok(f"topology {policy}", ("distribution.nodes", 2),
         ("pod.topology", {"key": "topology.kubernetes.io/zone", "policy": policy}))
      for policy in ("required", "preferred", "spread")),
    ok("a topology with its default", ("distribution.nodes", 2), ("pod.topology", {"key": "rack"})),
    bad("a topology of one pod", "spec.pod.topology", ("pod.topology", {"key": "rack"})),
    bad("a topology without a key", "spec.pod.topology.key", ("distribution.nodes", 2), ("pod.topology", {})),
    bad("an empty key", "spec.pod.topology.key", ("distribution.nodes", 2), ("pod.topology", {"key": ""})),
    *(ok(f"node affinity {_short(value)}", ("pod.nodeAffinity", value)) for value in (
        {}, {"required": [{"key": "a", "operator": "In", "values": ["b", "c"]}]},
        {"preferred": [{"key": "a", "operator": "Exists"},
                       {"key": "a", "operator": "Lt", "values": ["7"], "weight": 1}]})),
    *(bad(f"node requirement {_short(value)}", f"spec.pod.nodeAffinity.required[0].{field}",
          ("pod.nodeAffinity", {"required": [value]})) for value, field in (
        ({"key": "a", "operator": "In"}, "values"), ({"key": "a", "operator": "Exists", "values": ["b"]}, "values"),
        ({"key": "a", "operator": "Gt", "values": ["many"]}, "values"),
        ({"key": "a", "operator": "Gt", "values": ["1", "2"]}, "values"),
        ({"key": "a", "operator": "Like", "values": ["b"]}, "operator"), ({"operator": "Exists"}, "key"))),
    bad("a weight of 0", "spec.pod.nodeAffinity.preferred[0].weight",
        ("pod.nodeAffinity", {"preferred": [{"key": "a", "operator": "Exists", "weight": 0}]})),
    *one("pod.schedulerName", "", "volcano"),
    *none_of("pod.schedulerName", "a b"),
    *none_of("pod.priorityClassName", "a b"),
    *one("pod.terminationGracePeriodSeconds", 15, 3600, None),
    *none_of("pod.terminationGracePeriodSeconds", 0, 14, 3601, "60"),
    *none_of("pod.hostNetwork", True),
    *none_of("pod.containers", []),
    bad("a pull secret without a name", "spec.pod.imagePullSecrets[0].name", ("pod.imagePullSecrets", [{}])),
    *(ok(f"variable {_short(name)}", ("pod.env", [{"name": name, "value": "x=1, y"}]))
      for name in SETTABLE),
    *(bad(f"variable {_short(name)}", "spec.pod.env[0].name", ("pod.env", [{"name": name, "value": "x"}]))
      for name in NOT_SETTABLE),
    ok("a plugin by name", ("pod.env", [{"name": "NCCL_NET_PLUGIN", "value": "ofi"}])),
    ok("an empty variable", ("pod.env", [{"name": "NCCL_DEBUG", "value": ""}])),
    *(bad(f"variable with {label}", "spec.pod.env[0].value", ("pod.env", [{"name": name, "value": value}]))
      for label, name, value in (
          ("a plugin by path", "NCCL_NET_PLUGIN", "/mnt/pvc/x/libnccl-net.so"), ("a number", "NCCL_IB_GID_INDEX", 3),
          ("a password", "HTTPS_PROXY", "http://me:password@proxy:3128"), ("two lines", "NCCL_DEBUG", "a\nb"),
          ("a long value", "NCCL_DEBUG", "x" * 1025),
      )),
    bad("a variable without a value", "spec.pod.env[0].value", ("pod.env", [{"name": "NCCL_DEBUG"}])),
    bad("a variable from a Secret", "spec.pod.env[0].valueFrom",
        ("pod.env", [{"name": "NCCL_DEBUG", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}])),
    bad("a variable twice", "spec.pod.env",
        ("pod.env", [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_DEBUG", "value": "WARN"}])),
    ok("32 variables", ("pod.env", [{"name": f"NCCL_{n}", "value": "x"} for n in range(32)])),
    bad("33 variables", "spec.pod.env", ("pod.env", [{"name": f"NCCL_{n}", "value": "x"} for n in range(33)])),
)  # fmt: skip

# (id, the existing job, the changes, the field that the refusal names or None)
TRANSITIONS: tuple[tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...], str | None], ...] = (
    ("nothing", (), (), None),
    ("suspend", (), (("runPolicy.suspend", True),), None),
    ("resume", (("runPolicy.suspend", True),), (("runPolicy.suspend", False),), None),
    ("deadline", (), (("runPolicy.activeDeadlineSeconds", 60),), None),
    ("ttl", (), (("runPolicy.ttlSecondsAfterFinished", 60),), None),
    ("a default spelt out", (), (("training.globalBatchSize", 64), ("resources.cpu", "auto")), None),
    ("labels", (), (("metadata.labels", {"a": "b"}),), None),
    ("model", (), (("model.uri", "hf://org/other"),), "spec.model.uri"),
    ("checkpoint added", (), EARLIER, "spec.model.checkpoint"),
    ("checkpoint removed", EARLIER, (("model.checkpoint", ABSENT),), "spec.model.checkpoint"),
    ("revision added", (), (("model.revision", "main"),), "spec.model.revision"),
    ("revision removed", (("model.revision", "main"),), (("model.revision", ABSENT),), "spec.model.revision"),
    ("credentials", (), (("model.credentialsRef", {"name": "x"}),), None),
    ("dataset", (), (("dataset.packing", False),), "spec.dataset.packing"),
    ("validation added", (), (("dataset.validation", {"fraction": 0.1}),), "spec.dataset.validation"),
    ("rank", (), (("method.lora.rank", 8),), "spec.method.lora"),
    ("method", (), (("method", {"type": "full"}),), "spec.method.type"),
    ("learning rate", (), (("training.learningRate", 1e-3),), "spec.training.learningRate"),
    ("epochs to maxSteps", (("training.epochs", 1),), (("training", {"maxSteps": 5}),), "spec.training.maxSteps"),
    ("micro batch", (), (("training.microBatchSize", 2),), None),
    ("nodes", (), (("distribution.nodes", 2),), None),
    ("memory", (), (("resources.memory", "32Gi"),), None),
    ("gpu", (), (("resources.gpu", {}),), "spec.resources.gpu"),
    ("checkpoint", (), (("checkpoint.every", 5),), None),
    ("output", (), (("output.uri", "s3://models/other"),), "spec.output.uri"),
    ("deletion policy", (), (("output.deletionPolicy", "Delete"),), None),
    ("deletion policy back", (("output.deletionPolicy", "Delete"),), (("output.deletionPolicy", "Retain"),), None),
    ("evaluation", (), (("evaluation.maxNewTokens", 8),), "spec.evaluation.maxNewTokens"),
    ("restarts", (), (("runPolicy.maxRestarts.application", 5),), None),
    ("stall", (), (("runPolicy.stallSeconds", 5),), None),
    ("preflight", (), (("runPolicy.preflight", "never"),), None),
    ("pod labels", (), (("pod.labels", {"a": "b"}),), None),
    ("tolerations", (), (("pod.tolerations", [{"operator": "Exists"}]),), None),
    ("a volume under the name of another", (("pod.volumes", [A_CLAIM]),),
     (("pod.volumes", [{"name": "work", "claim": {"name": "other"}}]),), "spec.pod.volumes"),
    ("a further volume", (), (("pod.volumes", [A_CLAIM]),), "spec.pod.volumes"),
    ("variables", (), (("pod.env", [{"name": "NCCL_DEBUG", "value": "INFO"}]),), None),
    ("grace period", (), (("pod.terminationGracePeriodSeconds", 60),), None),
    ("additional resources", (), (("resources.extra", {"rdma/hca": 1}),), None),
    ("another GPU", (("resources.gpu", {}),), (("resources.gpu", {"name": "nvidia.com/mig-1g.10gb"}),), None),
    ("retry", (), (("runPolicy.retry", 1),), None),
    ("retry lowered", (("runPolicy.retry", 2),), (("runPolicy.retry", 1),), "spec.runPolicy.retry"),
    ("two together", (), (("runPolicy.suspend", True), ("training.seed", 1)), "spec.training.seed"),
)  # fmt: skip

# Changes that have no effect on what is computed: accepted while no pods run, refused while they
# do.
WHILE_STOPPED: tuple[tuple[str, Any], ...] = (
    ("model.credentialsRef", {"name": "x"}),
    ("dataset.credentialsRef", {"name": "x"}),
    ("output.credentialsRef", {"name": "x"}),
    ("training.microBatchSize", 2),
    ("distribution.nodes", 2),
    ("distribution.strategy", "zero2"),
    ("resources.memory", "32Gi"),
    ("resources.scratch", "90Gi"),
    ("resources.extra", {"rdma/hca": 1}),
    ("checkpoint.every", 5),
    ("tracking.tensorboard", True),
    ("runPolicy.stallSeconds", 5),
    ("runPolicy.preflightSeconds", 60),
    ("pod.image", "example.test/trainer:2"),
    ("pod.nodeSelector", {"pool": "b"}),
    ("pod.tolerations", [{"operator": "Exists"}]),
    ("pod.priorityClassName", "high"),
    ("pod.env", [{"name": "NCCL_DEBUG", "value": "INFO"}]),
)

# Values that mean the same, so that GitOps tools may write either.
EQUAL: tuple[tuple[str, Any, Any], ...] = (
    ("resources.cpu", "300m", "0.3"),
    ("resources.cpu", "2", 2),
    ("resources.memory", "1536000Ki", "1500Mi"),
    ("resources.scratch", "1Gi", "1024Mi"),
    ("resources.sharedMemory", "1Gi", "1024Mi"),
    ("resources.extra", {"hugepages-2Mi": "1Gi"}, {"hugepages-2Mi": "1024Mi"}),
)
