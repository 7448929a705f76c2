"""Calls that serve a whole model at a cloud: SageMaker's three, Vertex AI's upload. Pure.

What only the user knows is written in CAPITALS.
"""

from __future__ import annotations

from typing import Any

from finetune_cli.serving import Served, parts

_LMI = "763104351884.dkr.ecr.REGION.amazonaws.com/djl-inference:0.34.0-lmi16.0.0-cu128"
_VERTEX = "us-docker.pkg.dev/vertex-ai/vertex-vision-model-garden-dockers/pytorch-vllm-serve:latest"


def sagemaker(result: Served, *, image: str, gpus: int) -> dict[str, dict[str, Any]]:
    """By boto3's method: create_model, create_endpoint_config, create_endpoint."""
    model, _ = parts(result, "sagemaker")
    name = result.label
    source = {"S3Uri": f"{model.rstrip('/')}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    return {
        "create_model": {
            "ModelName": name,
            "ExecutionRoleArn": "arn:aws:iam::ACCOUNT:role/ROLE",
            "PrimaryContainer": {
                "Image": image or _LMI,
                "ModelDataSource": {"S3DataSource": source},
                "Environment": {
                    "HF_MODEL_ID": "/opt/ml/model",
                    "OPTION_ROLLING_BATCH": "disable",
                    "OPTION_ASYNC_MODE": "true",
                    "OPTION_ENTRYPOINT": "djl_python.lmi_vllm.vllm_async_service",
                    "OPTION_TENSOR_PARALLEL_DEGREE": str(gpus),
                },
            },
        },
        "create_endpoint_config": {
            "EndpointConfigName": name,
            "ProductionVariants": [
                {
                    "VariantName": "all",
                    "ModelName": name,
                    "InstanceType": "ml.g5.2xlarge",
                    "InitialInstanceCount": 1,
                    "ContainerStartupHealthCheckTimeoutInSeconds": 900,
                    "ModelDataDownloadTimeoutInSeconds": 900,
                }
            ],
        },
        "create_endpoint": {"EndpointName": name, "EndpointConfigName": name},
    }


def vertex(result: Served, *, image: str, gpus: int) -> dict[str, Any]:
    """The body of projects.locations.models.upload; its artifactUri must be a bucket of Google's."""
    model, _ = parts(result, "vertex")
    place = model if model.startswith("gs://") else f"gs://BUCKET/{result.label}"
    return {
        "model": {
            "displayName": result.label,
            "artifactUri": place,
            "containerSpec": {
                "imageUri": image or _VERTEX,
                "command": ["python", "-m", "vllm.entrypoints.api_server"],
                "args": ["--host=0.0.0.0", "--port=8080", f"--model={place}", f"--tensor-parallel-size={gpus}"],
                "ports": [{"containerPort": 8080}],
                "predictRoute": "/generate",
                "healthRoute": "/ping",
            },
        },
    }
