"""A forward pass in double precision over a GGUF file, with any quantisation of the activations.

It shares no code with Tercet or llama.cpp. Where two programs disagree it tells which of them is
wrong, or that neither is: each must agree with the pass that quantises activations as it does.
"""
import mmap
import struct

import numpy

TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q8_0, BF16, TQ1_0, TQ2_0, Q2_0 = 0, 1, 8, 30, 34, 35, 42
# Weights and bytes of a block.
BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q8_0: (32, 34), TQ1_0: (256, 54), TQ2_0: (256, 66), Q2_0: (64, 18)}


def decode(kind, data):
    """Returns the weights of a run of blocks."""
    if kind == F32:
        return data.view("<f4").astype(numpy.float64)
    if kind == F16:
        return data.view("<f2").astype(numpy.float64)
    if kind == BF16:
        return (data.view("<u2").astype("<u4") << 16).view("<f4").astype(numpy.float64)
    blocks = data.reshape(-1, BLOCKS[kind][1])

    def scale(at):
        return blocks[:, at:at + 2].copy().view("<f2").astype(numpy.float64)

    if kind == Q8_0:
        return (scale(0) * blocks[:, 2:].view("i1")).ravel()
    if kind == Q2_0:
        codes = blocks[:, 2:, None] >> numpy.array([0, 2, 4, 6], "u1") & 3
        return (scale(0) * (codes.reshape(len(blocks), 64) - 1.0)).ravel()
    if kind == TQ2_0:
        codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> numpy.array([0, 2, 4, 6], "u1")[:, None] & 3
        return (scale(64) * (codes.reshape(len(blocks), 256) - 1.0)).ravel()
    parts = []
    for first, last, digits in [(0, 32, 5), (32, 48, 5), (48, 52, 4)]:
        powers = numpy.array([1, 3, 9, 27, 81][:digits], "u1")[:, None]
        shifted = (blocks[:, None, first:last] * powers).astype("u2")
        parts.append((shifted * 3 >> 8).reshape(len(blocks), -1))
    return (scale(52) * (numpy.concatenate(parts, axis=1) - 1.0)).ravel()


class Gguf:
    """A GGUF file: its metadata and tensors."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 4
        version, tensors, entries = self.read("<IQQ")
        assert self.bytes[:4] == b"GGUF" and version == 3, f"not GGUF version 3: {path}"
        self.metadata = {}
        for _ in range(entries):
            name = self.string()
            self.metadata[name] = self.value(self.read("<I")[0])
        self.tensors = {}
        for _ in range(tensors):
            name = self.string()
            shape = self.read(f"<{self.read('<I')[0]}Q")
            self.tensors[name] = (shape[::-1], *self.read("<IQ"))
        align = self.metadata.get("general.alignment", 32)
        self.data = -(-self.at // align) * align

    def read(self, layout):
        found = struct.unpack_from(layout, self.bytes, self.at)
        self.at += struct.calcsize(layout)
        return found

    def string(self):
        length, = self.read("<Q")
        self.at += length
        return self.bytes[self.at - length:self.at].decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.read("<IQ")
            if kind in TYPES:
                return self.read(f"<{length}{TYPES[kind]}")
            return [self.value(kind) for _ in range(length)]
        return self.read("<" + TYPES[kind])[0]

    def tensor(self, name, rows=None):
        """Returns a tensor, or some of its rows, as doubles."""
        shape, kind, offset = self.tensors[name]
        if kind not in BLOCKS:
            raise SystemExit(f"error: {name} has type {kind}, the reference knows {sorted(BLOCKS)}")
        weights, size = BLOCKS[kind]
        data = numpy.frombuffer(self.bytes, "u1", int(numpy.prod(shape)) // weights * size, self.data + offset)
        if len(shape) == 1:
            return decode(kind, data)
        data = data.reshape(shape[0], -1)
        if rows is not None:
            data = data[rows]
        return decode(kind, numpy.ascontiguousarray(data).ravel()).reshape(len(data), shape[1])


def blocks_of(x, width):
    """Returns single-precision activations in blocks: both programs round those, and a value near
    the middle between two steps must fall to the same side."""
    return x.astype("f4").reshape(*x.shape[:-1], -1, width)


def largest_of(blocks):
    return abs(blocks).max(axis=-1, keepdims=True)


def whole(values, scale, shape):
    return (values.astype("f8") * scale).reshape(shape)


def per_token(x, width=None):
    """Tercet's scheme for models trained with it: one scale for a row."""
    blocks = blocks_of(x, width or x.shape[-1])
    largest = numpy.maximum(largest_of(blocks), numpy.float32(1e-5))
    return whole(numpy.rint(blocks * (127 / largest)).clip(-127, 127), largest / 127, x.shape)


def per_block(x):
    """Tercet's scheme for weights with a scale for each block of 64."""
    return per_token(x, 64)


def q8_k(x):
    """llama.cpp's scheme beside TQ1_0 and TQ2_0: one scale for each block of 256."""
    blocks = blocks_of(x, 256)
    at = abs(blocks).argmax(axis=-1, keepdims=True)
    inverse = -127 / numpy.take_along_axis(blocks, at, axis=-1)
    return whole(numpy.minimum(numpy.rint(blocks * inverse), 127), 1 / inverse, x.shape)


def q8_0(x):
    """llama.cpp's scheme beside Q2_0: one scale in half precision for each block of 32."""
    blocks = blocks_of(x, 32)
    largest = largest_of(blocks)
    return whole(numpy.rint(blocks * (127 / largest)), (largest / 127).astype("f2"), x.shape)


class Model:
    """Llama, Qwen 3 or BitNet (the one of llama.cpp, with SiLU)."""

    def __init__(self, path):
        self.file = Gguf(path)
        self.architecture = self.file.metadata["general.architecture"]
        if self.architecture not in ("llama", "qwen3", "bitnet"):
            raise SystemExit(f"error: the reference knows llama, qwen3 and bitnet, not {self.architecture}")
        setting = lambda name: self.file.metadata[f"{self.architecture}.{name}"]
        self.layers = setting("block_count")
        self.heads = setting("attention.head_count")
        self.kv_heads = setting("attention.head_count_kv")
        self.eps = setting("attention.layer_norm_rms_epsilon")
        self.theta = setting("rope.freq_base")
        q_rows = self.file.tensors["blk.0.attn_q.weight"][0][0]
        self.head_dim = q_rows // self.heads
        self.is_interleaved = self.architecture == "llama"
        self.is_blocks = self.file.tensors["blk.0.attn_q.weight"][1] == Q2_0

    def schemes(self):
        """Returns the schemes of Tercet and llama.cpp for this file's weights."""
        return (per_block, q8_0) if self.is_blocks else (per_token, q8_k)

    def swap(self, one, other):
        """Exchanges two matrices of every layer: what a mistake in a loader would do."""
        tensors = self.file.tensors
        for layer in range(self.layers):
            names = [f"blk.{layer}.{name}.weight" for name in (one, other)]
            tensors[names[0]], tensors[names[1]] = (tensors[name] for name in reversed(names))

    def norm(self, x, name):
        if name not in self.file.tensors:
            return x
        return x / numpy.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * self.file.tensor(name)

    def rotate(self, x):
        """Turns heads (position, head, element) by their positions: neighbours in `llama`, halves in others."""
        angles = numpy.arange(len(x))[:, None] * self.theta ** (-numpy.arange(0, self.head_dim, 2) / self.head_dim)
        turn = numpy.exp(1j * angles)[:, None, :]
        if self.is_interleaved:
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return numpy.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
        half = self.head_dim // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return numpy.concatenate([turned.real, turned.imag], axis=-1)

    def attend(self, q, k, v):
        group = self.heads // self.kv_heads
        out = numpy.empty_like(q)
        hidden = numpy.triu(numpy.full((len(q), len(q)), -numpy.inf), 1)
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // group].T / numpy.sqrt(self.head_dim) + hidden
            weights = numpy.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
        return out.reshape(len(q), -1)

    def logits(self, sequences, quantise):
        """Returns the logits of each sequence of ids, activations before ternary products quantised."""
        tensor = self.file.tensor
        ends = numpy.cumsum([len(ids) for ids in sequences])[:-1]
        x = tensor("token_embd.weight", numpy.concatenate(sequences))
        for layer in range(self.layers):
            part = f"blk.{layer}.".__add__
            weight = lambda name: tensor(part(name + ".weight")).T
            normed = quantise(self.norm(x, part("attn_norm.weight")))
            q, k, v = (normed @ weight("attn_" + name) for name in "qkv")
            q, k, v = (states.reshape(len(x), -1, self.head_dim) for states in (q, k, v))
            q, k = self.norm(q, part("attn_q_norm.weight")), self.norm(k, part("attn_k_norm.weight"))
            attended = numpy.concatenate([
                self.attend(self.rotate(q), self.rotate(k), v)
                for q, k, v in zip(*(numpy.split(states, ends) for states in (q, k, v)))])
            attended = quantise(self.norm(attended, part("attn_sub_norm.weight")))
            x = x + attended @ weight("attn_output")
            normed = quantise(self.norm(x, part("ffn_norm.weight")))
            gate, up = normed @ weight("ffn_gate"), normed @ weight("ffn_up")
            gated = quantise(self.norm(gate / (1 + numpy.exp(-gate)) * up, part("ffn_sub_norm.weight")))
            x = x + gated @ weight("ffn_down")
        head = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        return numpy.split(self.norm(x, "output_norm.weight") @ tensor(head).T, ends)
