"""Sequence parallel: the tokens of a row shared out among processes, which meet in attention.

By heads (Ulysses, arXiv 2309.14509), by passing keys and values around (ring, arXiv 2310.01889), or both (USP, arXiv
2405.07719). What the scheme needs of the layers above is in `core.context`.
"""

from kinetoscope.parallel.sequence.share import SequenceShard

__all__ = ["SequenceShard"]
