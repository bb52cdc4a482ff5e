"""Every symbol with its shape, its meaning and where the paper has it.

`python -m moda_reference.glossary` prints the table. Shapes in (...) are those of arguments and
results, shapes in [...] those of one query or of one tile of M rows. The paper is arXiv 2603.15619,
whose D is the model width G Hk d; "-" marks what it does not have.
"""

import sys
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Symbol:
    """One row of the glossary."""

    symbol: str
    shape: str
    meaning: str
    paper: str


GLOSSARY: tuple[Symbol, ...] = tuple(
    Symbol(*row)
    for row in (
        # sizes
        ("B", "int", "batch", "B, table 2"),
        ("T", "int", "queries in a sequence", "T, table 1"),
        ("S", "int", "keys in a sequence; query t sits at key position t + S - T", "-"),
        ("HQ", "int", "query heads", "Hq = G Hk, table 2"),
        ("H", "int", "key/value heads", "Hk, table 1"),
        ("G", "int", "HQ / H; query head h reads KV head j = h // G", "G, table 1"),
        ("D", "int", "width of a head of q and k", "d, table 1"),
        ("DV", "int", "width of a head of v", "d, table 1"),
        ("L", "int", "depth slots", "L (layers), table 1"),
        # arguments
        ("q", "(B, T, HQ, D)", "queries", "Q, section 2 d"),
        ("k", "(B, S, H, D)", "keys of the sequence", "K, section 2 d"),
        ("v", "(B, S, H, DV)", "values of the sequence", "V, section 2 d"),
        ("k_depth", "L x (B, T, H, D)", "slot l: keys written at token t", "K_i, figure 3"),
        ("v_depth", "L x (B, T, H, DV)", "slot l: values written at token t", "V_i, figure 3"),
        ("k_cache", "(B, S, H, D), pages", "keys of the tokens so far, in decoding", "-"),
        ("v_cache", "(B, S, H, DV), pages", "values of the tokens so far, in decoding", "-"),
        ("cache_seqlens", "(B,)", "tokens of each sequence in the cache", "-"),
        ("k_new", "(B, T, H, D)", "keys of the new tokens, which go into the cache", "-"),
        ("v_new", "(B, T, H, DV)", "values of the new tokens, which go into the cache", "-"),
        ("block_table", "(B, max_pages)", "pages that hold a sequence's part of the cache", "-"),
        ("cu_seqlens_q", "(documents + 1,)", "where packed documents begin, in queries", "-"),
        ("cu_seqlens_k", "(documents + 1,)", "where packed documents begin, in keys", "-"),
        ("options", "-", "causal, scale, window and softcap, handed on", "-"),
        ("causal", "bool", "hide keys after the query's position", "i_q // G >= i_k, algorithm 1"),
        ("window", "int, pair", "how far a query sees to the left and right", "-"),
        ("chunk_size", "int", "tokens in a chunk, whose depth slots are shared", "-"),
        ("keys", "int", "how many first keys of a sequence are its attention sink", "figure 5"),
        ("scale", "float", "factor of dot products, 1 / sqrt(D)", "section 2"),
        ("softcap", "float", "c in score = c tanh(score / c)", "-"),
        # forward
        ("a", "[S]", "a_n = scale q . k[n], a query's sequence scores", "section 2 d"),
        ("d", "[L]", "d_l = scale q . k_depth[l], its depth scores", "section 2 d"),
        ("p", "[S + L]", "exp(score - lse), the one softmax over both", "section 2 d, figure 5"),
        ("out", "(B, T, HQ, DV)", "sum of p v over both kinds of keys", "section 2 d"),
        ("lse", "(B, HQ, T)", "log of the sum of exp(score), natural", "-"),
        # tiles
        ("r", "int", "row t G + g of a KV head, query g of token t", "i_q, algorithm 1"),
        ("m", "[M]", "running maximum of a row's scores, base 2", "(m, acc, o), algorithm 1"),
        ("l", "[M]", "running sum of 2^(score - m)", "(m, acc, o), algorithm 1"),
        ("acc", "[M, DV]", "running sum of 2^(score - m) v", "(m, acc, o), algorithm 1"),
        ("block_m", "int", "rows in a tile, M", "C, table 2"),
        ("block_n", "int", "sequence keys in a block", "algorithm 1"),
        ("block_l", "int", "depth slots in a block", "algorithm 1"),
        # backward
        ("dout", "(B, T, HQ, DV)", "gradient that arrives at out", "-"),
        ("dlse", "(B, HQ, T)", "gradient that arrives at lse", "-"),
        ("delta", "(B, HQ, T)", "dout . out - dlse", "-"),
        ("dp", "[S + L]", "dout . v, gradient of p", "-"),
        ("ds", "[S + L]", "p (dp - delta) scale softcap_slope, gradient of q . k", "-"),
        ("dq", "(B, T, HQ, D)", "sum of ds k over both kinds of keys", "-"),
        ("dk", "(B, S, H, D)", "sum of ds q over the queries that see key n", "-"),
        ("dv", "(B, S, H, DV)", "sum of p dout over the same queries", "-"),
        ("dk_depth", "L x (B, T, H, D)", "sum of ds q over token t's G queries", "-"),
        ("dv_depth", "L x (B, T, H, DV)", "sum of p dout over the same G", "-"),
    )
)


def table() -> str:
    """The glossary as aligned text, one symbol a line.

    >>> print(table().splitlines()[0].split())
    ['symbol', 'shape', 'meaning', 'in', 'the', 'paper']
    """
    rows = [("symbol", "shape", "meaning", "in the paper"), *map(astuple, GLOSSARY)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
