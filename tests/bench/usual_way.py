"""The baseline: the usual way to send a Python program's log lines as OTLP, with the OpenTelemetry SDK.

    python -m tests.bench.usual_way URL COMPRESSION FILE...

A logging handler, a batch processor of 512 and a queue that is large enough to lose nothing, OTLP over HTTP. It reads
the lines of jobs' logs and logs each.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

BATCH = 512
QUEUE = 1 << 21


def main() -> None:
    """Send the lines of the files."""
    warnings.simplefilter("ignore", DeprecationWarning)
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.resources import Resource

    url, compression, *files = sys.argv[1:]
    exporter = OTLPLogExporter(
        f"{url}/v1/logs", compression=Compression.Gzip if compression == "gzip" else Compression.NoCompression
    )
    provider = LoggerProvider(resource=Resource.create({"service.name": "usual"}))
    provider.add_log_record_processor(
        BatchLogRecordProcessor(exporter, max_export_batch_size=BATCH, max_queue_size=QUEUE)
    )
    logger = logging.getLogger("usual")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(LoggingHandler(logger_provider=provider))
    for file in files:
        with Path(file).open(encoding="utf-8") as lines:
            for line in lines:
                logger.info(line.rstrip("\n"))
    provider.shutdown()


if __name__ == "__main__":
    main()
