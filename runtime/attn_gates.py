"""SeerAttention's published gates (AttnGates), as recipes of ``seer`` and ``seer_decode``.

A published folder has ``attn_gate_weights.pth``, whose names end in
``layers.<i>.self_attn.attn_gate.<part>``, and a ``config.json``. Gates for prefill have
``mask_linear_k.weight`` [H, 3 D, D], or with another size of the gate ``mask_linear_q.weight`` [H, D, d_g]
and ``mask_linear_k.weight`` [Hkv, 3 D, d_g]. Gates for decode have ``attngate_linear_q.weight`` [Hkv, G, D,
d_g], ``attngate_linear_k.weight`` [Hkv, 3 D, d_g], ``attngate_qnorm.weight`` and ``attngate_knorm.weight``
[d_g].
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod
from ..attention.spec import parse_method
from . import hf
from .recipe import Recipe

FILES = ("attn_gate_weights.pth", "attn_gate_weights.safetensors", "model.safetensors")
_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.attn_gate\.(\w+)\.weight$")
_PARTS = {
    "seer": {"mask_linear_q": "q", "mask_linear_k": "k"},
    "seer_decode": {
        "attngate_linear_q": "q",
        "attngate_linear_k": "k",
        "attngate_qnorm": "q_norm",
        "attngate_knorm": "k_norm",
    },
}


def convert_attn_gates(path: str | Path, model: Any) -> Recipe:
    """A recipe for ``model`` with published gates. path: their folder, or the file with their weights. Where
    no config.json beside it says otherwise, the gates are taken to be of blocks of 64 tokens.

    Raises FarspanError for a file that cannot be read, that holds no such gates or others than those above,
    for pooling other than the mean of queries and max, min and mean of keys, and for gates of another model.
    """
    file = _file(Path(path))
    config = _config(file.parent)
    method, tensors = _renamed(_read(file), file)
    block = config.get("seerattn_gate_block_size", 64)
    _check_pooling(config, file)
    learned = parse_method(f"{method}:block={block}")
    info = hf.inspect_model(model)
    recipe = Recipe(
        method=method,
        geometry=info.geometry,
        settings={"made by": "SeerAttention", "file": file.name, "base_model": config.get("base_model", "")},
        tensors=tensors,
        parameters={"block": block},
    )
    _check_layers(recipe, learned, info, file)
    return recipe


def _file(path: Path) -> Path:
    """The file with the weights."""
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise FarspanError(
            f"There are no gates at {path}: give a folder with {FILES[0]}, or the .pth or .safetensors file."
        )
    return found[0]


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, empty where it has none."""
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise FarspanError(f"{file} cannot be read ({error}): download the gates again.") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        import torch

        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle, zip and safetensors raise errors of their own kinds
        reason = str(error).partition("\n")[0]
        raise FarspanError(f"The gates in {file} cannot be read ({reason}): download them again.") from error


def _renamed(given: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Tensor]]:
    """The method that the gates are for, and their tensors under the names of its recipe."""
    found = {(int(m[1]), m[2]): x for name, x in given.items() if (m := _NAME.search(name))}
    parts = {part for _, part in found}
    if not parts:
        raise FarspanError(
            f"{file} has no tensor 'layers.<i>.self_attn.attn_gate...': give the weights of SeerAttention's "
            "gates, attn_gate_weights.pth."
        )
    for method, names in _PARTS.items():
        whole = parts == set(names) or (method == "seer" and parts == {"mask_linear_k"})
        if whole:
            tensors = {f"layers.{i}.{names[part]}": _shaped(x) for (i, part), x in found.items()}
            return method, tensors
    raise FarspanError(
        f"The gates in {file} have {', '.join(sorted(parts))}; farspan reads those with "
        f"{' or '.join(', '.join(names) for names in _PARTS.values())}."
    )


def _shaped(x: Tensor) -> Tensor:
    """In float32; the queries of a group [Hkv, G, D, d_g] side by side."""
    return (x.flatten(1, 2) if x.dim() == 4 else x).float()


def _check_pooling(config: dict[str, Any], file: Path) -> None:
    """Raise FarspanError where the config names other pooling than a recipe's gates have."""
    for name, wanted in (
        ("seerattn_gate_type", "Qavg_Kmaxminavg"),
        ("seerattn_k_seq_pooling_type", "Kmaxminavg"),
        ("seerattn_q_head_pooling_type", "Qproj"),
    ):
        if config.get(name, wanted) != wanted:
            raise FarspanError(
                f"The gates in {file.parent} have {name}={config[name]}; farspan reads {wanted}."
            )


def _check_layers(recipe: Recipe, method: AttentionMethod, info: hf.ModelInfo, file: Path) -> None:
    """Raise FarspanError unless every layer that a method can serve has gates of its sizes."""
    layers = [i for i in info.attention if info.kinds[i] != hf.SLIDING]
    missing = [i for i in layers if f"layers.{i}.k" not in recipe.tensors]
    most = max(int(name.split(".")[1]) for name in recipe.tensors)
    if missing or most > max(info.attention):
        raise FarspanError(
            f"{file} has gates of layers up to {most}, the model's last layer is {max(info.attention)}: the "
            "gates are of another model, or some are missing."
        )
    for i in layers:
        method.for_layer(recipe.for_layer(method, info.layer_info(i), info.geometry))
