"""One job as telemetry: its ledger, times, spans, records and alerts.

Pure functions from a status and a ledger to OTLP values belong here. Nothing here may read, send or store.
"""
