"""For callers who know other attention functions: what their arguments are called here.

``scaled_dot_product_attention``, FlashAttention, FlexAttention and the paper authors' package have
other names for some arguments, and arguments for what this package does not support.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

OURS = {
    "is_causal": ("causal",),
    "softmax_scale": ("scale",),
    "sm_scale": ("scale",),
    "scaling": ("scale",),
    "window_size": ("window",),
    "sliding_window": ("window",),
    "logits_soft_cap": ("softcap",),
    "return_softmax_lse": ("return_lse",),
    "return_attn_probs": ("return_lse",),
    "need_lse": ("return_lse",),
    "query": ("q",),
    "key": ("k", "k_new", "k_depth"),
    "k": ("k_new", "k_depth"),
    "value": ("v", "v_new", "v_depth"),
    "v": ("v_new", "v_depth"),
    "cached_k": ("k_depth",),
    "cached_v": ("v_depth",),
    "page_table": ("block_table",),
}
"""Other libraries' names and ours. A function's own name is the first of them that it has."""

_GROUPED = "leave it out: heads are grouped by shape, HQ = G * H"
_MASKED = "not supported: use causal and window, or moda_attention_varlen for packed documents"
_DROPPED = "not supported: apply dropout to the result"
INSTEAD = {
    "enable_gqa": _GROUPED,
    "moda_group_num": _GROUPED,
    "attn_mask": _MASKED,
    "attn_bias": _MASKED,
    "attention_mask": _MASKED,
    "block_mask": _MASKED,
    "key_padding_mask": _MASKED,
    "score_mod": "not supported: use scale and softcap",
    "alibi_slopes": "not supported: rotate q and k for positions",
    "dropout_p": _DROPPED,
    "dropout": _DROPPED,
    "deterministic": "leave it out: torch.use_deterministic_algorithms decides",
    "num_splits": "leave it out: the kernels choose",
    "plan": "leave it out: there is one implementation",
    "cu_seqlens": "use moda_attention_varlen, with cu_seqlens_q and cu_seqlens_k",
    "cu_seqlens_q": "use moda_attention_varlen",
    "cu_seqlens_k": "use moda_attention_varlen",
    "return_lse": "use attend_with_lse",
    "causal": "leave it out: it is causal in the sequence, and depth is never masked",
    "window": "leave it out: depth is never masked",
}
"""What to do about an argument that a function does not have."""


def knows_other_names(function: F) -> F:
    """Let the TypeError for an unknown argument say what it is called here, or what to do instead.

    It looks only at a call that has failed.
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except TypeError:
            unknown = [name for name in options if name not in names]
            if not unknown:
                raise
        raise TypeError(_message(function.__qualname__, unknown[0], names))

    return call  # type: ignore[return-value]


def _message(function: str, name: str, names: list[str]) -> str:
    unexpected = f"{function}() got an unexpected keyword argument {name!r}"
    ours = OURS.get(name, ())
    for known in ours:
        if known in names:
            return f"{unexpected}; it is called {known} here"
    for known in (name, *ours):
        if known in INSTEAD:
            return f"{unexpected}; {INSTEAD[known]}"
    return f"{unexpected}; the arguments are {', '.join(names)}"
