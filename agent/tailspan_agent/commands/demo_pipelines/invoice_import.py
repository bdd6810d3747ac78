"""A pipeline that fails with a traceback, because its input has a broken record."""

from __future__ import annotations

import json
import logging
import time
from decimal import Decimal

_log = logging.getLogger("invoice_import")

_RECORDS = [
    '{"invoice": "2026-0001", "amount": "120.50"}',
    '{"invoice": "2026-0002", "amount": "75.00"}',
    '{"invoice": "2026-0003", "amount": "99.90"}',
    '{"invoice": "2026-0004"}',
]


class InvoiceError(Exception):
    """An invoice cannot be imported."""


def _amount(record: dict[str, str]) -> Decimal:
    try:
        return Decimal(record["amount"])
    except KeyError as missing:
        raise InvoiceError(f"invoice {record['invoice']} has no {missing.args[0]}") from missing


def main() -> None:
    """Import invoices until one is invalid."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    total = Decimal(0)
    for line in _RECORDS:
        record = json.loads(line)
        total += _amount(record)
        _log.info("imported invoice %s, total is now %s", record["invoice"], total)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
