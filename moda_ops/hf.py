"""The language model in the form that Hugging Face transformers knows.

``pip install 'moda-ops[hf]'``, with transformers 4.57 or newer. Importing this module registers
:class:`MoDAConfig` and :class:`MoDAForCausalLM` with ``AutoConfig`` and ``AutoModelForCausalLM``.
The model inside is a :class:`moda_ops.nn.MoDALanguageModel`, ``MoDAForCausalLM(...).model``;
nothing is computed twice.

Two classes are called MoDAConfig, because transformers wants a configuration of its own kind:
this module's is a ``PretrainedConfig``, :class:`moda_ops.nn.MoDAConfig` is the dataclass that the
modules take. :meth:`MoDAConfig.to_nn` and :meth:`MoDAConfig.from_nn` go from one to the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

try:
    from transformers.utils.versions import require_version

    require_version("transformers>=4.57")
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Cache,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError(
        "moda_ops.hf needs transformers 4.57 or newer: pip install 'moda-ops[hf]'"
    ) from error

from moda_ops import nn
from moda_ops.nn.layers import check_tokens, rotary_angles
from moda_ops.rules.autocast import compute_dtype
from moda_ops.stream.depth_stream import DepthSlots, DepthStream

__all__ = ["MoDACache", "MoDAConfig", "MoDAForCausalLM"]

_OUTPUTS = [field.name for field in fields(CausalLMOutputWithPast)]
_CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"  # renamed in transformers 5.24


class MoDAConfig(PretrainedConfig):
    """What ``config.json`` holds: :class:`moda_ops.nn.MoDAConfig` and what transformers adds.

    Files and ``to_dict`` have transformers' names for the sizes, and either name reads and sets
    them: ``hidden_size`` is ``width``, ``num_hidden_layers`` ``layers``, ``num_attention_heads``
    ``heads``, ``num_key_value_heads`` ``kv_heads`` and ``intermediate_size`` ``hidden``. Defaults
    are the 700 M model of arXiv 2603.15619, Table 3, row 4.

    Args:
        vocab_size: number of tokens. It and all up to ``rope_base`` are those of
            :class:`moda_ops.nn.MoDAConfig`.
        use_cache: whether a forward pass without gradients makes a cache, unless told.
        pad_token_id, bos_token_id, eos_token_id: for ``generate``; None for none.
        tie_word_embeddings: True: the output layer is the transposed embedding.
        kwargs: of ``PretrainedConfig``.

    Raises:
        ValueError: see :class:`moda_ops.nn.MoDAConfig`; also ``tie_word_embeddings=False``.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> config.num_hidden_layers, config.to_nn().layers
        (2, 2)
        >>> MoDAConfig.from_nn(config.to_nn(), eos_token_id=0).hidden_size
        32
    """

    model_type = "moda"
    keys_to_ignore_at_inference = [_CACHE]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "hidden": "intermediate_size",
    }

    def __init__(
        self,
        vocab_size: int = 100_278,
        layers: int = 36,
        width: int = 1024,
        heads: int = 16,
        kv_heads: int = 8,
        head_dim: int = 64,
        hidden: int = 4096,
        depth: nn.Depth = "kv+ffn",
        norm: nn.Norm = "post",
        qk_norm: bool = False,
        bias: bool = False,
        write_last: bool = False,
        rope_base: float = 10_000.0,
        depth_keep: Sequence[Sequence[int]] | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if not tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be True: the output layer is the transposed embedding"
            )
        self.vocab_size = vocab_size
        self.layers = layers
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.hidden = hidden
        self.depth = depth
        self.norm = norm
        self.qk_norm = qk_norm
        self.bias = bias
        self.write_last = write_last
        self.rope_base = rope_base
        self.depth_keep = None if depth_keep is None else [list(kept) for kept in depth_keep]
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.to_nn()

    def to_nn(self) -> nn.MoDAConfig:
        """The dataclass that the modules of :mod:`moda_ops.nn` take."""
        values = {name: getattr(self, name) for name in _NN_FIELDS}
        if self.depth_keep is not None:
            values["depth_keep"] = tuple(map(tuple, self.depth_keep))
        return nn.MoDAConfig(**values)

    @classmethod
    def from_nn(cls, config: nn.MoDAConfig, **options: Any) -> "MoDAConfig":
        """The configuration with these sizes; ``options`` are this class's other arguments.

        Raises:
            ValueError: ``config.causal`` is off.
        """
        if not config.causal:
            raise ValueError("config must be causal, got one with causal = False")
        return cls(**{name: getattr(config, name) for name in _NN_FIELDS}, **options)


_NN_FIELDS = [field.name for field in fields(nn.MoDAConfig) if field.name != "causal"]


class MoDACache(Cache):
    """A :class:`moda_ops.nn.KVCache` that ``generate`` can pass around and that grows.

    ``generate`` makes one with room for the whole text; one that a forward pass makes has room for
    its tokens and doubles when it is full. A text's tokens lie from position 0 on, wherever its
    padding is. Memory is allocated in the first forward pass, which knows dtype and device.

    Args:
        config: of the model.
        batch: B.
        capacity: columns, tokens with padding, until it has to grow; at least 1.

    Attributes:
        capacity: columns that it has room for.
        columns: those so far.
        kv: keys, values, and how many tokens each text has; None before the first forward pass.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, cache = MoDAForCausalLM(config).eval(), MoDACache(config, 1, capacity=100)
        >>> tokens = model.generate(
        ...     torch.tensor([[1, 2, 3]]), max_new_tokens=5, cache=cache
        ... )  # before transformers 5.24: past_key_values=cache
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 8]), 7)
    """

    def __init__(self, config: MoDAConfig, batch: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.config = config.to_nn()
        self._texts, self.capacity, self.columns = batch, capacity, 0
        self.kv: nn.KVCache | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers of {self.batch_size} texts, "
            f"{self.columns} of {self.capacity} columns)"
        )

    def __len__(self) -> int:
        return self.config.layers

    @property
    def batch_size(self) -> int:
        """B."""
        return self._texts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far: the tokens of the longest text, its padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def reserve(self, columns: int, x: Tensor) -> nn.KVCache:
        """The memory, with room for so many columns, of a model whose embedding returns x."""
        room, self.capacity = self.capacity, max(columns, self.capacity)
        if self.kv is None:
            self.kv = nn.KVCache.allocate(
                self.config,
                self.batch_size,
                self.capacity,
                dtype=compute_dtype(x.dtype, x.device),
                device=x.device,
            )
        elif columns > room:
            self.capacity = max(columns, 2 * room)
            self._map(
                lambda x: torch.cat((x, x.new_empty(len(x), self.capacity - room, *x.shape[2:])), 1)
            )
        return self.kv

    def append(self, columns: int, tokens: Tensor | int) -> None:
        """Count columns that the layers have filled, and each text's tokens among them."""
        assert self.kv is not None
        self.columns += columns
        self.kv.lengths.add_(tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self.columns, self.kv = 0, None

    def crop(self, columns: int) -> None:
        """Take the last tokens, none of them padding, from every text.

        Args:
            columns: below 0 how many go, above 0 how many columns stay: assisted generation gives
                the first since transformers 5.17 or before, the second in older ones.
        """
        if columns > 0:
            columns = min(columns - self.columns, 0)
        self.append(columns, columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace text b by text ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts, in this order."""
        self._texts = len(indices)
        self._map(lambda x: x[indices.to(x.device)])
        if self.kv is not None:
            lengths = self.kv.lengths
            self.kv = self.kv._replace(lengths=lengths[indices.to(lengths.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text so many times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.kv is not None:
            k, v = (tuple(map(function, tensors)) for tensors in (self.kv.k, self.kv.v))
            self.kv = self.kv._replace(k=k, v=v)


class _OutputLayer(torch.nn.Module):
    """A name for the embedding in its other role, which accelerate and peft ask for.

    It has no parameter and no submodule: both would be the embedding's a second time.
    """

    def __init__(self, model: "MoDAForCausalLM") -> None:
        super().__init__()
        self._of = [model]  # a list hides it from torch.nn.Module

    @property
    def weight(self) -> torch.Tensor:
        return self._of[0].model.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._of[0].model.embedding(x)


class MoDAForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`moda_ops.nn.MoDALanguageModel` as a transformers model.

    Positions and visibility follow from ``attention_mask`` alone: a text's tokens count from 0,
    and no token sees padding, on either side or in between, at no cost in the kernels: tokens
    are moved to the front, where causal attention needs no mask, and results moved back. Logits at
    padding are 0.

    ``generate`` works with a :class:`MoDACache`. It runs one forward pass per token from Python;
    :func:`moda_ops.nn.generate` of ``model.model`` replays a CUDA graph and is the faster one.

    Attributes:
        model: the :class:`moda_ops.nn.MoDALanguageModel`.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model = MoDAForCausalLM(config)
        >>> tokens = torch.tensor([[1, 2, 3], [0, 0, 4]])
        >>> mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
        >>> model(tokens, mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        >>> model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False).shape
        torch.Size([2, 8])
    """

    config_class = MoDAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _no_split_modules = ("MoDABlock", "DepthAttentionBlock")
    gradient_checkpointing = False

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__(config)
        self.model = nn.MoDALanguageModel(config.to_nn())
        self.lm_head = _OutputLayer(self)
        self.post_init()

    @classmethod
    def from_nn(cls, model: nn.MoDALanguageModel, **options: Any) -> "MoDAForCausalLM":
        """Wrap this model; its parameters are shared. ``options`` as :meth:`MoDAConfig.from_nn`.

        Example:
            >>> from moda_ops.nn import MoDAConfig, MoDALanguageModel
            >>> inner = MoDALanguageModel(MoDAConfig(
            ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... ))
            >>> MoDAForCausalLM.from_nn(inner).model is inner
            True
        """
        with torch.device("meta"):
            outer = cls(MoDAConfig.from_nn(model.config, **options))
        outer.model = model
        return outer.train(model.training)

    def _init_weights(self, module: torch.nn.Module) -> None:
        names = {id(known): name for name, known in self.model.named_modules()}
        self.model.reset_module(names.get(id(module), ""), module)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The embedding, whose transpose is the output layer."""
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        """Replace it; ``vocab_size`` becomes the new one's."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> "_OutputLayer":
        """The embedding as an output layer: hidden states (..., width) in, logits out."""
        return self.lm_head

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """Nothing to do: input and output layer are one module with one weight."""

    def set_output_embeddings(self, value: object) -> None:
        """Nothing to do for the embedding's own weight, and an error for any other."""
        if getattr(value, "weight", None) is not self.model.embedding.weight:
            raise ValueError("the output layer is the embedding: call set_input_embeddings")

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "cache_implementation must be None: the cache is a MoDACache, "
                f"got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and model_kwargs.get(_CACHE) is None:
            texts = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs[_CACHE] = MoDACache(self.config, texts, max_cache_length)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant", False):
            raise ValueError(
                "use_reentrant must be False for gradient checkpointing: reentrant checkpoints "
                "lose the gradient of the depth stream"
            )
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers must be 1, got {every_n_layers}")
        self._gradient_checkpointing_func = gradient_checkpointing_func
        self.gradient_checkpointing = enable

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MoDACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: MoDACache | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: (B, N) token ids.
            attention_mask: (B, P + N): nonzero for tokens, 0 for padding, P columns in the cache
                included. Default: no padding among the N.
            cache: what came before. New tokens are appended to it.
            inputs_embeds: (B, N, C) in place of ``input_ids``.
            labels: (B, N) token ids; the logits at one column predict the label of the next. -100
                is left out: set it at padding. So is a text's first label after padding, which
                nothing predicts.
            use_cache: return a cache. Default: ``config.use_cache`` where gradients are off.
            output_hidden_states: return x before each block, and what the output layer takes.
            logits_to_keep: the last so many columns, or the indices of columns, whose logits are
                wanted; 0 is all.
            num_items_in_batch: what the sum of losses is divided by; default, their number.
            past_key_values: the cache, by its name before transformers 5.24.
            unsupported: anything else, unless None or False, is an error.

        Returns:
            ``loss`` (a scalar, float32), ``logits`` (B, N, vocab_size), ``cache`` (before
            transformers 5.24 ``past_key_values``), ``hidden_states`` (layers + 1 of (B, N, C)):
            those that were asked for. With ``return_dict=False`` a tuple.

        Raises:
            TypeError: an argument that is not supported, such as ``position_ids`` or
                ``output_attentions``, or a cache of another kind.
            ValueError: shapes that do not fit, both or none of ``input_ids`` and
                ``inputs_embeds``, or a cache where gradients are on.
        """
        _check_supported(unsupported)
        _check_noise(self.model.embedding)
        _check_devices(self.model.blocks)
        inputs = _one_of(input_ids, inputs_embeds)
        batch, new = inputs.shape[:2]
        cache = self._cache(_one_cache(cache, past_key_values), use_cache, batch, new)
        past = 0 if cache is None else cache.columns
        _check_shape("attention_mask", attention_mask, (batch, past + new))
        _check_shape("labels", labels, (batch, new))
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep must be 0 with labels")

        rows = torch.arange(batch, device=inputs.device)[:, None]
        tokens = None if attention_mask is None else attention_mask[:, past:] != 0
        order = None if tokens is None else (~tokens).byte().argsort(dim=1, stable=True)
        x = inputs if order is None else inputs[rows, order]
        if inputs_embeds is None:
            check_tokens("input_ids", x)
            x = self.model.embedding(x)

        positions = torch.arange(new, device=x.device)
        stream: DepthSlots | DepthStream | nn.CachedStream
        if cache is None:
            stream = self.model.stream(batch, new, like=x)
        else:
            kv = cache.reserve(past + new, x)
            stream = nn.CachedStream(kv, start=None if past else 0)
            positions = kv.lengths[:, None] + positions if past else positions

        states: list[Tensor] = []
        run = self._gradient_checkpointing_func if self._checkpoints else _call

        def run_block(block: torch.nn.Module, x: Tensor, *rest: Any) -> Any:
            if output_hidden_states:
                states.append(x)
            return run(block, x, *rest)

        c = self.model.config
        rotary = rotary_angles(positions, c.head_dim, c.rope_base)
        states.append(self.model.hidden(x, rotary, stream, run_block=run_block))
        if order is not None:
            back = order.argsort(1)
            states = [state[rows, back] for state in states]
        if tokens is not None:
            states[-1] = states[-1].masked_fill(~tokens[..., None], 0)  # as label smoothing needs
        if cache is not None:
            cache.append(new, new if tokens is None else tokens.sum(1))

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(states[-1][:, kept])
        loss = None
        if labels is not None:
            if tokens is not None:
                labels = labels.masked_fill(F.pad(~tokens[:, :-1], (1, 0)), -100)
            loss = self.loss_function(
                logits, labels, c.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{_CACHE: cache},
        )

    @property
    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _cache(
        self, given: object, use_cache: bool | None, batch: int, new: int
    ) -> MoDACache | None:
        """The cache to fill, with room for the new tokens; None for none."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        if given is None and not (wanted and (use_cache or not torch.is_grad_enabled())):
            return None
        if torch.is_grad_enabled():
            raise ValueError(
                "a cache carries no gradient: call under torch.no_grad() or with use_cache=False"
            )
        if given is None:
            return MoDACache(self.config, batch, new)
        if not isinstance(given, MoDACache):
            raise TypeError(f"cache must be a MoDACache, got {type(given).__name__}")
        if given.batch_size != batch:
            raise ValueError(
                f"cache must hold B = {batch} texts, as the tokens, got {given.batch_size}"
            )
        return given


def _call(block: torch.nn.Module, *arguments: Any) -> Any:
    return block(*arguments)


def _check_supported(unsupported: dict[str, Any]) -> None:
    unsupported.pop("cache_position", None)  # what the cache knows, from generate in old releases
    for name, value in unsupported.items():
        if value is not None and value is not False:
            reason = {
                "position_ids": "positions follow from attention_mask",
                "output_attentions": "attention weights are never in memory",
            }.get(name, "MoDAForCausalLM.forward has no such argument")
            raise TypeError(f"{name} is not supported: {reason}")


def _check_noise(embedding: torch.nn.Module) -> None:
    if getattr(embedding, "neftune_noise_alpha", None) is not None:
        raise ValueError(
            "neftune_noise_alpha must be None: the embedding is the output layer too, and noise "
            "would reach the logits"
        )


def _check_devices(blocks: torch.nn.ModuleList) -> None:
    # accelerate's; asking the module itself for a missing attribute takes 4 us per block
    hooks = [block.__dict__.get("_hf_hook") for block in blocks]
    devices = {str(getattr(hook, "execution_device", None)) for hook in hooks} - {"None"}
    if len(devices) > 1:
        raise ValueError(
            "blocks must compute on one device, which has the depth stream and the cache, got "
            f"{', '.join(sorted(devices))}: load with device_map={{'': 0}}, or shard the model"
        )


def _one_cache(cache: object, past_key_values: object) -> object:
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values, which are the same, got both")
    return past_key_values if cache is None else cache


def _one_of(input_ids: object, inputs_embeds: object) -> Tensor:
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


def _check_shape(name: str, x: object, shape: tuple[int, int]) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be None or a torch.Tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must be (B, columns) = {shape}, got {tuple(x.shape)}")


AutoConfig.register(MoDAConfig.model_type, MoDAConfig)
AutoModelForCausalLM.register(MoDAConfig, MoDAForCausalLM)
# Trainer's label smoothing shifts the labels of the classes that this names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoDAConfig.model_type] = MoDAForCausalLM.__name__
