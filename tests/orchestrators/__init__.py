"""Job services of orchestrators against the real servers; run with `make test-services SERVICES=orchestrators`."""
