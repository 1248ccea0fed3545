"""What attention layers of a model are for, as far as a choice of backend depends on it."""

from __future__ import annotations


class Role(str):
    """The name of a role with what its calls may carry.

    A plain `str` is a role that may carry a key bias and whose tokens have no grid.

    Attributes:
        key_bias: calls may add a bias to the logits of keys: masks of text of several lengths, or folded padding. A
            backend that cannot add one is refused for the role.
        grid: the leading queries and keys are the tokens of a video of which every one is there, in the order of time,
            height, width; sparse kinds serve such roles only.
    """

    key_bias: bool
    grid: bool

    def __new__(cls, name: str, *, key_bias: bool = False, grid: bool = False) -> Role:
        """A role called `name`."""
        role = super().__new__(cls, name)
        role.key_bias = key_bias
        role.grid = grid
        return role

    @classmethod
    def of(cls, name: str) -> Role:
        """`name` itself where it says what it carries, else a role that may carry a key bias and has no grid."""
        return name if isinstance(name, Role) else cls(name, key_bias=True)
