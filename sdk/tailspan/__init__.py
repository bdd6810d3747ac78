"""Tailspan: see every batch job."""
