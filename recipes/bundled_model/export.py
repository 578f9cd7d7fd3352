"""Write a trained model in DeepSeek's FP8 checkpoint format, and read such checkpoints back into the training model.

    python -m recipes.bundled_model.export --weights RUN_DIR --out tilery/bundled/tilery-books-26m

RUN_DIR holds `weights-*.safetensors` (BF16, checkpoint keys) as written by `train.py`; `--random` needs none.

Format: an F8 tensor `<key>` (e4m3) has a twin `<key>_scale_inv`, F32, [ceil(out / 128), ceil(in / 128)], and the real
weight is fp8 * scale_inv, where scale_inv = amax(block) / 448. Embeddings, head, norms, router, `weights_proj` and
`eh_proj` stay BF16; `k_norm` and `e_score_correction_bias` are F32. The MTP layer's copies of embedding and head are
not stored: they are the main model's.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.bundled_model.model import DeepSeekV32, ModelConfig

BLOCK = 128
FP8_MAX = 448.0
FP8_KEY = re.compile(
    r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|indexer\.wq_b|indexer\.wk|gate_proj|up_proj|down_proj)\.weight$"
)
F32_KEY = re.compile(r"\.(k_norm\.weight|k_norm\.bias|e_score_correction_bias)$")
STACKED_KEY = re.compile(r"^(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)$")
EXPERT_KEY = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [BLOCK, BLOCK],
}
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
}
LICENSE_TEXT = """\
The files in this folder (model weights, tokenizer, configuration) are licensed under the Apache License, Version 2.0.
You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, they are distributed on an "AS IS" BASIS, WITHOUT WARRANTIES
OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language governing permissions
and limitations under the License.

The model was trained from scratch on public-domain books; no text of the corpus is part of this folder.
"""


def checkpoint_tensors(model: DeepSeekV32) -> dict[str, Tensor]:
    """The model's weights under checkpoint keys: BF16, or F32 where the format says so; experts one by one."""
    tensors = {}
    for key, value in model.state_dict().items():
        stacked = STACKED_KEY.match(key)
        dtype = torch.float32 if F32_KEY.search(key) else torch.bfloat16
        value = value.detach().to("cpu", dtype)
        if stacked:
            for expert, weight in enumerate(value):
                tensors[f"{stacked[1]}.{expert}.{stacked[2]}.weight"] = weight.clone()
        else:
            tensors[key] = value.contiguous().clone()
    return tensors


def load_tensors(model: DeepSeekV32, tensors: dict[str, Tensor]) -> DeepSeekV32:
    """Inverse of `checkpoint_tensors`; F8 tensors are dequantised. Raises KeyError on a missing or unknown key."""
    tensors = dequantize(tensors)
    state = model.state_dict()
    seen = set()
    with torch.no_grad():
        for key, value in tensors.items():
            expert = EXPERT_KEY.match(key)
            target = state[f"{expert[1]}.{expert[3]}"][int(expert[2])] if expert else state[key]
            target.copy_(value)
            seen.add(f"{expert[1]}.{expert[3]}" if expert else key)
    if missing := state.keys() - seen:
        raise KeyError(f"checkpoint lacks {len(missing)} tensors, for example {min(missing)}")
    return model


def quantize_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 weight [out, in], scale_inv F32 [ceil(out / 128), ceil(in / 128)]). All-zero blocks get scale 1."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).flatten(2).flatten(0, 1)[:rows, :cols]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_block(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """fp8 * scale_inv in FP32."""
    scale = scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * scale[: weight.shape[0], : weight.shape[1]]


def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the matrices of FP8_KEY by e4m3 weights and their `_scale_inv` twins."""
    out = {}
    for key, value in tensors.items():
        if FP8_KEY.search(key):
            out[key], out[f"{key}_scale_inv"] = quantize_block(value)
        else:
            out[key] = value
    return out


def dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `quantize` up to rounding; tensors that are not F8 pass through."""
    return {
        key: dequantize_block(value, tensors[f"{key}_scale_inv"]) if value.dtype == torch.float8_e4m3fn else value
        for key, value in tensors.items()
        if not key.endswith("_scale_inv")
    }


def write_pieces(tensors: dict[str, Tensor], folder: Path, limit: int = 14 * 2**20) -> list[Path]:
    """Save as `weights-NN.safetensors` of at most `limit` bytes each (one tensor is never split)."""
    pieces, size = [{}], 0
    for key, value in tensors.items():
        if pieces[-1] and size + value.nbytes > limit:
            pieces.append({})
            size = 0
        pieces[-1][key] = value
        size += value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"weights-{index:02d}.safetensors" for index in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        save_file(piece, path)
    return paths


def read_pieces(folder: Path, pattern: str = "weights-*.safetensors") -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files; raises FileNotFoundError when there is none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {folder}: run train.py first")
    return {key: value for path in paths for key, value in load_file(path).items()}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(tensors: dict[str, Tensor], cfg: ModelConfig, out: Path) -> int:
    """Write config.json, generation_config.json, model.safetensors, LICENSE; returns the weights' size in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    fp8 = any(value.dtype == torch.float8_e4m3fn for value in tensors.values())
    write_json(out / "config.json", cfg.to_hf() | ({"quantization_config": QUANTIZATION_CONFIG} if fp8 else {}))
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    (out / "LICENSE").write_text(LICENSE_TEXT, encoding="utf-8")
    save_file({key: tensors[key] for key in sorted(tensors)}, out / "model.safetensors", metadata={"format": "pt"})
    return (out / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="folder of weights-*.safetensors")
    source.add_argument("--random", action="store_true", help="untrained weights, for tests of loaders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-position-embeddings", type=int, default=ModelConfig.max_position_embeddings)
    parser.add_argument("--bf16", action="store_true", help="no FP8: everything BF16 or F32")
    args = parser.parse_args()
    cfg = ModelConfig(max_position_embeddings=args.max_position_embeddings)
    tensors = checkpoint_tensors(DeepSeekV32(cfg).init_weights()) if args.random else read_pieces(args.weights)
    size = write_checkpoint(tensors if args.bf16 else quantize(tensors), cfg, args.out)
    print(f"{len(tensors)} tensors, {size / 1e6:.1f} MB of weights written to {args.out}")


if __name__ == "__main__":
    main()
