"""Run one prompt over several ranks: the same patch with `parallel="auto"`, started by a launcher.

    torchrun --nproc-per-node 2 examples/two_ranks.py [MODEL]

Every rank holds the whole model and a part of the prompt's keys. Every rank returns the same tokens.
"""

import os
import sys

import farspan


def main(name: str = "smollm2-135m") -> None:
    model, tokenizer = farspan.load(name)
    inputs = tokenizer("Once upon a time there was a little house by the sea. " * 40, return_tensors="pt")
    with farspan.patch(model, "block_topk:k=256 + quest:k=128", parallel="auto") as patched:
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        report = patched.report()
    if os.environ["RANK"] == "0":
        print(report)
        print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main(*sys.argv[1:])
