#!/usr/bin/env python3
"""Log-probabilities of Tercet beside llama.cpp's, token by token, on the same texts.

Both are given the same ids (Tercet's) and asked for the log-probability of each after those before
it: Tercet by `Score`, llama.cpp (PyPI llama-cpp-python) by a full evaluation of the same GGUF file.
They quantise the inputs of ternary products differently (Tercet per token or per block of 64,
llama.cpp in blocks of 256 or 32 with scales in half or single precision), so that small differences
are expected; a wrong order of rows, scale or rotation gives large ones.

    pip install llama-cpp-python grpcio # compiles for some minutes
    python3 tests/bench/crosscheck.py
    python3 tests/bench/crosscheck.py model.gguf [--ours folder-or-gguf] [--limit 0.02]

With a model it prints mean and largest difference for each text and over all. Without, it makes
models of many shapes with `tercet model synth`, and puts both programs beside reference.py too,
which is a third implementation, in double precision, that can quantise as either of them:

- T-L: Tercet and llama.cpp, the figure that must not be above the limit;
- T-RT, L-RL: each and the reference that quantises as it does. At one layer these must be below
  0.001: neither is in error, and T-L is the distance of the two schemes. Rounding turns differences
  in the last bit into steps of a 127th, layer by layer, so that they grow with depth;
- RT-RL: the two schemes, by the reference alone;
- RT-RT': the reference and itself with activations changed by 1e-7 of themselves: no two programs
  can be expected to be closer than that;
- faults put into the reference, and how far from Tercet and llama.cpp they take it: far above the
  limit of T-L, or, if small, of T-RT.

Exits with 1 if a figure is above its limit.
"""
import argparse
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile
import time

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "In the beginning there was a small village by the sea, where people mended nets and told each "
    "other stories about ships that never came back. One morning a child found a bottle on the sand, "
    "and in the bottle there was a map of a coast that nobody knew.",
    "fn main() {\n    let total: u64 = (1..=10).filter(|n| n % 2 == 0).sum();\n    println!(\"{total}\");\n}\n",
    "1 2 3 4 5 6 7 8 9 10; 2 + 2 = 4, 3 * 7 = 21, 144 / 12 = 12. Zürich, naïve, 東京, emoji: 🙂.",
]

REFERENCE_LIMIT = 0.001
FAULTY_LAYERS = 2
SMALL = {"hidden": 512, "mlp": 1536, "heads": 8, "kv-heads": 4, "head-dim": 64, "vocab": 4096, "context": 512}
MIDDLE = {"hidden": 2048, "mlp": 8192, "heads": 16, "kv-heads": 4, "head-dim": 128, "vocab": 4096, "context": 512}
# Shape, type, layers, the other sizes, most tokens of a text, whether the reference is asked.
SYNTHETIC = [
    *(("llama3-8b", kind, layers, SMALL, 64, layers <= 4)
      for kind in ("tq1_0", "tq2_0") for layers in (1, 2, 4, 12, 32)),
    *(("llama3-8b", kind, 4, MIDDLE, 32, False) for kind in ("tq1_0", "tq2_0")),
    *(("llama3-8b", kind, 2, {"vocab": 4096}, 16, False) for kind in ("tq1_0", "tq2_0")),
    *(("bonsai-4b", "q2_0", layers, SMALL, 64, layers <= 4) for layers in (1, 2, 4, 12, 36)),
    ("bonsai-4b", "q2_0", 4, MIDDLE, 32, False),
    ("bonsai-4b", "q2_0", 2, {"vocab": 4096}, 16, False),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?",
                        help="the GGUF file for llama.cpp [default: made-up ones of many shapes]")
    parser.add_argument("--ours", type=pathlib.Path, help="the model for Tercet [default: the same file]")
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--text", type=pathlib.Path, action="append", default=[],
                        help="a file of text instead of the built-in ones; may be repeated")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--threads", type=int, default=1, help="more are slower on a busy machine")
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
            # A machine that is busy enough makes a worker look lost for a moment.
            for _ in range(20):
                try:
                    return fields(rpc(request, timeout=600, wait_for_ready=True))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    time.sleep(1)
            sys.exit(f"error: {method} is unavailable")

        answers = []
        for text in texts:
            ids = packed(fields(call("Tokenize", field(2, text.encode()))[1])[1])[:args.tokens]
            scored = call("Score", field(2, field(1, b"".join(varint(id) for id in ids))))[1]
            answers.append({"ids": ids, "logprobs": struct.unpack(f"<{len(scored) // 4}f", scored)})
        return answers
    finally:
        server.terminate()
        server.wait()


def theirs(args, sequences, **settings):
    """Returns the log-probabilities of each sequence of ids by llama.cpp."""
    from llama_cpp import Llama

    longest = max(len(ids) for ids in sequences)
    model = Llama(str(args.model), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True,
                  n_threads=args.threads, n_threads_batch=args.threads, verbose=False, **settings)
    scored = []
    for ids in sequences:
        model.reset()
        model.eval(ids)
        scored.append(logprobs(model.scores[:len(ids)], ids))
    return scored


def logprobs(logits, ids):
    """Returns the log-probability of each id but the first."""
    import numpy

    logits = numpy.asarray(logits, dtype=numpy.float64)
    top = logits.max(axis=1, keepdims=True)
    normal = top[:, 0] + numpy.log(numpy.exp(logits - top).sum(axis=1))
    return [float(logits[at, ids[at + 1]] - normal[at]) for at in range(len(ids) - 1)]


def distance(some, others):
    """Returns all differences between two programs' log-probabilities of the same sequences."""
    found = [abs(a - b) for one, other in zip(some, others) for a, b in zip(one, other)]
    if not all(math.isfinite(value) for value in found):
        sys.exit("error: a log-probability is not finite")
    return found


def referred(args, sequences, mine):
    """Returns the mean distances that the reference is part of, and the reference."""
    import numpy
    import reference

    model = reference.Model(args.model)
    as_tercet, as_peer = model.schemes()
    noise = numpy.random.default_rng(0)

    def run(scheme):
        return [logprobs(*pair) for pair in zip(model.logits(sequences, scheme), sequences)]

    # Both with caches in single precision, which Tercet always has.
    peer = theirs(args, sequences, type_k=0, type_v=0)
    like_tercet, like_peer = run(as_tercet), run(as_peer)
    moved = run(lambda x: as_tercet(x * (1 + 1e-7 * noise.standard_normal(x.shape))))
    pairs = [(mine, like_tercet), (peer, like_peer), (like_tercet, like_peer), (like_tercet, moved)]
    return [summary(distance(*pair))["mean"] for pair in pairs], model, run, peer


def faults(model, run, mine, peer):
    """Yields names of faults in a forward pass and how far they take it from Tercet and llama.cpp."""
    def figure():
        faulty = run(model.schemes()[0])
        return [summary(distance(faulty, scored))["mean"] for scored in (mine, peer)]

    yield "none", figure()
    for one, other in [("ffn_gate", "ffn_up"), ("attn_k", "attn_v")]:
        model.swap(one, other)
        yield f"{one} and {other} exchanged", figure()
        model.swap(one, other)
    model.is_interleaved ^= True
    yield "pairs of the rotation in the other order", figure()
    model.is_interleaved ^= True
    theta = model.theta
    for factor in (1.01, 0.1):
        model.theta = theta * factor
        yield f"rotary base times {factor}", figure()
    model.theta = theta


def synthetic(args):
    """Checks made-up models of many shapes, and returns whether all are within the limits."""
    print(f"{'shape':10}{'type':7}{'layers':>6}{'width':>7}{'tokens':>7}{'T-L':>9}{'largest':>9}"
          f"{'T-RT':>9}{'L-RL':>9}{'RT-RL':>9}{'RT-RT_':>9}".replace("_", "'"))
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for index, (shape, kind, layers, sizes, tokens, is_referred) in enumerate(SYNTHETIC):
            args.model, args.tokens = pathlib.Path(folder, f"{index}.gguf"), tokens
            flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
            subprocess.run([args.tercet, "model", "synth", "--shape", shape, "--type", kind, "--layers", str(layers),
                            *flags, "--head", "f32", "--seed", "1", "--out", args.model],
                           check=True, stdout=subprocess.DEVNULL)
            mine = ours(args, TEXTS)
            sequences = [text["ids"] for text in mine]
            mine = [text["logprobs"] for text in mine]
            total = summary(distance(mine, theirs(args, sequences)))
            passed &= total["mean"] <= args.limit
            width = sizes.get("hidden", {"llama3-8b": 4096, "bonsai-4b": 2560}[shape])
            print(f"{shape:10}{kind:7}{layers:6}{width:7}{total['tokens']:7}{total['mean']:9.5f}{total['max']:9.5f}",
                  end="", flush=True)
            found = []
            if is_referred:
                means, model, run, peer = referred(args, sequences, mine)
                print("".join(f"{mean:9.5f}" for mean in means), end="")
                passed &= layers > 1 or max(means[:2]) <= REFERENCE_LIMIT
                found = faults(model, run, mine, peer) if layers == FAULTY_LAYERS else []
            print(flush=True)
            for name, figures in found:
                print(f"    {name:45} from T {figures[0]:.5f}, from L {figures[1]:.5f}", flush=True)
            args.model.unlink()
    return passed


def summary(differences):
    return {"tokens": len(differences), "mean": sum(differences) / len(differences), "max": max(differences)}


def main():
    args = arguments()
    if args.model is None:
        return 0 if synthetic(args) else 1
    texts = [path.read_text() for path in args.text] or TEXTS
    mine = ours(args, texts)
    scored = theirs(args, [text["ids"] for text in mine])
    every = [distance([text["logprobs"]], [peer]) for text, peer in zip(mine, scored)]
    rows = [summary(differences) for differences in every]
    total = summary(sum(every, []))
    if args.json:
        print(json.dumps({"model": str(args.model), "texts": rows, "all": total}))
    else:
        for row in rows + [total]:
            print(f"{row['tokens']:6} tokens: mean difference {row['mean']:.6f}, largest {row['max']:.6f}")
    return 1 if total["mean"] > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
