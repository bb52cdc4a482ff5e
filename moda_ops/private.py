"""Every private name of PyTorch that this package uses, and what would be lost without it.

``moda_kernels.sdpa`` has those of the kernels: the operators behind scaled_dot_product_attention.
PyTorch may rename a private name in any release, so the package is tested with PyTorch 2.11 and
2.13. There is no upper bound: an unknown release either has all of these, or importing this module
says which is missing.
"""

from importlib import import_module
from typing import Any

import torch

TESTED = "2.11", "2.13"
"""Releases of PyTorch that all tests ran with."""


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    owner: Any = torch._C if module == "torch._C" else import_module(module)
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ImportError(
            f"PyTorch {torch.__version__} has no {path}, which moda_ops uses; it is tested with "
            f"PyTorch {' and '.join(TESTED)}"
        ) from None


# Gradients that torch.func takes too: an implementation of an operator's Autograd key.
DispatchKeySet = _find("torch._C.DispatchKeySet")
"""The type of the keys that such an implementation gets."""
after_autograd_keys = _find("torch._C._after_autograd_keyset")
"""The keys to go on with."""
BelowAutograd = _find("torch._C._AutoDispatchBelowAutograd")
"""Without it the call comes back to the Autograd key for ever."""
any_requires_grad = _find("torch._C._any_requires_grad")
"""Without it every call, in inference too, would build a node."""
transforms_active = _find("torch._C._are_functorch_transforms_active")
"""Tells an outer torch.func transform: grad(grad(f)) gave zeros without it."""
single_level_function = _find("torch._functorch.utils.enable_single_level_autograd_function")
"""Lets an autograd.Function run inside torch.func.grad."""
set_forward_grad_enabled = _find("torch.autograd.forward_ad._set_fwd_grad_enabled")
"""Lets an outer forward-mode derivative see the inside of that Function."""


def forward_mode_level() -> int:
    """-1 outside of forward mode: dual tensors would lose their tangent without an error."""
    level: int = torch.autograd.forward_ad._current_level
    return level


# Autocast.
DispatchKey = _find("torch._C.DispatchKey")
"""Names the Autocast keys."""
ExcludeKeys = _find("torch._C._ExcludeDispatchKeyGuard")
"""Without it the call with cast arguments is cast again."""

# is_grads_batched and jacobian(vectorize=True), which use the older vmap.
enter_vmap_level = _find("torch._C._vmapmode_increment_nesting")
leave_vmap_level = _find("torch._C._vmapmode_decrement_nesting")
add_batch_dim = _find("torch._add_batch_dim")
remove_batch_dim = _find("torch._remove_batch_dim")

# The guard of a stream's slots.
graph_task_id = _find("torch._C._current_graph_task_id")
"""Which backward pass runs: a write in another one than the allocation's is a recomputation."""
register_namedtuple = _find("torch.utils._pytree._register_namedtuple")
"""torch.export.save of a program that takes a stream fails without it."""


# Dynamo, whose import costs seconds: looked up by the first call.
def mark_dynamic(x: torch.Tensor, dim: int) -> None:
    """Without it blocks recompile for the second block's number of slots."""
    _find("torch._dynamo.maybe_mark_dynamic")(x, dim)


def mark_static_address(x: torch.Tensor) -> None:
    """Without it a CUDA graph of a decoding step copies its cache."""
    _find("torch._dynamo.mark_static_address")(x, guard=False)


def buffers_not_donated() -> Any:
    """A context: a compiled backward can run more than once, as a benchmark does."""
    return _find("torch._functorch.config.patch")(donated_buffer=False)


def holds_no_values(x: torch.Tensor) -> bool:
    """Whether a tensor is fake, functional or on meta: FLOPs could not be counted on these."""
    fake = _find("torch._subclasses.fake_tensor.FakeTensor")
    functional = _find("torch._subclasses.functional_tensor.FunctionalTensor")
    return isinstance(x, (fake, functional)) or x.device.type == "meta"
