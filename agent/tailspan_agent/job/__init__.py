"""One job as telemetry: its ledger, times, spans, records and alerts.

Pure functions from a status and a ledger to OTLP values belong here; nothing here may read, send or store.
"""
