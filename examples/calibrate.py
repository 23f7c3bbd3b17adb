"""Calibrate a method on a text, save the recipe, and use the recipe again later.

    python examples/calibrate.py [MODEL] [FOLDER]

FOLDER is the folder of the recipe [default: recipe].
"""

import sys
from pathlib import Path

import farspan


def main(name: str = "smollm2-135m", folder: str = "recipe") -> None:
    model, tokenizer = farspan.load(name)
    if not Path(folder).exists():
        # The text should be like your prompts. This example takes a file that is here anyway.
        text = Path(__file__).with_name("own_method.py").read_text(encoding="utf-8")
        recipe = farspan.calibrate(model, tokenizer, text, method="double_sparsity", tokens=512, window=256)
        recipe.save(folder)
    inputs = tokenizer("The quick brown fox jumps over the lazy dog. " * 60, return_tensors="pt")
    with farspan.patch(model, "double_sparsity:k=128", recipe=folder) as patched:
        model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        print(patched.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
