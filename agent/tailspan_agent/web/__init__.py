"""The agent's HTTP server: page, live updates, health, metrics and delivery.

What a browser or a scraper sees belongs here; nothing here may change what the agent relays, except cancel.
"""
