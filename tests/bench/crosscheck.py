#!/usr/bin/env python3
"""Log-probabilities of Tercet beside llama.cpp's, token by token, on the same texts.

Both are given the same ids (Tercet's) and asked for the log-probability of each after those before
it: Tercet by `Score`, llama.cpp (PyPI llama-cpp-python) by a full evaluation of the same GGUF file.
They quantise the inputs of ternary products differently (Tercet per token or per block of 64,
llama.cpp in blocks of 256 or 32 with scales in half or single precision), so that small differences
are expected; a wrong order of rows, scale or rotation gives large ones.

    pip install llama-cpp-python grpcio # compiles for some minutes
    python3 tests/bench/crosscheck.py model.gguf [--ours folder-or-gguf] [--limit 0.02]

Prints mean and largest difference for each text and over all; exits with 1 if the mean is above
the limit.
"""
import argparse
import json
import math
import pathlib
import struct
import subprocess
import sys

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "In the beginning there was a small village by the sea, where people mended nets and told each "
    "other stories about ships that never came back. One morning a child found a bottle on the sand, "
    "and in the bottle there was a map of a coast that nobody knew.",
    "fn main() {\n    let total: u64 = (1..=10).filter(|n| n % 2 == 0).sum();\n    println!(\"{total}\");\n}\n",
    "1 2 3 4 5 6 7 8 9 10; 2 + 2 = 4, 3 * 7 = 21, 144 / 12 = 12. Zürich, naïve, 東京, emoji: 🙂.",
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="the GGUF file for llama.cpp")
    parser.add_argument("--ours", type=pathlib.Path, help="the model for Tercet [default: the same file]")
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--text", type=pathlib.Path, action="append", default=[],
                        help="a file of text instead of the built-in ones; may be repeated")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.02, help="largest mean difference that passes")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser.parse_args()


def varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes(encoded + bytes([number]))


def field(number, payload):
    """Encodes a length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def fields(message):
    """Decodes a message of length-delimited fields."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    found = {}
    while at < len(message):
        key = number()
        if key & 7 != 2:
            sys.exit(f"error: unexpected wire type in the answer: {key}")
        length = number()
        found[key >> 3] = message[at:at + length]
        at += length
    return found


def packed(message):
    """Decodes packed numbers."""
    numbers, value, shift = [], 0, 0
    for byte in message:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    return numbers


def ours(args, texts):
    """Returns ids and log-probabilities of each text by Tercet, asked over gRPC."""
    import grpc

    command = [args.tercet, "serve", "--model", str(args.ours or args.model), "--listen", "127.0.0.1:0",
               "--threads", str(args.threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if line.startswith("listening on "):
                break
        else:
            sys.exit("error: tercet ended: " + "".join(said))
        channel = grpc.insecure_channel(line.removeprefix("listening on ").strip())

        def call(method, request):
            rpc = channel.unary_unary("/tercet.v1.Inference/" + method, lambda message: message,
                                      lambda message: message)
            return fields(rpc(request, timeout=600, wait_for_ready=True))

        answers = []
        for text in texts:
            ids = packed(fields(call("Tokenize", field(2, text.encode()))[1])[1])[:args.tokens]
            scored = call("Score", field(2, field(1, b"".join(varint(id) for id in ids))))[1]
            answers.append({"ids": ids, "logprobs": struct.unpack(f"<{len(scored) // 4}f", scored)})
        return answers
    finally:
        server.terminate()
        server.wait()


def theirs(args, sequences):
    """Returns the log-probabilities of each sequence of ids by llama.cpp."""
    import numpy
    from llama_cpp import Llama

    longest = max(len(ids) for ids in sequences)
    model = Llama(str(args.model), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True,
                  n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
    scored = []
    for ids in sequences:
        model.reset()
        model.eval(ids)
        logits = numpy.asarray(model.scores[:len(ids)], dtype=numpy.float64)
        top = logits.max(axis=1, keepdims=True)
        normal = top[:, 0] + numpy.log(numpy.exp(logits - top).sum(axis=1))
        scored.append([float(logits[at, ids[at + 1]] - normal[at]) for at in range(len(ids) - 1)])
    return scored


def summary(differences):
    return {"tokens": len(differences), "mean": sum(differences) / len(differences), "max": max(differences)}


def main():
    args = arguments()
    texts = [path.read_text() for path in args.text] or TEXTS
    mine = ours(args, texts)
    scored = theirs(args, [text["ids"] for text in mine])
    rows, every = [], []
    for text, peer in zip(mine, scored):
        differences = [abs(a - b) for a, b in zip(text["logprobs"], peer)]
        if not all(math.isfinite(value) for value in differences):
            sys.exit("error: a log-probability is not finite")
        rows.append(summary(differences))
        every += differences
    total = summary(every)
    if args.json:
        print(json.dumps({"model": str(args.model), "texts": rows, "all": total}))
    else:
        for row in rows + [total]:
            print(f"{row['tokens']:6} tokens: mean difference {row['mean']:.6f}, largest {row['max']:.6f}")
    return 1 if total["mean"] > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
