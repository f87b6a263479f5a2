"""Merkle trees as in RFC 9162 section 2.1, over SHA-256.

A leaf's hash is SHA-256 of 0x00 and the entry; a node's is SHA-256 of 0x01 and its two children. The
left part of a tree is the largest complete one that leaves something for the right (section 2.1.1).
Building it level by level, with an odd last node carried up as it is, gives the same tree.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from agentweave_bus.exceptions import SignatureRefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tree", "leaf_hash", "root_from_path"]


def leaf_hash(entry: bytes) -> bytes:
    """Hash of one entry, 32 bytes."""
    return sha256(b"\x00" + entry).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class Tree:
    """The tree over at least one leaf hash, in order."""

    __slots__ = ("_levels",)

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ValueError("a tree has at least one leaf")
        self._levels = [list(leaves)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_parents(self._levels[-1]))

    @property
    def size(self) -> int:
        """How many leaves there are."""
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        """The tree head, 32 bytes (section 2.1.1)."""
        return self._levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """Return the inclusion path of leaf ``index``, from its sibling upward (section 2.1.3.1)."""
        if not 0 <= index < self.size:
            raise ValueError(f"there is no leaf {index} in a tree of {self.size}")
        path = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index >>= 1
        return tuple(path)


def _parents(level: list[bytes]) -> list[bytes]:
    pairs = zip(level[::2], level[1::2], strict=False)  # an odd last one is left out
    parents = [_node(left, right) for left, right in pairs]
    if len(level) % 2:
        parents.append(level[-1])
    return parents


def root_from_path(leaf: bytes, *, size: int, index: int, path: Sequence[bytes]) -> bytes:
    """Compute the root to which ``path`` leads from ``leaf`` (section 2.1.3.2, steps 1 to 4).

    The caller compares it with the root that is signed, which is step 5.

    Raises:
        SignatureRefusedError: index or the path's length do not fit a tree of this size.

    """
    if not 0 <= index < size:
        raise SignatureRefusedError("the index of the proof lies outside its tree")
    fn, sn, root = index, size - 1, leaf
    for entry in path:
        if sn == 0:
            raise SignatureRefusedError("the path of the proof is too long for its tree")
        if fn & 1 or fn == sn:
            root = _node(entry, root)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            root = _node(root, entry)
        fn >>= 1
        sn >>= 1
    if sn != 0:
        raise SignatureRefusedError("the path of the proof is too short for its tree")
    return root
