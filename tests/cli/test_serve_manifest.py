"""Manifests that serve a result are checked against the servers' own schemas, and refused if a
server can't load the result."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes.client as k8s
import pytest
import yaml

from finetune_cli import serving
from finetune_cli.main import main
from finetune_cli.serving_kubernetes import IMAGES, IMAGES_CHECKED
from localcluster.environments import environment

ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none", "use_dora": False,
    "modules_to_save": None, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


def result(
    folder: Path, *, kind: str = "adapter", merged: bool = False, base: str = "hf://org/base", **config: Any
) -> str:
    """A finished result, as far as its manifest describes it."""
    files = ["adapter_model.safetensors", "adapter_config.json"] if kind == "adapter" else ["model.safetensors"]
    files += ["merged/model.safetensors"] if merged else []
    manifest = {
        "kind": kind,
        "job": {"namespace": "ns", "name": "support-replies", "uid": "u", "attempt": 1},
        "files": [{"path": path, "size": 1, "sha256": "0"} for path in files],
        "provenance": {"model": {"uri": base, "revision": "abc", "digest": "sha256:0"}},
    }
    (folder / "finetune").mkdir(parents=True, exist_ok=True)
    (folder / "finetune" / "manifest.json").write_text(json.dumps(manifest))
    if kind == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **config}))
    return str(folder)


def served(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main(["serve-manifest", *arguments]) == code
    output = capsys.readouterr()
    return output.out, output.err


def objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("target", ["vllm", "tgi"])
@pytest.mark.parametrize("uri", ["s3://models/support/v1", "pvc://models/support/v1"])
def test_a_deployment_and_its_service_are_kubernetes_objects(
    target: str, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = served(capsys, result(tmp_path), "--for", target, "--uri", uri, "--secret", "keys")
    deployment, service = objects(out)
    k8s.V1Deployment.model_validate(deployment)
    k8s.V1Service.model_validate(service)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    at = "/mnt/models/support/v1" if uri.startswith("pvc") else "/fetched/adapter"
    if target == "vllm":
        assert container["command"] == ["vllm", "serve"]
        assert container["args"] == [
            "org/base", "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"support-replies={at}",
        ]  # fmt: skip
    else:
        assert {"name": "LORA_ADAPTERS", "value": f"support-replies={at}"} in container["env"]
        assert container["args"][:2] == ["--model-id", "org/base"]
    assert ("initContainers" in pod) == uri.startswith("s3")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert "request the model support-replies" in err


def test_the_output_names_the_date_of_an_images_tag_unless_the_user_chose_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in ("vllm", "tgi"):
        arguments = (result(tmp_path), "--for", target, "--uri", "s3://models/v1")
        out, _ = served(capsys, *arguments)
        assert objects(out)[0]["spec"]["template"]["spec"]["containers"][0]["image"] == IMAGES[target]
        assert f"# The tag of {IMAGES[target]} was checked on {IMAGES_CHECKED}; --image replaces it.\n" in out
        out, _ = served(capsys, *arguments, "--image", "registry/server:1")
        assert objects(out)[0]["spec"]["template"]["spec"]["containers"][0]["image"] == "registry/server:1"
        assert "was checked on" not in out
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", IMAGES_CHECKED)
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in IMAGES.values())


def test_vllm_comes_first_and_the_output_for_tgi_says_that_it_is_in_maintenance_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.TARGETS[0] == "vllm"
    out, _ = served(capsys, result(tmp_path), "--for", "tgi", "--uri", "s3://models/v1")
    assert out.startswith("# TGI has been in maintenance mode since December 2025")
    assert "use --for vllm if it can load the result.\n" in out
    out, _ = served(capsys, result(tmp_path), "--for", "vllm", "--uri", "s3://models/v1")
    assert "maintenance" not in out
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert "maintenance mode" in text
    assert text.index("--for vllm") < text.index("--for tgi")


def _kserve_schema() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Return (types, JSON names) by attribute, by class, from the source of KServe's own client."""
    folder = environment("kserve-0.21.0", without_dependencies=("kserve==0.21.0",))
    schema = {}
    for path in folder.glob("lib/python*/site-packages/kserve/models/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                named = {
                    target.id: ast.literal_eval(part.value)
                    for part in node.body
                    if isinstance(part, ast.Assign) and isinstance(part.value, ast.Dict)
                    for target in part.targets
                    if isinstance(target, ast.Name)
                }
                if "openapi_types" in named:
                    schema[node.name] = (named["openapi_types"], named["attribute_map"])
    return schema


def _check(value: Any, kind: str, schema: dict[str, Any], at: str) -> int:
    """Raise an error unless each key belongs to the class; return how many keys were checked."""
    if kind.startswith("list[") and isinstance(value, list):
        return sum(_check(item, kind[5:-1], schema, at) for item in value)
    if kind in schema:
        types, names = schema[kind]
        by_key = {key: types[attribute] for attribute, key in names.items()}
        assert set(value) <= set(by_key), f"{at}: {kind} has no {sorted(set(value) - set(by_key))}"
        return 1 + sum(_check(item, by_key[key], schema, f"{at}.{key}") for key, item in value.items())
    if kind.startswith("V1") and hasattr(k8s, kind):
        getattr(k8s, kind).model_validate(value)
        return 1
    assert isinstance(value, {"str": str, "int": int, "bool": bool}.get(kind, object)), f"{at} is no {kind}"
    return 1


@pytest.mark.parametrize("merged", [False, True])
def test_an_inference_service_has_kserves_own_fields(
    merged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = result(tmp_path, merged=merged, use_dora=merged)
    out, err = served(capsys, folder, "--for", "kserve", "--uri", "s3://models/support/v1", "--secret", "keys")
    (service,) = objects(out)
    schema = _kserve_schema()
    assert _check(service, "V1beta1InferenceService", schema, "") > 8
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://models/support/v1" + ("/merged" if merged else "")
    assert ("--enable-lora" in model["args"]) != merged
    assert (
        "the merged model is served, because kserve can't load the adapter: it doesn't support DoRA" in err
    ) == merged
    misspelt = json.loads(json.dumps(service).replace("storageUri", "storageURI"))
    with pytest.raises(AssertionError, match="V1beta1ModelSpec has no"):
        _check(misspelt, "V1beta1InferenceService", schema, "")


_BOTO = """
import json, sys
import botocore.session, botocore.validate
model = botocore.session.get_session().get_service_model("sagemaker")
for method, body in json.load(sys.stdin).items():
    name = "".join(part.title() for part in method.split("_"))
    report = botocore.validate.ParamValidator().validate(body, model.operation_model(name).input_shape)
    print(name, report.generate_report() or "ok")
"""


def test_sagemakers_calls_are_accepted_by_botocore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = result(tmp_path, merged=True)
    out, _ = served(capsys, folder, "--for", "sagemaker", "--uri", "s3://models/support/v1")
    calls = json.loads(out)
    source = calls["create_model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"] == "s3://models/support/v1/merged/"
    python = environment("botocore", "botocore") / "bin" / "python"
    checked = subprocess.run([python, "-c", _BOTO], input=out, capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == ["CreateModel ok", "CreateEndpointConfig ok", "CreateEndpoint ok"]


def test_vertex_gets_the_documented_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = served(capsys, result(tmp_path, kind="model"), "--for", "vertex", "--uri", "gs://models/support")
    model = json.loads(out)["model"]
    assert model["artifactUri"] == "gs://models/support"
    assert set(model) == {"displayName", "artifactUri", "containerSpec"}
    assert set(model["containerSpec"]) == {"imageUri", "command", "args", "ports", "predictRoute", "healthRoute"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "it doesn't support DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"it doesn't load full layers in an adapter \(lm_head\)"),
        ({"bias": "lora_only"}, "it doesn't load biases in an adapter"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it doesn't load adapters on embed_tokens"),
        ({"r": 600}, "rank 600 is above vLLM's maximum of 512"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "doesn't support encoder-decoder models"),
        ({"peft_type": "IA3"}, "LoRA adapters only, not IA3"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
    ],
)
def test_what_vllm_cant_load_is_reported_with_a_remedy(
    config: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = result(tmp_path, **config)
    _, err = served(capsys, folder, "--for", "vllm", "--uri", "s3://models/v1", code=1)
    assert re.search(why, err), err
    assert ("output.merge: true" in err) or ("serve it with TGI" in err)


@pytest.mark.parametrize(("rank", "option"), [(4, "8"), (16, "16"), (17, "32"), (100, "128"), (512, "512")])
def test_the_lora_rank_that_vllm_has_to_be_configured_with(
    rank: int, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = served(capsys, result(tmp_path, r=rank), "--for", "vllm", "--uri", "s3://models/v1")
    arguments = objects(out)[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--max-lora-rank") + 1] == option
    assert (f"needs --max-lora-rank {option}" in err) == (rank > 16)


def test_a_path_of_this_machine_is_refused_if_the_server_cant_reach_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = served(capsys, result(tmp_path), "--for", "vllm", code=1)
    assert "give a URI that it can reach with --uri (hf, pvc, s3://…)" in err
    _, err = served(capsys, result(tmp_path, base="/models/x"), "--for", "tgi", "--uri", "s3://m/v1", code=1)
    assert "can't reach /models/x" in err
    assert "--base" in err


def test_what_isnt_a_finished_result_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = served(capsys, str(tmp_path), "--for", "vllm", code=2)
    assert "there is no finetune/manifest.json; has the job succeeded?" in err
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "manifest.json").write_text('{"kind": "checkpoint"}')
    _, err = served(capsys, str(tmp_path), "--for", "vllm", code=2)
    assert "its manifest describes a checkpoint, not a result" in err


def test_every_server_has_its_part_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for target in serving.TARGETS:
        assert f"--for {target}" in text


@pytest.mark.parametrize(
    "base", ["hf://--trust-remote-code", "hf://org/base --x", "hf://org/../base", "hf://a\x1b[31m"]
)
def test_a_manifest_names_no_options_of_the_server(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = result(tmp_path, base=base)
    out, err = served(capsys, folder, "--uri", "s3://models/v1", "--for", "vllm", code=2)
    assert out == ""
    assert "isn't the name of a repository" in err
    assert "\x1b" not in err


def test_a_result_writes_no_escape_codes_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = result(tmp_path, peft_type="\x1b[31mLORA")
    _, err = served(capsys, folder, "--uri", "s3://models/v1", "--for", "vllm", code=1)
    assert "it loads LoRA adapters only" in err
    assert "\x1b" not in err
