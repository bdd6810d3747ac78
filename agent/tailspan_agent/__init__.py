"""The Tailspan agent: follows jobs and relays their logs, status and execution time as OTLP.

What only the agent needs belongs in its packages, a tower of floors; nothing here may be imported by the SDK's verbs.
"""
