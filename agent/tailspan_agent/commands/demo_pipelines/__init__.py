"""The sample pipelines of ``tailspan demo``: small real programs that know nothing of Tailspan."""
