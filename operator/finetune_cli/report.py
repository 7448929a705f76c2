"""`finetune report RESULT`: makes report.html again, out of what lies in a result's folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from finetune_api.run import Location, S3Config

USAGE_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="folder of a finished job, or its URI (s3://bucket/prefix)")
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="default report.html; - is standard output"
    )
    parser.add_argument("--s3-endpoint", metavar="URL", help="of an S3 server; default AWS_ENDPOINT_URL, else AWS")


def run(options: argparse.Namespace) -> int:
    from finetune_trainer import report, store
    from finetune_trainer.failure import Failed

    given, endpoint = options.result, options.s3_endpoint or os.environ.get("AWS_ENDPOINT_URL")
    uri = given if "://" in given else f"file://{Path(given).expanduser().resolve()}"
    s3 = S3Config(
        endpoint=endpoint,
        region=os.environ.get("AWS_REGION", "us-east-1"),
        allow_http=bool(endpoint and endpoint.startswith("http://")),
    )
    try:
        place = store.open_folder(Location(uri=uri, display=given), "output", store.Access(s3, os.environ, 1, 10.0))
        page = report.page(report.read_result(place.read, given))
    except Failed as failed:
        print(f"finetune report: {failed.message}", file=sys.stderr)
        return USAGE_ERROR
    if options.out == "-":
        sys.stdout.write(page)
        return 0
    try:
        Path(options.out).write_text(page, encoding="utf-8")
    except OSError as error:
        print(f"finetune report: --out {options.out}: {error.strerror}", file=sys.stderr)
        return USAGE_ERROR
    print(f"wrote {options.out}")
    return 0
