"""Audit of a dataset: what is in it, what leaks between its splits, what it gives away."""

from data_prep.audit.card import make_card, write_card

__all__ = ["make_card", "write_card"]
