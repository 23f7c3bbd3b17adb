"""How users name mixers: ``"gated_linear:window=64"``, or ``"fnet"`` for encoders."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable

from torch import nn

from ..errors import SpecError
from ..spec import find, parse_parameters, split_spec
from . import encoder
from .encoder import EncoderMixer
from .geometry import Geometry
from .mixer import Mixer, registered

M = typing.TypeVar("M")
_MOST = 1 << 40  # bytes of a state, which no machine's memory holds for a layer


def mixers() -> dict[str, type[Mixer]]:
    """Every mixer that a geometry makes, by name; mixers defined outside farspan are among them."""
    return {name: cls for name, cls in registered().items() if cls.from_geometry}


def encoder_mixers() -> dict[str, type[EncoderMixer]]:
    """Every encoder mixer, by name."""
    return encoder.registered()


def parameters_of(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The parameters that a spec may give, by name: the keyword-only ones of ``__init__``."""
    found = inspect.signature(cls.__init__).parameters
    return {key: one for key, one in found.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}


def parse_mixer(spec: str, geometry: Geometry) -> Mixer:
    """A mixer with fresh weights from ``"name"`` or ``"name:par=value,par=value"``.

    Raises SpecError, naming the nearest known name, for an unknown mixer or parameter, for a value it cannot
    take, for sizes that no memory holds, for a geometry that it does not fit, and for an encoder mixer.
    """
    name, text = _split(spec)
    if name in encoder_mixers():
        raise SpecError(
            f"{name} reads later tokens, so it cannot stand in a causal LM: name one of the mixers "
            f"{', '.join(mixers())}, or put it into an encoder with farspan.runtime.hf.put_encoder_mixers."
        )
    cls = find("mixer", name, mixers())
    mixer = _made(spec, values_of(name, text, cls), lambda **values: cls(geometry, **values))
    if mixer.state_bytes > _MOST:
        raise SpecError(
            f"{spec!r} keeps {mixer.state_bytes:,} bytes of each sequence, more than the {_MOST:,} that "
            "are possible: give smaller sizes."
        )
    return mixer


def parse_encoder_mixer(spec: str, hidden_size: int) -> EncoderMixer:
    """An encoder mixer with fresh weights from its spec. Raises SpecError as ``parse_mixer`` does."""
    name, text = _split(spec)
    cls = find("encoder mixer", name, encoder_mixers())
    return _made(spec, values_of(name, text, cls), lambda **values: cls(hidden_size, **values))


def _split(spec: str) -> tuple[str, str]:
    if not isinstance(spec, str):
        raise SpecError(f"A mixer is a string such as 'gated_linear:window=64'; got {spec!r}.")
    return split_spec(spec)


def values_of(name: str, text: str, cls: type[nn.Module]) -> dict[str, typing.Any]:
    """The values of ``"par=value,par=value"`` for a class whose parameters are ``parameters_of``. Raises
    SpecError for an unknown parameter and for a value of another type."""
    takes = {key: parameter.default for key, parameter in parameters_of(cls).items()}
    return parse_parameters(name, text, takes, typing.get_type_hints(cls.__init__))


def _made(spec: str, values: dict[str, typing.Any], make: Callable[..., M]) -> M:
    try:
        return make(**values)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # torch's, for too large sizes
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{spec!r} cannot be made: {reason}. Give smaller sizes.") from error
