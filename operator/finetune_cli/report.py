"""`finetune report RESULT`: writes report.html again from the files in a result's folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from finetune_api.messages.run import Location
from finetune_cli.local import azure_config, gcs_config, s3_config

USAGE_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune report`."""
    parser.add_argument(
        "result", metavar="RESULT", help="folder of a finished result, or its URI (s3://…, gs://…, az://…)"
    )
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="file to write; default report.html; - is standard output"
    )
    parser.add_argument(
        "--s3-endpoint", metavar="URL", help="endpoint of an S3 server; default AWS_ENDPOINT_URL, else AWS"
    )


def run(options: argparse.Namespace) -> int:
    """Writes the page. Returns 0, or 2 if there is no result or the file can't be written."""
    from finetune_trainer.errors import RunError
    from finetune_trainer.reporting.html import page as html
    from finetune_trainer.storage import schemes

    result = options.result
    uri = result if "://" in result else f"file://{Path(result).expanduser().resolve()}"
    try:
        s3 = s3_config(os.environ, options.s3_endpoint)
        clouds = (gcs_config(os.environ), azure_config(os.environ))
        access = schemes.Access(s3, os.environ, *clouds, retries=1, retry_seconds=10.0)
        storage = schemes.open_folder(Location(uri=uri, display=result), "output", access)
        page = html.page(html.read_result(storage.read, result))
    except RunError as error:
        print(f"finetune report: {error.message}", file=sys.stderr)
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
