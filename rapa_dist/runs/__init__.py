"""Runs seen from outside, by their files alone: listed, and compared. Neither torch nor Ray is loaded for that."""
