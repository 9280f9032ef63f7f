"""Writes reference.json: the logits that transformers computes for the tiny models of the tests.

    TINY_LLAMA_DIR=/tmp/tiny cargo test --lib write_reference_models -- --ignored
    python src/backend/local/reference.py /tmp/tiny src/backend/local/reference.json
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

VOCAB = 64
POSITIONS = [0, 9, 80, 199]


def main(models: str, out: str) -> None:
    tokens = [(at * at + 7 * at + 3) % VOCAB for at in range(200)]
    logits = {}
    for family in ["Llama", "Qwen2", "Qwen3"]:
        model = AutoModelForCausalLM.from_pretrained(
            f"{models}/{family}", dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            found = model(torch.tensor([tokens])).logits[0]
        logits[family] = {
            at: [round(value, 5) for value in found[at].tolist()] for at in POSITIONS
        }
    with open(out, "w") as file:
        json.dump({"tokens": tokens, "logits": logits}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
