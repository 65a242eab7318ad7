"""Attention of a tree of speculated tokens: over the cached prefix and over the tree, merged.

A tree is a list of paths from its root, as Medusa (Cai et al. 2024) and EAGLE (Li et al. 2024) write it: `(1, 0)` is
the first child of the root's second child. The root, the last accepted token, is the empty path.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from keyspan.ops.fmha import memory_efficient_attention_partial, merge_attentions, triton_splitk
from keyspan.ops.fmha.attn_bias import AttentionBias
from keyspan.ops.fmha.common import AttentionFwOpBase

Path = tuple[int, ...]


class SplitKAutotune(triton_splitk.FwOp):
    """A hint, like `triton_splitk.FwOp`."""

    AUTOTUNE = True


@dataclass
class TreeAttnMetadata:
    """A tree in the forms that decoding needs. It has n nodes besides the root; node 0 is the root.

    Attributes:
        tree_choices: the n paths, sorted by length, then lexically.
        attention_bias: `[n + 1, n + 1]`, 0 for a node's ancestors and itself, −inf elsewhere.
        tree_indices: int64 `[n + 1]`, the draft token of a node; each level's follow those of the level before.
        retrieval_indices: int64 `[leaves, depth + 1]`, the nodes from the root to each leaf, padded with −1.
        path_lengths: nodes on each of those paths.
        tree_seq_position_ids: int32 `[n + 1]`, the level of a node.
        parent_node_indices: int64 `[n]`, the parent of every node but the root.
        child_node_indices: int64 `[n + 1, most children]`, children of a node as positions in `tree_choices`, the last
            one repeated; 0 for leaves.
        num_children_per_node: int64 `[n + 1]`; candidate_idx: int64 `[n]`, a node's rank among its siblings.
        num_nodes_per_level: int64 `[depth + 1]`; subtree_sizes: nodes up to each level.
        num_children_per_node_at_level: `num_children_per_node`, cut by level.
    """

    tree_choices: Sequence[Path]
    attention_bias: Tensor
    tree_indices: Tensor
    retrieval_indices: Tensor
    path_lengths: list[int]
    tree_seq_position_ids: Tensor
    parent_node_indices: Tensor
    child_node_indices: Tensor
    num_children_per_node: Tensor
    candidate_idx: Tensor
    num_nodes_per_level: Tensor
    num_nodes_per_level_cpu: Tensor
    num_children_per_node_at_level: list[Tensor]
    num_children_per_node_at_level_cpu: list[Tensor]
    subtree_sizes: list[int]

    @classmethod
    @lru_cache
    def from_tree_choices_cached(
        cls,
        tree_choices: tuple[Path, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TreeAttnMetadata:
        return cls.from_tree_choices(tree_choices, dtype, device)

    @classmethod
    def from_tree_choices(
        cls,
        tree_choices: Sequence[Path],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TreeAttnMetadata:
        """From the paths of all nodes except the root, in any order. `dtype` is that of `attention_bias`."""
        paths = sorted(tree_choices, key=lambda path: (len(path), path))
        nodes = [(), *paths]
        number = {path: i for i, path in enumerate(nodes)}
        orphans = [path for path in paths if path[:-1] not in number]
        if orphans:
            raise ValueError(f"tree_choices: got {orphans[0]} without its parent, want every parent in the list too")
        children = [[i for i, path in enumerate(paths) if path[:-1] == node] for node in nodes]
        widest = max(1, *(len(row) for row in children))
        leaves = [path for path, row in zip(nodes, children, strict=True) if not row]
        retrieval = [[number[leaf[:level]] for level in range(len(leaf) + 1)] for leaf in leaves]
        levels = [1, *_get_depth_counts(paths)]
        depth = len(levels) - 1
        counts = [len(row) for row in children]
        edges = [0, *itertools.accumulate(levels)]

        def ints(values: Sequence[object], kind: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=kind, device=device)

        per_level = [ints(counts[a:b]) for a, b in itertools.pairwise(edges)]
        return cls(
            tree_choices=paths,
            attention_bias=_prepare_tree_attn_bias(paths, levels[1:], dtype, device),
            tree_indices=ints(_draft_tokens(nodes, depth)),
            retrieval_indices=ints([row + [-1] * (depth + 1 - len(row)) for row in retrieval]),
            path_lengths=[len(row) for row in retrieval],
            tree_seq_position_ids=ints([len(path) for path in nodes], torch.int32),
            parent_node_indices=ints([number[path[:-1]] for path in paths]),
            child_node_indices=ints(
                [(row or [0]) + (row or [0])[-1:] * (widest - len(row or [0])) for row in children]
            ),
            num_children_per_node=ints(counts),
            candidate_idx=ints([children[number[path[:-1]]].index(i) for i, path in enumerate(paths)]),
            num_nodes_per_level=ints(levels),
            num_nodes_per_level_cpu=torch.tensor(levels),
            num_children_per_node_at_level=per_level,
            num_children_per_node_at_level_cpu=[row.cpu() for row in per_level],
            subtree_sizes=edges[1:],
        )


def _get_depth_counts(sorted_tree_choices: Sequence[Path]) -> list[int]:
    """The number of nodes of each level below the root."""
    counts = Counter(map(len, sorted_tree_choices))
    return [counts[level] for level in range(1, max(counts, default=0) + 1)]


def _prepare_tree_attn_bias(
    sorted_tree_choices: Sequence[Path],
    depth_counts: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """`TreeAttnMetadata.attention_bias`. (`depth_counts` follows from the paths and is unused.)"""
    nodes: list[Path] = [(), *sorted_tree_choices]
    number = {path: i for i, path in enumerate(nodes)}
    bias = torch.full((len(nodes), len(nodes)), -torch.inf, dtype=dtype)
    for i, path in enumerate(nodes):
        bias[i, [number[path[:level]] for level in range(len(path) + 1)]] = 0
    return bias.to(device)


def _draft_tokens(nodes: Sequence[Path], depth: int) -> list[int]:
    """The draft token of each node: numbered by the path's last step, after the tokens of the level before."""
    tokens, base = [0], 0
    for level in range(1, depth + 1):
        tokens += [base + path[-1] + 1 for path in nodes if len(path) == level]
        base = max(tokens)
    return tokens


def tree_attention(
    q: Tensor,
    spec_k: Tensor,
    spec_v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    spec_attn_bias: Tensor,
    prefix_attn_bias: AttentionBias,
    prefix_op: type[AttentionFwOpBase] | None = None,
    suffix_op: type[AttentionFwOpBase] | None = None,
    autotune: bool = False,
    quantized_kv_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the tree's T queries over the prefix and the tree.

    Args:
        q: `[B, T, H, K]` or `[B, T, G, H, K]`; spec_k, spec_v: `[B, T', ...]`, keys and values of the tree, T' ≥ T.
        cache_k, cache_v: `[B, N, ...]`, the prefix; `[1, pages·page_size, ...]` for paged masks.
        spec_attn_bias: `[T, T']`, e.g. `TreeAttnMetadata.attention_bias`.
        prefix_attn_bias: a mask of B blocks of T queries over the cache.
        prefix_op, suffix_op, autotune: hints.

    Returns:
        q's shape and dtype.
    """
    if quantized_kv_scales is not None:
        raise NotImplementedError("quantized_kv_scales: quantized caches are left out of keyspan")
    B, T = q.shape[:2]
    # Partial results are fp32, so that the result is rounded once.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, keys, values = (x.flatten(0, 1)[None] for x in (q, cache_k, cache_v))
    prefix, prefix_lse = memory_efficient_attention_partial(rows, keys, values, prefix_attn_bias, output_dtype=wide)
    prefix, prefix_lse = prefix[0].unflatten(0, (B, T)), prefix_lse[0].unflatten(-1, (B, T)).movedim(-2, 0)
    tree, tree_lse = memory_efficient_attention_partial(q, spec_k, spec_v, spec_attn_bias, output_dtype=wide)
    return merge_attentions([prefix, tree], [prefix_lse, tree_lse], output_dtype=q.dtype)[0]


def use_triton_splitk_for_prefix(B: int, G: int, tree_size: int) -> bool:
    """Keyspan chooses its backend itself."""
    return False


def select_prefix_op(
    B: int, G: int, tree_size: int, autotune: bool, attn_bias: AttentionBias, kv_cache_dtype: torch.dtype
) -> type[AttentionFwOpBase] | None:
    """`None`: keyspan chooses its backend itself."""
    return None


def construct_tree_choices(branching: Sequence[int]) -> list[Path]:
    """All paths of a tree whose nodes of level i have `branching[i]` children each."""
    return [
        path
        for depth in range(1, len(branching) + 1)
        for path in itertools.product(*(range(n) for n in branching[:depth]))
    ]


def construct_full_tree_choices(tree_depth: int, branching: int) -> list[Path]:
    """All paths of a tree of `tree_depth` levels below the root, with `branching` children per node."""
    return construct_tree_choices([branching] * tree_depth)


def get_full_tree_size(tree_depth: int, branching: int) -> int:
    """The number of nodes of a full tree of `tree_depth` levels, the root's level included."""
    return sum(branching**level for level in range(tree_depth))
