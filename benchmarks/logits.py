"""What a vocabulary of 128,000 costs: memory at the peak of a step, and its time, with logits whole and in tiles.

    python benchmarks/logits.py [--tokens 2048] [--vocabulary 128000] [--hidden 512] [--out benchmarks/results/logits.json]

A small Llama on one CPU rank, forward and backward once to warm up and then measured, each way in a process of its own:
`whole` is transformers' own loss; `tiles` is the launcher's, with labels on every token and on half of them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WAYS = {"whole": 1, "tiles": 1, "tiles, half of the tokens bear loss": 2}


def main() -> None:
    """Measure all ways, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a vocabulary of 32,000, 512 tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.vocabulary = 512, 32_000
    if options.way:
        print(json.dumps(_measured(options)))
        return
    sizes = {name: getattr(options, name) for name in ("tokens", "vocabulary", "hidden")}
    found = {}
    for way in WAYS:
        arguments = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
        command = [sys.executable, __file__, *arguments, "--way", way]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak, seconds = found[way]["peak_bytes"], found[way]["seconds"]
        print(f"{peak / 2**20:8,.0f} MiB  {seconds:6.2f} s  loss {found[way]['loss']:.4f}  {way}")
    logits = 4 * options.tokens * options.vocabulary
    print(f"{logits / 2**20:8,.0f} MiB  one copy of the logits in fp32")
    if options.out:
        tree = {"asked": sizes, "logits_bytes": logits, "ways": found}
        options.out.write_text(json.dumps(tree, indent=1) + "\n")


def _measured(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.tasks.next_tokens import IGNORED, Tiles
    from launcher.train.usage import Watch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = options.hidden // 64
    config = AutoConfig.for_model(
        "llama",
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=options.vocabulary,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, options.vocabulary, (options.tokens // 512, 512))
    labels = ids.clone()
    labels[:, : 512 - 512 // WAYS[options.way]] = IGNORED
    tiles = Tiles()

    def step() -> float:
        if options.way == "whole":
            loss = model(ids, labels=labels, use_cache=False).loss
        else:
            total = tiles.loss(model, {"input_ids": ids, "use_cache": False}, labels)
            assert total is not None
            loss = total / (labels[:, 1:] != IGNORED).sum()
        loss.backward()
        return float(loss)

    step()  # Gradients and the allocator's own are there from now on.
    watch, begun_s = Watch(torch.device("cpu")), time.perf_counter()
    loss = step()
    return {"seconds": time.perf_counter() - begun_s, "peak_bytes": watch.usage().host, "loss": loss}


if __name__ == "__main__":
    main()
