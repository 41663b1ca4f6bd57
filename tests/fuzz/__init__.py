"""Damaged and hostile files of every kind, made from a seed, and what the tool says to them."""
