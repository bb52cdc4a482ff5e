"""The language model as transformers calls it: padding, labels, caches, checkpoints, adapters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from moda_ops import nn
from moda_ops.hf.arguments import (
    check_devices,
    check_noise,
    check_shape,
    check_supported,
    one_cache,
    one_input,
)
from moda_ops.hf.cache import MoDACache
from moda_ops.hf.config import MoDAConfig
from moda_ops.hf.release import CACHE
from moda_ops.nn.layers import check_tokens, rotary_angles
from moda_ops.stream.protocol import Stream


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
        >>> from moda_ops.hf import MoDAConfig, MoDAForCausalLM
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
            >>> from moda_ops.hf import MoDAForCausalLM
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
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            texts = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs[CACHE] = MoDACache(self.config, texts, max_cache_length)

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
        check_supported(unsupported)
        check_noise(self.model.embedding)
        check_devices(self.model.blocks)
        inputs = one_input(input_ids, inputs_embeds)
        batch, new = inputs.shape[:2]
        cache = self._cache_to_fill(one_cache(cache, past_key_values), use_cache, batch, new)
        past = 0 if cache is None else cache.columns
        check_shape("attention_mask", attention_mask, (batch, past + new))
        check_shape("labels", labels, (batch, new))
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep must be 0 with labels")

        rows = torch.arange(batch, device=inputs.device)[:, None]
        real = None if attention_mask is None else attention_mask[:, past:] != 0
        order = None if real is None else (~real).byte().argsort(dim=1, stable=True)
        x = inputs if order is None else inputs[rows, order]
        if inputs_embeds is None:
            check_tokens("input_ids", x)
            x = self.model.embedding(x)

        positions = torch.arange(new, device=x.device)
        stream: Stream
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
        if real is not None:
            states[-1] = states[-1].masked_fill(~real[..., None], 0)  # as label smoothing needs
        if cache is not None:
            cache.append(new, new if real is None else real.sum(1))

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(states[-1][:, kept])
        loss = None
        if labels is not None:
            if real is not None:
                labels = labels.masked_fill(F.pad(~real[:, :-1], (1, 0)), -100)
            loss = self.loss_function(
                logits, labels, c.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache},
        )

    @property
    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _cache_to_fill(
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
