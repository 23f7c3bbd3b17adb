"""Hidden states and logits apart, so that a loss needs the logits of a few positions at a time only."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .models import ModelInfo


class Head:
    """A causal LM in two parts: its body, which returns hidden states, and all that its forward computes from
    these.

    The second part is the model's own forward, called with a stand-in for the body. Scaling, soft-caps and
    biases of logits are thus the model's own.
    """

    def __init__(self, model: Any, info: ModelInfo) -> None:
        self._model, self._decoder = model, info.decoder
        path = next(name for name, module in model.named_modules() if module is info.decoder)
        self._name = path.partition(".")[0]  # what holds the decoder, where it is not the body itself
        self._body: nn.Module = getattr(model, self._name)

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self._model.config.get_text_config(decoder=True).vocab_size)

    def hidden(self, ids: Tensor) -> Any:
        """The output of the body for ids [B, T]; its ``last_hidden_state`` is [B, T, hidden]."""
        return self._body(input_ids=ids, use_cache=False, return_dict=True)

    def logits(self, output: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, n, vocabulary] of ``hidden`` [B, n, hidden], some positions of ``output``, whose tokens
        are ``ids`` [B, n]."""
        part = copy.copy(output)
        part["last_hidden_state"] = hidden
        setattr(self._model, self._name, _Computed(self._body, self._decoder, part))
        try:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            setattr(self._model, self._name, self._body)
        return logits


class _Computed(nn.Module):
    """Stands in for a body and returns an output that was computed before."""

    def __init__(self, body: nn.Module, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        self._real = body, decoder  # in a tuple, so that they are no submodules
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        """What the model's forward reads of the body: settings, or a decoder inside that it calls itself."""
        body, decoder = self._real
        value = getattr(body, name)
        return self if value is decoder else value
