"""What ``MoDAForCausalLM.forward`` accepts: errors that name the argument."""

from typing import Any

import torch
from torch import Tensor


def check_supported(unsupported: dict[str, Any]) -> None:
    """Raise TypeError for an argument that ``forward`` does not have, unless None or False."""
    unsupported.pop("cache_position", None)  # what the cache knows, from generate in old releases
    for name, value in unsupported.items():
        if value is not None and value is not False:
            reason = {
                "position_ids": "positions follow from attention_mask",
                "output_attentions": "attention weights are never in memory",
            }.get(name, "MoDAForCausalLM.forward has no such argument")
            raise TypeError(f"{name} is not supported: {reason}")


def check_noise(embedding: torch.nn.Module) -> None:
    """Raise ValueError if a Trainer adds NEFTune's noise to the embedding."""
    if getattr(embedding, "neftune_noise_alpha", None) is not None:
        raise ValueError(
            "neftune_noise_alpha must be None: the embedding is the output layer too, and noise "
            "would reach the logits"
        )


def check_devices(blocks: torch.nn.ModuleList) -> None:
    """Raise ValueError if accelerate runs the blocks on several devices."""
    # accelerate's; asking the module itself for a missing attribute takes 4 us per block
    hooks = [block.__dict__.get("_hf_hook") for block in blocks]
    devices = {str(getattr(hook, "execution_device", None)) for hook in hooks} - {"None"}
    if len(devices) > 1:
        raise ValueError(
            "blocks must compute on one device, which has the depth stream and the cache, got "
            f"{', '.join(sorted(devices))}: load with device_map={{'': 0}}, or shard the model"
        )


def one_cache(cache: object, past_key_values: object) -> object:
    """The cache, by either name."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values, which are the same, got both")
    return past_key_values if cache is None else cache


def one_input(input_ids: object, inputs_embeds: object) -> Tensor:
    """Whichever of the two is given."""
    given = {"input_ids": (input_ids, 2), "inputs_embeds": (inputs_embeds, 3)}
    tensors = {name: value for name, value in given.items() if value[0] is not None}
    if len(tensors) != 1:
        raise ValueError(f"give one of input_ids and inputs_embeds, got {len(tensors)}")
    ((name, (x, dimensions)),) = tensors.items()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != dimensions or 0 in x.shape:
        raise ValueError(
            f"{name} must have {dimensions} dimensions, none of them 0, got {tuple(x.shape)}"
        )
    return x


def check_shape(name: str, x: object, shape: tuple[int, int]) -> None:
    """Raise unless x is None or a tensor of this shape."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be None or a torch.Tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must be (B, columns) = {shape}, got {tuple(x.shape)}")
