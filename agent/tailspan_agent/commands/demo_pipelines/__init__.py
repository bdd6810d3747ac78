"""The sample pipelines of ``tailspan demo``: small real programs.

Programs that run as jobs of the demo belong here; nothing here may import Tailspan.
"""
