"""Memory that loading a checkpoint takes: at most 1.2 × its largest file, besides what the devices hold.

    python -m benchmarks.loading --dtype bfloat16 --shard 500MB

A checkpoint of Llama 3.2 1B's shape (1.24 billion parameters, bfloat16) is made of random numbers in a temporary
directory, and a fresh process loads it with `loading.load_model`.  It prints the bytes that the device holds at the
end, and the peak of the process's resident memory beyond these and beyond its size after the imports, as a share of the
largest file.  (On CPU, what the device holds is resident memory too.)
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from activedpo_jax.huggingface import loading

BOUND = 1.2
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, in the order of the layers."""
    d, f, kv = 2048, 8192, 512
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    every = {f"model.layers.{i}.{name}.weight": shape for i in range(16) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (128_256, d)} | every | {"model.norm.weight": (d,)}


def write_checkpoint(folder: pathlib.Path, shard_bytes: float) -> None:
    """Files of at most `shard_bytes`, or of one tensor, as `save_pretrained` would cut them."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes().items():
        count = 2 * math.prod(shape)
        if files[-1] and size + count > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += count
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in zip(names, files, strict=True):
        write_file(folder / name, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_file(file: pathlib.Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random numbers, written without holding it in memory, as its library would."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16).tobytes()
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, end, len(noise)):
            out.write(noise[: end - start])


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; `getrusage` would count the parent's peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def load(folder: pathlib.Path, dtype: str) -> dict[str, float]:
    """What this process needs to load the checkpoint; it should be a fresh one."""
    jax.devices()
    before = resident("VmRSS")
    start = time.perf_counter()
    _, params = loading.load_model(str(folder), dtype=np.dtype(dtype))
    seconds = time.perf_counter() - start
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    beside = resident("VmHWM") - before - (held if jax.default_backend() == "cpu" else 0)
    return {"largest": largest, "held": held, "beside": beside, "ratio": beside / largest, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="to load into")
    parser.add_argument("--shard", default="", help="largest size of a file, such as 500MB; empty: one file")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # in the process that loads
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(load(pathlib.Path(options.folder), options.dtype)))
        return
    shard_bytes = float(options.shard.removesuffix("MB")) * 1e6 if options.shard else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder), shard_bytes)
        command = [sys.executable, "-m", "benchmarks.loading", "--dtype", options.dtype, "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    print(f"bfloat16 → {options.dtype}, {'files of ' + options.shard if options.shard else 'one file'}")
    for name, text in (("largest", "largest file"), ("held", "device holds"), ("beside", "peak beside that")):
        print(f"  {text:<18}{figures[name] / 2**20:8.0f} MiB")
    print(f"  ratio {figures['ratio']:.2f}, bound {BOUND}; {figures['seconds']:.0f} s")
    if figures["ratio"] > BOUND:
        sys.exit("over the bound")


if __name__ == "__main__":
    main()
