"""What an object store's error means, by the text that obstore has for it."""

from __future__ import annotations

import pytest

from finetune_trainer.storage import refusals

_STATUS = "Error performing PUT https://host/bucket/key in 8ms - Server returned non-2xx status code:"
_TOKEN = "Error performing POST https://login/t/oauth2/v2.0/token in 8ms - Server returned non-2xx status code:"
_GKE = "Error performing GET http://metadata.google.internal/computeMetadata/v1/instance/token in 8ms -"
_AZURE = (
    '<?xml version="1.0" encoding="utf-8"?>\n<Error>\n  <Code>{}</Code>\n  <Message>Why.\nRequestId:1</Message></Error>'
)
_GOOGLE = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>Why.</Message></Error>"

# case → (the text, what it means, what is shown)
ERRORS: dict[str, tuple[str, refusals.Cause, str]] = {
    "a wrong key, with a code": (f"{_STATUS} 403 Forbidden: {_GOOGLE.format('AccessDenied')}", "refused",
                                 "AccessDenied: Why."),
    "a wrong key, without a body": (f"{_STATUS} 401 Unauthorized: \n\nDebug source:", "refused",
                                    f"{_STATUS} 401 Unauthorized"),
    "an unknown key as 404": (f"{_STATUS} 404 Not Found: {_GOOGLE.format('InvalidAccessKeyId')}", "refused",
                              "InvalidAccessKeyId: Why."),
    "a blob that a policy keeps": (f"{_STATUS} 409 Conflict: {_AZURE.format('BlobImmutableDueToPolicy')}", "refused",
                                   "BlobImmutableDueToPolicy: Why."),
    "a locked blob": (f"{_STATUS} 412 Precondition Failed: {_AZURE.format('LeaseIdMissing')}", "refused",
                      "LeaseIdMissing: Why."),
    "an application's wrong secret": (
        f'{_TOKEN} 401 Unauthorized: {{"error":"invalid_client","error_description":"AADSTS7000215: Invalid."}}',
        "refused", "invalid_client: AADSTS7000215: Invalid."),
    "a federated token that isn't known": (
        f'{_TOKEN} 400 Bad Request: {{"error": "invalid_grant", "error_description": "AADSTS70021: No match."}}',
        "refused", "invalid_grant: AADSTS70021: No match."),
    "no such bucket": (f"{_STATUS} 404 Not Found: {_GOOGLE.format('NoSuchBucket')}", "no container",
                       "NoSuchBucket: Why."),
    "no such container": (f"{_STATUS} 404 Not Found: {_AZURE.format('ContainerNotFound')}", "no container",
                          "ContainerNotFound: Why."),
    "a container that is being deleted": (f"{_STATUS} 409 Conflict: {_AZURE.format('ContainerBeingDeleted')}",
                                          "no container", "ContainerBeingDeleted: Why."),
    "a name that no container has": (f"{_STATUS} 400 Bad Request: {_AZURE.format('InvalidResourceName')}",
                                     "no container", "InvalidResourceName: Why."),
    "a quota": (f"{_STATUS} 403 Forbidden: {_GOOGLE.format('QuotaExceeded')}", "full", "QuotaExceeded: Why."),
    "no room": (f"{_STATUS} 507 Insufficient Storage: ", "full", f"{_STATUS} 507 Insufficient Storage"),
    "no service account": (f"{_GKE} Server returned non-2xx status code: 404 Not Found: ", "no identity",
                           f"{_GKE} Server returned non-2xx status code: 404 Not Found"),
    "a service account that may not be used": (
        f"{_GKE} Server returned non-2xx status code: 403 Forbidden: denied", "refused",
        f"{_GKE} Server returned non-2xx status code: 403 Forbidden: denied"),
    "a metadata server that starts": (f"{_GKE} Server returned non-2xx status code: 503 Unavailable: ", "unavailable",
                                      f"{_GKE} Server returned non-2xx status code: 503 Unavailable"),
    "no metadata server": ("Error performing GET http://169.254.169.254/metadata/identity/oauth2/token - error",
                           "no identity",
                           "Error performing GET http://169.254.169.254/metadata/identity/oauth2/token - error"),
    "an object with a telling name": (
        "Error performing GET https://host/bucket/computeMetadata/v1/x in 8ms - timed out", "unavailable",
        "Error performing GET https://host/bucket/computeMetadata/v1/x in 8ms - timed out"),
    "a busy store": (f"{_STATUS} 503 Service Unavailable: {_AZURE.format('ServerBusy')}", "unavailable",
                     "ServerBusy: Why."),
    "a dead server": ("Error performing GET https://host/a in 8ms - HTTP error: error sending request", "unavailable",
                      "Error performing GET https://host/a in 8ms - HTTP error: error sending request"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "cause", "shown"), ERRORS.values(), ids=ERRORS)
def test_the_cause_of_an_error_is_read_from_its_text(text: str, cause: refusals.Cause, shown: str) -> None:
    assert (refusals.cause(Exception(text)), refusals.explanation(Exception(text))) == (cause, shown)
