"""Object storage: how tensorstore is told of a bucket, and what a user is told when it does not answer as hoped."""

from __future__ import annotations

import os
import re
from typing import Any

from jeagle.errors import UserError

DRIVERS = {"gs://": "gcs", "s3://": "s3"}
# Before the first answer a wrong address is likelier than a pause; afterwards a run outlives three minutes of silence.
FIRST = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}
LATER = {"max_retries": 10, "initial_delay": "1s", "max_delay": "32s"}
_SIGNS = ("http_response_code", "retry attempts failed", "CURL error", "credentials", "Endpoint ", "bucket name")
_REFUSED = ("'401'", "'403'", "PERMISSION_DENIED", "UNAUTHENTICATED")


class Unreachable(UserError):
    """Object storage gave no answer, or refused to give one: nothing is known of what lies there."""


def spec_of(url: str) -> dict[str, Any]:
    """tensorstore's kvstore of gs://BUCKET/PATH or s3://BUCKET/PATH.

    For s3:// AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, and the credentials are read where other clients find
    them.
    """
    scheme = url[: url.index("://") + 3]
    bucket, _, path = url[len(scheme) :].partition("/")
    if not bucket or not path:
        raise UserError(f"The store {url} needs a bucket and a path: {scheme}BUCKET/PATH.")
    spec: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket, "path": f"{path}/"}
    if scheme == "s3://":
        # Other endpoints than Amazon's know conditional writes by now; without, two writers could both be the first.
        spec["use_conditional_write"] = True
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # else tensorstore looks through files, containers and machines
            spec["aws_credentials"] = {"type": "environment"}
    return retrying(spec, LATER)


def retrying(spec: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """The spec with this much patience."""
    return spec | {f"{spec['driver']}_request_retries": how}


def unreachable(url: str, error: Exception) -> Unreachable | None:
    """What a user is told of an error that object storage, or the way to it, gave; None for any other error."""
    text = str(error)
    if not any(sign in text for sign in _SIGNS):
        return None
    code = next(iter(re.findall(r"<Code>(\w+)</Code>|: (\w+): ", text)), ("", ""))
    code = code[0] or code[1]
    if "NoSuchBucket" in text:
        return Unreachable(f"{url} cannot be used: there is no such bucket. Make it, or name another.")
    if "bucket name" in text:
        return Unreachable(f"{url} cannot be used: {url.split('/')[2]} is no name of a bucket.")
    if "credentials" in text:
        return Unreachable(
            f"{url} cannot be used: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "whatever else your storage takes."
        )
    if any(sign in text for sign in _REFUSED):
        return Unreachable(
            f"{url} cannot be used: access is refused ({code or 'no reason given'}). Check the credentials, and what "
            "they may do in this bucket."
        )
    reason = re.sub(r" \[.*", "", text.split("failed: ")[-1]).splitlines()[0][:200]
    return Unreachable(f"{url} cannot be reached ({reason}). Check the network, and AWS_ENDPOINT_URL where it is set.")
