"""The sample pipelines of ``tailspan demo``: small real programs that do not use Tailspan."""
