"""The language model in the form that Hugging Face transformers knows.

``pip install 'moda-ops[hf]'``, with transformers 4.57 or newer. Importing this package registers
:class:`MoDAConfig` and :class:`MoDAForCausalLM` with ``AutoConfig`` and ``AutoModelForCausalLM``.
The model inside is a :class:`moda_ops.nn.MoDALanguageModel`, ``MoDAForCausalLM(...).model``;
nothing is computed twice.

Two classes are called MoDAConfig, because transformers wants a configuration of its own kind:
this package's is a ``PretrainedConfig``, :class:`moda_ops.nn.MoDAConfig` is the dataclass that the
modules take. :meth:`MoDAConfig.to_nn` and :meth:`MoDAConfig.from_nn` go from one to the other.
"""

try:
    from transformers.utils.versions import require_version

    require_version("transformers>=4.57")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        "moda_ops.hf needs transformers 4.57 or newer: pip install 'moda-ops[hf]'"
    ) from error

from moda_ops.hf.cache import MoDACache
from moda_ops.hf.config import MoDAConfig
from moda_ops.hf.model import MoDAForCausalLM

__all__ = ["MoDACache", "MoDAConfig", "MoDAForCausalLM"]

AutoConfig.register(MoDAConfig.model_type, MoDAConfig)
AutoModelForCausalLM.register(MoDAConfig, MoDAForCausalLM)
# Trainer's label smoothing shifts the labels of the classes that this names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoDAConfig.model_type] = MoDAForCausalLM.__name__
