"""The Tailspan agent: follows jobs and relays their logs, status and execution time as OTLP."""
