"""Sparse attention over the tokens of a video: lossy kinds, each with a dense-mask reference."""
