"""Stage 2: the converted model learns the next-token distributions of the original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.errors import FarspanError
from ..training.losses import backward, divergence, logits_at, measure, nll
from ..training.swap import Swap
from .student import Student, parameters_of

TRAINS = ("mixers", "all")


def check_healing(trains: str, cross_entropy: float) -> None:
    """Raise FarspanError for options of stage 2 that are not allowed."""
    if trains not in TRAINS:
        raise FarspanError(f"train is {' or '.join(TRAINS)}; got {trains!r}.")
    if not 0 <= cross_entropy < float("inf"):
        raise FarspanError(f"cross_entropy is a finite number, at least 0; got {cross_entropy!r}.")


class Healed:
    """The model with mixers in ``layers``, trained end to end (``Trained``).

    The loss is KL(original || converted) of the next-token distributions, plus ``cross_entropy`` times the
    negative log-likelihood of the text, means over positions in nats. trains: "mixers" changes the mixers
    alone; "all" also the other weights of the decoder's layers, of which copies in float32 are trained.
    Embeddings and head stay.

    Raises FarspanError for other values.
    """

    def __init__(
        self, student: Student, layers: Iterable[int], *, trains: str = "mixers", cross_entropy: float = 0.0
    ) -> None:
        check_healing(trains, cross_entropy)
        self._student, self.layers = student, list(layers)
        self._ce, self._trains = float(cross_entropy), trains
        self._tensors: dict[str, nn.Parameter] = {}
        self._swap = Swap([])
        if trains == "all":
            self._open_weights()
        self._tensors |= parameters_of({i: student.mixers[i] for i in self.layers})

    def _open_weights(self) -> None:
        """Put copies in float32 in place of the weights of the decoder's layers."""
        info, mixed = self._student.info, set(self.layers)
        replaced = {id(m) for i in mixed for m in info.attention[i].modules()}
        stack = next(m for m in info.decoder.modules() if isinstance(m, nn.ModuleList))
        places = [
            (f"{path}.{name}", module, name)
            for path, module in stack.named_modules()
            if id(module) not in replaced
            for name, p in module.named_parameters(recurse=False)
            if p.is_floating_point()
        ]
        self._swap = Swap([(module, name) for _, module, name in places])
        for path, module, name in places:
            made = nn.Parameter(getattr(module, name).detach().float())
            setattr(module, name, made)
            self._tensors[f"model.{path}"] = made
        self._swap.taken()

    @property
    def device(self) -> torch.device:
        return self._student.device

    @property
    def settings(self) -> dict[str, Any]:
        return {"stage": "heal", "layers": self.layers, "train": self._trains, "cross_entropy": self._ce}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def state(self) -> dict[str, Tensor]:
        buffers = {
            f"{i}.{name}": x for i in self.layers for name, x in self._student.mixers[i].state_dict().items()
        }
        return {**buffers, **{name: p.detach() for name, p in self._tensors.items()}}

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        """See ``Trained``."""
        ids, head = ids.to(self.device), self._student.head
        teacher = self.original(ids)

        def loss(logits: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                wanted = logits_at(head, teacher, teacher.last_hidden_state, ids, at)
            kl = divergence(wanted, logits, ids)
            return kl + self._ce * nll(logits, ids, at) if self._ce else kl

        with torch.enable_grad(), self._student.mixed(self.layers):
            return backward(head, head.hidden(ids), ids, loss, accelerator)

    @torch.no_grad()
    def evaluate(self, ids: Tensor, teacher: Any = None) -> dict[str, float]:
        """The negative log-likelihoods (nats a token) of the converted and of the original model, their
        difference, KL(original || converted), and the "loss" that is trained. teacher: what ``original`` has
        returned for these ids; None: it is computed."""
        ids, head = ids.to(self.device), self._student.head
        teacher = self.original(ids) if teacher is None else teacher
        with self._student.autocast(), self._student.mixed(self.layers):
            found = measure(head, head.hidden(ids), teacher, ids)
        return {"loss": found["kl"] + self._ce * found["nll"], **found}

    def finish(self) -> None:
        """Round what was trained to the dtype of the model. The trained weights stay in it until
        ``close``."""
        for index in self.layers:
            self._student.mixers[index].to(self._student.model.dtype)
        for module, name in self._swap.places:
            p = getattr(module, name)
            p.data = p.data.to(self._student.model.dtype)

    def close(self) -> None:
        self._swap.original()

    def original(self, ids: Tensor) -> Any:
        """What the body of the original model returns for ids [B, T]."""
        with torch.no_grad(), self._swap.originals():
            return self._student.head.hidden(ids)
