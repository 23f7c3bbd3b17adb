"""Patch a pretrained model, generate, print the report, and remove the patch.

    python examples/patch_a_model.py [MODEL]

MODEL is an alias of `farspan models`, a hub id or a local folder [default: smollm2-135m].
"""

import sys

import torch

import farspan


def main(name: str = "smollm2-135m") -> None:
    model, tokenizer = farspan.load(name)
    text = (
        "The code of the safe is 4711. "
        + "The grass is green. The sky is blue. " * 60
        + "The code of the safe is"
    )
    inputs = tokenizer(text, return_tensors="pt")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**inputs, **settings)
    # Prefill reads the blocks with the most estimated attention, decode reads 256 keys. Layer 0 is dense.
    with farspan.patch(model, "antidiagonal + quest:k=256", layers={0: "dense"}) as patched:
        sparse = model.generate(**inputs, **settings)
        print(patched.report())
    after = model.generate(**inputs, **settings)
    length = inputs["input_ids"].shape[1]
    print("sparse:", tokenizer.decode(sparse[0, length:]))
    print("dense: ", tokenizer.decode(before[0, length:]))
    print("the model is as it was:", torch.equal(before, after))


if __name__ == "__main__":
    main(*sys.argv[1:])
