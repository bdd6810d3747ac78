"""Real stores: jobs go in, and everything is asked back by the store's own query API."""
