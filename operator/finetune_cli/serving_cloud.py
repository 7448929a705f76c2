"""Builds the API calls that serve a full model on SageMaker or Vertex AI.

The module is pure. Values that only the user knows are in CAPITALS.
"""

from __future__ import annotations

from typing import Any

from finetune_cli.serving import Served, parts

_SAGEMAKER_IMAGE = "763104351884.dkr.ecr.REGION.amazonaws.com/djl-inference:0.34.0-lmi16.0.0-cu128"
_VERTEX_IMAGE = "us-docker.pkg.dev/vertex-ai/vertex-vision-model-garden-dockers/pytorch-vllm-serve:latest"


def sagemaker(result: Served, *, image: str, gpus: int) -> dict[str, dict[str, Any]]:
    """Returns the keyword arguments of the three boto3 methods to call, by method and in order."""
    model, _ = parts(result, "sagemaker")
    name = result.label
    source = {"S3Uri": f"{model.rstrip('/')}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    return {
        "create_model": {
            "ModelName": name,
            "ExecutionRoleArn": "arn:aws:iam::ACCOUNT:role/ROLE",
            "PrimaryContainer": {
                "Image": image or _SAGEMAKER_IMAGE,
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
    """Returns the body of projects.locations.models.upload. Its artifactUri must be a gs:// URI."""
    model, _ = parts(result, "vertex")
    uri = model if model.startswith("gs://") else f"gs://BUCKET/{result.label}"
    return {
        "model": {
            "displayName": result.label,
            "artifactUri": uri,
            "containerSpec": {
                "imageUri": image or _VERTEX_IMAGE,
                "command": ["python", "-m", "vllm.entrypoints.api_server"],
                "args": ["--host=0.0.0.0", "--port=8080", f"--model={uri}", f"--tensor-parallel-size={gpus}"],
                "ports": [{"containerPort": 8080}],
                "predictRoute": "/generate",
                "healthRoute": "/ping",
            },
        },
    }
