"""Decides what an object store's error means, from the text of obstore's exception.

obstore has one type for most errors and quotes the response, so the store's own code is read there.
The module does no I/O.
"""

from __future__ import annotations

import re
from typing import Literal

Cause = Literal["refused", "full", "no container", "no identity", "unavailable"]

# Amazon's and its compatible servers', Google's, and Azure's. Status 401 and 403 need no code; some
# stores respond to an unknown key with a 404, and Azure to a locked blob with a 409 or a 412.
_REFUSALS = frozenset((
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
    "XAdminUserNotFound",
    "AuthenticationRequired", "InvalidSecurity",
    "AuthenticationFailed", "AuthorizationFailure", "NoAuthenticationInformation", "InvalidAuthenticationInfo",
    "PublicAccessNotPermitted", "BlobImmutableDueToPolicy", "LeaseIdMissing",
))  # fmt: skip
_FULL = frozenset((
    "QuotaExceeded", "QuotaExceededException", "InsufficientStorage", "InsufficientCapacity", "StorageFull",
    "XMinioStorageFull", "XMinioStorageQuotaExceeded", "XMinioAdminBucketQuotaExceeded",
))  # fmt: skip
# A name that no bucket can have is that of none.
_NO_CONTAINER = frozenset((
    "NoSuchBucket", "InvalidBucketName",
    "ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled", "InvalidResourceName", "OutOfRangeInput",
))  # fmt: skip
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9]+)\s*</Code>")
_MESSAGE = re.compile(r"<Message>\s*([^<]+)")
_STATUS = re.compile(r"status code: (\d{3})")
_OAUTH = re.compile(r'"error(?:_description)?"\s*:\s*"([^"\\]+)')
_METADATA_SERVER = re.compile(r"//169\.254\.|//[^/\s]+/(computeMetadata/v1|metadata/identity)/")


def cause(error: Exception) -> Cause:
    """Returns what an error means. Whatever isn't known may pass: the request is tried again."""
    text = str(error)
    status = _STATUS.search(text)
    number = int(status[1]) if status else 0
    if _METADATA_SERVER.search(text):  # no keys were given, so the pod's identity was asked for
        is_denied = number == 403 and "/computeMetadata/" in text  # a service account that may not be used
        return "unavailable" if number >= 500 else "refused" if is_denied else "no identity"
    code = _CODE.search(text)
    if code and code[1] in _NO_CONTAINER:
        return "no container"
    if number == 507 or (code and code[1] in _FULL):
        return "full"
    if number in (401, 403) or (code and code[1] in _REFUSALS) or (number == 400 and _OAUTH.search(text)):
        return "refused"
    return "unavailable"


def explanation(error: Exception) -> str:
    """Returns what the store says: its code and message, else the first line of the error."""
    text = str(error).strip()
    code, message = _CODE.search(text), _MESSAGE.search(text)
    if code:
        detail = f": {message[1].strip().splitlines()[0]}" if message and message[1].strip() else ""
        return f"{code[1]}{detail}"[:300]
    lines = text.splitlines()
    tokens = _OAUTH.findall(text)
    if tokens:
        return " ".join(": ".join(tokens[:2]).split())[:300]
    return lines[0][:300].rstrip(": ") if lines else type(error).__name__
