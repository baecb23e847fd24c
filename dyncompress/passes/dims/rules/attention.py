"""Scaled dot product attention: q (.., h, L, e), k (.., h, S, e), v (.., h, S, f) give (.., h, L, f).

S is softmaxed and stays. With grouped queries h = kv * g: query head i reads key head i // g. The default scale
1/sqrt(e) is pinned when e shrinks.
"""

from typing import Any

from torch import fx

from ..dims import Product, freeze, fresh, unify
from ..rule_registry import Dims, Typing, rule
from .elementwise import broadcast


@rule("scaled_dot_product_attention")
def attention(t: Typing, node: fx.Node, a: dict[str, Any]) -> Dims:
    q, k, v = (t.of(a[n]) for n in ("query", "key", "value"))
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    freeze(k[-2], "softmaxed")
    t.kinds += [(q[-1], "head dims"), (v[-1], "head dims"), *((dim, "heads") for dim in k[:-2] if dim is not t.batch)]
    heads = q[:-2]
    if a.get("enable_gqa") and q[-3].size != k[-3].size:
        unify(k[-3], v[-3])
        queries = fresh(q[-3].size // k[-3].size)
        unify(q[-3], Product((k[-3], queries)))
        t.kinds.append((queries, "queries per key"))
        broadcast([q[:-3], k[:-3], v[:-3]])
    else:
        heads = broadcast([q[:-2], k[:-2], v[:-2]])
    if a.get("attn_mask") is not None:
        broadcast([(*heads, q[-2], k[-2]), t.of(a["attn_mask"])])
    return (*heads, q[-2], v[-1])
