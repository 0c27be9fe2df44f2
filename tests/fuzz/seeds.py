#!/usr/bin/env python3
"""Writes the small, good inputs of tests/fuzz/corpus that the fuzzer starts from.

    python3 tests/fuzz/seeds.py

Every run writes the same bytes. The other files of the corpus are finds.
"""

import json
import random
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
draw = random.Random(1)


def save(target: str, name: str, data: bytes | str) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


# --- tokenizers -------------------------------------------------------------------------------

TOKENS = ["<s>", "</s>", "Ġ", "a", "b", "c", "e", "h", "l", "o", "he", "ll", "hell", "hello", "1", "!"]
MERGES = ["h e", "l l", "he ll", "hell o"]


def added(identifier: int, content: str) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": identifier, "content": content, "special": True, **flags}


def tokenizer(**parts) -> dict:
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    return whole | parts


BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": {token: at for at, token in enumerate(TOKENS)},
    "merges": MERGES,
}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
START = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "h", "e", "he", "▁he"]
SPM = BPE | {
    "unk_token": "<unk>",
    "fuse_unk": True,
    "byte_fallback": True,
    "vocab": {token: at for at, token in enumerate(PIECES)},
    "merges": ["h e", "▁ he"],
}
JSONS = {
    "byte-level": tokenizer(model=BPE, pre_tokenizer=LEVEL, decoder=LEVEL),
    "llama3": tokenizer(
        model=BPE | {"ignore_merges": True},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [SPLIT | {"pattern": {"Regex": LLAMA3}}, LEVEL],
        },
        post_processor={"type": "Sequence", "processors": [LEVEL, START]},
        decoder=LEVEL,
        normalizer={"type": "NFC"},
    ),
    "sentencepiece": tokenizer(
        model=SPM,
        added_tokens=[added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    ),
    "unigram": tokenizer(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁", -2.0]]},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    ),
    "wordpiece": tokenizer(
        model={
            "type": "WordPiece",
            "unk_token": "<s>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: at for at, token in enumerate(TOKENS)},
        },
        normalizer={"type": "BertNormalizer", "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
    ),
    "steps": tokenizer(
        model=BPE,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "Punctuation", "behavior": "Contiguous"},
                {"type": "WhitespaceSplit"},
                LEVEL,
            ],
        },
        truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={
            "strategy": {"Fixed": 4},
            "direction": "Right",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<s>",
            "pad_to_multiple_of": None,
        },
        decoder=LEVEL,
    ),
}
# Finds: what these put around a text is not there.
JSONS["unknown-special"] = JSONS["byte-level"] | {"post_processor": START | {"special_tokens": {}}}
SECOND = START | {"single": START["pair"]}
JSONS["second-sequence"] = JSONS["byte-level"] | {
    "post_processor": {"type": "Sequence", "processors": [LEVEL, SECOND]}
}
for name, value in JSONS.items():
    save("tokenizer", name, json.dumps(value, ensure_ascii=False))

# --- folders ----------------------------------------------------------------------------------

HIDDEN, HEADS, HEAD, VOCAB = 64, 2, 32, 16
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [1],
}
PACKED = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
save("config", "llama", json.dumps({"architectures": ["LlamaForCausalLM"]} | CONFIG | PACKED))
CONFIGS = {
    "groups": {"architectures": ["LlamaForCausalLM"]} | CONFIG,
    "bitnet": {"architectures": ["BitNetForCausalLM"], "hidden_act": "relu2"}
    | CONFIG
    | {"quantization_config": {"quant_method": "bitnet"}},
    "qwen3-yarn": {"architectures": ["Qwen3ForCausalLM"]}
    | CONFIG
    | PACKED
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3-rope": {"architectures": ["LlamaForCausalLM"]}
    | CONFIG
    | PACKED
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "generation": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": [1, 2],
    },
    "tokenizer-settings": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
    },
}
for name, value in CONFIGS.items():
    save("config", name, json.dumps(value))


def f16(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def ternary() -> int:
    return draw.choice([0, 1, 2])


def fours(count: int) -> bytes:
    return bytes(sum(ternary() << 2 * at for at in range(4)) for _ in range(count))


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


MATRICES = {
    "self_attn.q_proj": HEADS * HEAD,
    "self_attn.k_proj": HEAD,
    "self_attn.v_proj": HEAD,
    "self_attn.o_proj": HIDDEN,
    "mlp.gate_proj": HIDDEN,
    "mlp.up_proj": HIDDEN,
    "mlp.down_proj": HIDDEN,
}
NORMS = {
    "input_layernorm": HIDDEN,
    "post_attention_layernorm": HIDDEN,
    "self_attn.attn_sub_norm": HEADS * HEAD,
    "mlp.ffn_sub_norm": HIDDEN,
    "self_attn.inner_attn_ln": HEADS * HEAD,
    "mlp.ffn_layernorm": HIDDEN,
    "self_attn.q_norm": HEAD,
    "self_attn.k_norm": HEAD,
}


def weights(matrix) -> bytes:
    def dense(rows: int, cols: int):
        return ("F16", [rows, cols], f16([draw.gauss(0, 1) for _ in range(rows * cols)]))

    def ones(length: int):
        return ("F16", [length], f16([1.0] * length))

    tensors = {"model.embed_tokens.weight": dense(VOCAB, HIDDEN), "model.norm.weight": ones(HIDDEN)}
    for name, length in NORMS.items():
        tensors[f"model.layers.0.{name}.weight"] = ones(length)
    for name, rows in MATRICES.items():
        tensors |= matrix(f"model.layers.0.{name}.weight", rows)
    return safetensors(tensors)


def packed(name: str, rows: int):
    return {
        name: ("U8", [rows // 4, HIDDEN], fours(rows // 4 * HIDDEN)),
        f"{name}_scale": ("F16", [1], f16([0.5])),
    }


def groups(name: str, rows: int):
    values = [0.25 * (ternary() - 1) for _ in range(rows * HIDDEN)]
    return {name: ("F16", [rows, HIDDEN], f16(values))}


save("safetensors", "packed", weights(packed))
save("safetensors", "groups", weights(groups))

# --- GGUF -------------------------------------------------------------------------------------

F32, F16, Q4_0, Q8_0, Q6_K, TQ1_0, TQ2_0, I2_S, Q2_0 = 0, 1, 2, 8, 14, 34, 35, 36, 42


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def scalar(value) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, bytes([value])
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, text(value)
    raise TypeError(value)


def entry(key: str, value) -> bytes:
    if isinstance(value, list):
        items = [scalar(item) for item in value]
        body = struct.pack("<IQ", items[0][0], len(items)) + b"".join(item for _, item in items)
        return text(key) + struct.pack("<I", 9) + body
    kind, body = scalar(value)
    return text(key) + struct.pack("<I", kind) + body


def fives() -> int:
    value = 0
    for _ in range(5):
        value = value * 3 + ternary()
    return (value * 256 + 242) // 243


def content(kind: int, elements: int) -> bytes:
    half = f16([0.125])
    match kind:
        case 0:
            return struct.pack(f"<{elements}f", *[1.0] * elements)
        case 1:
            return f16([draw.gauss(0, 1) for _ in range(elements)])
        case 2:
            return b"".join(half + draw.randbytes(16) for _ in range(elements // 32))
        case 8:
            return b"".join(half + draw.randbytes(32) for _ in range(elements // 32))
        case 14:
            return b"".join(draw.randbytes(208) + half for _ in range(elements // 256))
        case 34:
            blocks = (bytes(fives() for _ in range(48)) + bytes(4) + half for _ in range(elements // 256))
            return b"".join(blocks)
        case 35:
            return b"".join(fours(64) + half for _ in range(elements // 256))
        case 36:
            return fours(elements // 4) + struct.pack("<f", 0.5) + bytes(28)
        case 42:
            return b"".join(half + fours(16) for _ in range(elements // 64))
    raise ValueError(kind)


def gguf(arch: str, kind: int, hidden: int, head: int, layers: int, embed: int, **extra) -> bytes:
    width = hidden
    sizes = {
        "embedding_length": hidden,
        "feed_forward_length": hidden,
        "block_count": layers,
        "attention.head_count": width // head,
        "attention.head_count_kv": 1,
        "attention.key_length": head,
        "context_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    metadata = {"general.architecture": arch, "general.name": "seed"}
    metadata |= {f"{arch}.{key}": value for key, value in sizes.items()}
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
    }
    metadata |= extra
    tensors = [("token_embd.weight", [hidden, len(TOKENS)], embed), ("output_norm.weight", [hidden], F32)]
    for layer in range(layers):
        norms = {"attn_norm": hidden, "ffn_norm": hidden}
        if arch.startswith("bitnet"):
            norms |= {"attn_sub_norm": width, "ffn_sub_norm": hidden}
        if arch == "qwen3":
            norms |= {"attn_q_norm": head, "attn_k_norm": head}
        for name, length in norms.items():
            tensors.append((f"blk.{layer}.{name}.weight", [length], F32))
        rows = {"attn_q": width, "attn_k": head, "attn_v": head, "attn_output": hidden}
        rows |= {"ffn_gate": hidden, "ffn_up": hidden, "ffn_down": hidden}
        for name, length in rows.items():
            tensors.append((f"blk.{layer}.{name}.weight", [hidden, length], kind))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(entry(key, value) for key, value in metadata.items())
    data = b""
    for name, shape, storage in tensors:
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", storage, len(data))
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        body = content(storage, elements)
        data += body + bytes(-len(body) % 32)
    return header + bytes(-len(header) % 32) + data


save("gguf", "bitnet-i2_s", gguf("bitnet-b1.58", I2_S, 128, 32, 2, F16))
save("gguf", "qwen3-q2_0", gguf("qwen3", Q2_0, 64, 16, 2, Q8_0))
save("gguf", "llama-tq2_0", gguf("llama", TQ2_0, 256, 16, 1, Q6_K))
save("gguf", "bitnet-tq1_0", gguf("bitnet", TQ1_0, 256, 32, 1, Q4_0))
save(
    "gguf",
    "llama-spm",
    gguf(
        "llama",
        Q2_0,
        64,
        16,
        1,
        F32,
        **{
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [float(-at) for at in range(len(TOKENS))],
            "tokenizer.ggml.add_space_prefix": True,
            "general.sampling.temp": 0.5,
            "general.alignment": 32,
        },
    ),
)
save("gguf", "no-tensors", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("general.architecture", "llama"))
nested = struct.pack("<IQ", 9, 1) * 8 + struct.pack("<IQ", 0, 0)
save("gguf", "nested", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 9) + nested)

# --- templates --------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    ),
    "bitnet": (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{% set role = message['role'] %}"
        "{{ role | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    ),
    "macro": (
        "{%- macro show(m, n=1) -%}{{ m.role|upper }}{{ n }}{%- endmacro -%}{% for m in messages %}"
        "{{ show(m, n=loop.index) }}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(found=false, last='') %}{% for m in messages[::-1] %}{% if m.role == 'user' %}"
        "{% set ns.found = true %}{% set ns.last = m.content %}{% endif %}{% endfor %}{{ ns.last.split('x')[-1].strip() }}"
    ),
    "functions": (
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}{% if messages|length > 99 %}"
        "{{ raise_exception('too many') }}{% endif %}{{ 'a' ~ 1 ~ none }}{{ range(3)|list }}"
    ),
    "filters": "{{ messages|map(attribute='role')|join(', ')|replace('a','b')|title }}{{ messages|selectattr('role','equalto','user')|list|length }}",
    "refuses": "{{ raise_exception('Only user and assistant roles are supported!\\n' * 3) }}",
}
for name, value in TEMPLATES.items():
    save("template", name, value)

# --- grammars ---------------------------------------------------------------------------------

SCHEMA, REGEX, CHOICE, OBJECT = range(4)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", 1, None, True]},
        "next": {"$ref": "#/$defs/next"},
        "tags": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"const": 1.5}]}, "maxItems": 3},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"next": {"oneOf": [{"type": "null"}, {"$ref": "#"}]}},
}
GRAMMARS = {
    "schema": (SCHEMA, json.dumps(PERSON)),
    "any": (SCHEMA, "{}"),
    "all-of": (SCHEMA, '{"allOf":[{"type":"number","multipleOf":3},{"exclusiveMinimum":-5}],"not":{"const":0}}'),
    "patterns": (SCHEMA, '{"type":"object","patternProperties":{"^x":{"type":"boolean"}},"minProperties":1}'),
    "regex": (REGEX, r"(yes|no)( [0-9]{2,4})*[^\s\w]?\p{Greek}{1,2}"),
    "choice": (CHOICE, 'red\n"green"\nblue\\\nhell'),
    "object": (OBJECT, ""),
}
for name, (kind, value) in GRAMMARS.items():
    save("grammar", name, bytes([kind, 7]) + value.encode())

# --- requests ---------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value) -> bytes:
    match value:
        case int():
            return varint(number << 3) + varint(value)
        case float():
            return varint(number << 3 | 5) + struct.pack("<f", value)
        case str():
            value = value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + value


GENERATE, SCORE, TOKENIZE, DETOKENIZE, GET_MODEL = range(5)
IDS = field(1, b"\x05\x07\xac\x02")
USER = field(1, field(1, "user") + field(2, "Hello"))
SAMPLING = field(5, field(1, 0.7) + field(2, 40) + field(3, 0.9) + field(4, 7))
PENALTIES = field(
    5, field(5, 0.05) + field(6, 1.1) + field(7, 0.5) + field(8, -0.5) + field(9, field(1, 7) + field(2, 2.5))
)
VARIABLES = field(2, field(1, "enable_thinking") + field(2, "false")) + field(
    2, field(1, "tools") + field(2, '[{"name": "a"}]')
)
STOP = field(6, field(1, 16) + field(2, "\n\n") + field(2, "</s>") + field(3, 1))
REQUESTS = {
    "prompt": (GENERATE, field(1, "m") + field(2, "Once upon a time") + SAMPLING + STOP),
    "tokens": (GENERATE, field(3, IDS) + field(7, field(1, 7) + field(2, b"\x01\x02"))),
    "chat": (GENERATE, field(4, USER * 2) + SAMPLING),
    "wrong": (GENERATE, field(4, field(1, b"") * 3) + field(5, field(1, -1.0) + field(3, 2.0)) + field(6, field(1, 0))),
    "score": (SCORE, field(2, IDS)),
    "tokenize": (TOKENIZE, field(1, "m") + field(2, "text")),
    "tokenize-chat": (TOKENIZE, field(3, USER + VARIABLES) + field(4, 1)),
    "chat-variables": (GENERATE, field(4, USER + VARIABLES) + SAMPLING),
    "everything": (
        GENERATE,
        field(2, "Once") + PENALTIES + field(6, field(4, b"\x02\x03")) + field(8, field(1, 20)) + field(9, 1) + field(10, "tenant"),
    ),
    "schema": (GENERATE, field(2, "Once") + field(11, field(1, '{"type": "object"}'))),
    "choice": (GENERATE, field(2, "Once") + field(11, field(4, field(1, "yes") + field(1, "no")))),
    "detokenize": (DETOKENIZE, field(1, "m") + field(2, IDS) + field(3, 1)),
    "get-model": (GET_MODEL, field(1, "m")),
    # A violation for each of thousands of messages.
    "many-wrong": (GENERATE, field(4, field(1, b"") * 4096)),
}
for name, (kind, value) in REQUESTS.items():
    save("request", name, bytes([kind]) + value)
