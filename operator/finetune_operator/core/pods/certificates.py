"""Decides how pods trust an additional certificate authority: one file, and the variables that name
it to the clients of S3, the Hub and trackers. It does no I/O."""

from __future__ import annotations

from finetune_api.names import CA_BUNDLE_PATH

# rustls (obstore) and httpx (the Hub) read the first one, requests (MLflow, Weights & Biases) the
# second, and the rest belongs to libraries and tools of images that are derived from ours.
_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


def variables(path: str = CA_BUNDLE_PATH) -> tuple[tuple[str, str], ...]:
    """Returns the environment variables that make clients trust the certificates of a file."""
    return tuple((name, path) for name in _VARIABLES)
