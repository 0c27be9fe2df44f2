#!/usr/bin/env python3
"""Decode and prefill rates of Tercet beside llama.cpp's, alternating in one run.

Both compute the same shape with the same threads and the same type of head: Tercet from I2_S,
llama.cpp (PyPI llama-cpp-python) from TQ2_0, both made by `tercet model synth`. Random weights:
rates, not quality. Prints a rate for each run, medians, and the ratio of the medians.

    pip install llama-cpp-python        # compiles for some minutes
    python3 tests/bench/peer.py --threads 2
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--shape", default="bitnet-2b-4t", help="a shape of `tercet model synth`")
    parser.add_argument("--head", default="f16", help="type of the head: f16, q8_0 or q6_k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, alternating")
    parser.add_argument("--dir", default="target/bench", help="where the models are kept, several GB")
    parser.add_argument("--peer", metavar="MODEL", help=argparse.SUPPRESS)
    return parser.parse_args()


def peer(args):
    """Measures llama.cpp in this process and prints what `tercet` measures as JSON."""
    from llama_cpp import Llama

    model = Llama(args.peer, n_threads=args.threads, n_threads_batch=args.threads, n_ctx=512,
                  n_batch=512, logits_all=False, verbose=False)
    prompt = [1000 + 7 * i for i in range(args.prompt)]
    # A first pass maps the file and warms the caches, as `tercet bench` does.
    model.eval(prompt)
    model.reset()
    begun = time.perf_counter()
    model.eval(prompt)
    prefilled = time.perf_counter()
    for _ in range(args.generate):
        model.eval([model.sample(temp=0.0)])
    decoded = time.perf_counter()
    rates = {"prefill": args.prompt / (prefilled - begun), "decode": args.generate / (decoded - prefilled)}
    print(json.dumps(rates))


def synth(args, kind):
    path = pathlib.Path(args.dir) / f"{args.shape}-{kind}-{args.head}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([args.tercet, "model", "synth", "--shape", args.shape, "--type", kind, "--head", args.head,
                        "--seed", "1", "--out", path], check=True)
    return str(path)


def measure(command):
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def main():
    args = arguments()
    if args.peer:
        return peer(args)
    sizes = ["--threads", str(args.threads), "--prompt", str(args.prompt), "--generate", str(args.generate)]
    ours = [args.tercet, "bench", "--model", synth(args, "i2_s"), *sizes, "--batch", "1", "--repeat", "1", "--json"]
    theirs = [sys.executable, os.path.abspath(__file__), "--peer", synth(args, "tq2_0"), *sizes]
    rates = {"tercet": [], "llama.cpp": []}
    for _ in range(args.runs):
        report = measure(ours)
        rates["tercet"].append({phase: report[f"{phase}_tokens_per_second"]["median"] for phase in ("prefill", "decode")})
        rates["llama.cpp"].append(measure(theirs))
    print(f"{args.shape}, {args.head} head, {args.threads} threads, prompt {args.prompt}, generate {args.generate}, "
          f"{args.runs} alternating runs, tokens/s")
    for phase in ("decode", "prefill"):
        medians = {}
        for name, runs in rates.items():
            values = [run[phase] for run in runs]
            medians[name] = statistics.median(values)
            print(f"{phase:8} {name:10} median {medians[name]:7.2f}  "
                  f"({min(values):.2f}-{max(values):.2f})  {' '.join(f'{v:.2f}' for v in values)}")
        print(f"{phase:8} ratio of medians {medians['tercet'] / medians['llama.cpp']:.2f}")


main()
