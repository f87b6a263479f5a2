"""Trees against the recursive definition of RFC 9162 section 2.1, and paths against section 2.1.3."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentweave_bus.envelope.merkle import Tree, leaf_hash, root_from_path
from agentweave_bus.exceptions import SignatureRefusedError


def mth(entries: list[bytes]) -> bytes:
    """MTH of section 2.1.1, word for word; not how the package computes it."""
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def inclusion(m: int, entries: list[bytes]) -> list[bytes]:
    """PATH of section 2.1.3.1."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return [*inclusion(m, entries[:k]), mth(entries[k:])]
    return [*inclusion(m - k, entries[k:]), mth(entries[:k])]


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def entries_of(size: int) -> list[bytes]:
    return [b"entry %d" % n for n in range(size)]


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 127, 128, 200, 255, 256])
def test_heads_and_paths_are_those_of_the_rfc(size: int) -> None:
    entries = entries_of(size)
    tree = Tree([leaf_hash(one) for one in entries])
    assert tree.root == mth(entries)
    for index in range(0, size, max(1, size // 16)):
        path = tree.path(index)
        assert list(path) == inclusion(index, entries)
        assert root_from_path(leaf_hash(entries[index]), size=size, index=index, path=path) == tree.root


def leads_to(root: bytes, leaf: bytes, size: int, index: int, path: list[bytes]) -> bool:
    try:
        return root_from_path(leaf, size=size, index=index, path=path) == root
    except SignatureRefusedError:
        return False


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 256))
def test_no_other_index_leads_to_the_root(data: st.DataObject, size: int) -> None:
    entries = entries_of(size)
    index = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(-1, size).filter(lambda n: n != index))
    tree = Tree([leaf_hash(one) for one in entries])
    path = list(tree.path(index))
    assert not leads_to(tree.root, leaf_hash(entries[index]), size, other, path)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 21, 256])
def test_a_path_of_another_length_or_order_is_refused(size: int) -> None:
    entries = entries_of(size)
    tree = Tree([leaf_hash(one) for one in entries])
    for index in range(size):
        leaf, path = leaf_hash(entries[index]), list(tree.path(index))
        assert not leads_to(tree.root, leaf, size, index, [*path, tree.root])
        if path:
            assert not leads_to(tree.root, leaf, size, index, path[:-1])
        if len(path) > 1:
            assert not leads_to(tree.root, leaf, size, index, [path[1], path[0], *path[2:]])


def test_what_is_wrong_with_a_paths_length_is_said() -> None:
    tree = Tree([leaf_hash(one) for one in entries_of(5)])
    leaf, path = leaf_hash(b"entry 1"), tree.path(1)
    for wrong, said in ((path[:-1], "too short"), ((*path, tree.root), "too long")):
        with pytest.raises(SignatureRefusedError, match=said):
            root_from_path(leaf, size=5, index=1, path=wrong)
    with pytest.raises(SignatureRefusedError, match="outside its tree"):
        root_from_path(leaf, size=5, index=5, path=path)


def test_a_node_is_no_leaf() -> None:
    """The prefixes keep an inner node from being shown as an entry."""
    tree = Tree([leaf_hash(one) for one in entries_of(4)])
    node = leaf_hash(b"entry 0") + leaf_hash(b"entry 1")
    assert not leads_to(tree.root, leaf_hash(node), 2, 0, [tree.path(0)[1]])


def test_trees_have_leaves_and_paths_have_bounds() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Tree([])
    with pytest.raises(ValueError, match="no leaf 1"):
        Tree([leaf_hash(b"")]).path(1)
