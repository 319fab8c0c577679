"""Writes an OPT model that is a folder of Hugging Face's files as GGUF, with the tensor names of gguf-py.

    python benchmarks/convert_opt.py FOLDER OUT.gguf --type Q8_0

Its weights are rounded to nearest, as the gguf package does it. Needs the packages gguf and safetensors.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

TYPES = ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")

_GLOBAL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_positions.weight": "position_embd.weight",
    "final_layer_norm.weight": "output_norm.weight",
    "final_layer_norm.bias": "output_norm.bias",
}
_LAYER_NAMES = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
_TIED = "lm_head.weight"  # may stand there once more
# a model that has another value computes something else
_EXPECTED = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "layer_norm_elementwise_affine": True,
}
_NORMAL, _CONTROL = 1, 3


def convert(folder: Path, out: Path, type_name: str) -> None:
    """type_name: one of TYPES, of every matrix but the positions, which stay F16. Raises SystemExit for other OPTs."""
    config = json.loads((folder / "config.json").read_text())
    for key, expected in _EXPECTED.items():
        if config.get(key, expected) != expected:
            raise SystemExit(f"{folder}: {key} is {config[key]!r}; only {expected!r} is known here")
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise SystemExit(f"{folder}: projected embeddings are not known here")
    writer = gguf.GGUFWriter(out, "opt")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["ffn_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(1e-5)  # torch's, which no config of OPT changes
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type_name}" if type_name != "F32" else "ALL_F32"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for name, values in _tensors(folder, int(config["num_hidden_layers"])):
        kind = "F16" if name == "position_embd.weight" else type_name if values.ndim == 2 else "F32"
        quant_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, quant_type), raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path, num_layers: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    names = dict(_GLOBAL_NAMES)
    for layer in range(num_layers):
        for part, stored in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{part}.{kind}"] = f"blk.{layer}.{stored}.{kind}"
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        here = {key.removeprefix("model.").removeprefix("decoder."): key for key in file.keys()}  # noqa: SIM118
        if unknown := here.keys() - names.keys() - {_TIED}:
            raise SystemExit(f"{folder}: tensors that are not known here: {', '.join(sorted(unknown))}")
        for name, stored in names.items():
            yield stored, file.get_tensor(here[name]).astype(np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, described: dict[str, Any], config: dict[str, Any]) -> None:
    model = described["model"]
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in described["added_tokens"]}}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(config["vocab_size"])):
        raise SystemExit("the tokenizer does not have each id of the vocabulary once")
    single = (described.get("post_processor") or {}).get("single", ())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(any("SpecialToken" in part for part in single))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q8_0")
    options = parser.parse_args(arguments)
    convert(options.folder, options.out, options.type)


if __name__ == "__main__":
    main()
