"""Job services of orchestrators against the real servers; see `make test-services`."""
