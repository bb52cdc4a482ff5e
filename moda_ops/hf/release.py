"""What differs between releases of transformers."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

_OUTPUTS = [field.name for field in fields(CausalLMOutputWithPast)]
CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"
"""What outputs and keywords call the cache; transformers 5.24 renamed it."""
