"""config.json of the DeepSeek family, read once into a frozen record. No torch here: the API process reads it too."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
)
"""Without these config.json describes no model."""
FAMILIES = ("deepseek_v3", "deepseek_v32")


class ConfigError(ValueError):
    """config.json is missing, unreadable or describes a model this build cannot run; the message says which and why."""


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023) as DeepSeek configures it."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @staticmethod
    def magnitude(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    @property
    def cos_sin_factor(self) -> float:
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.factor, self.mscale) / self.magnitude(self.factor, self.mscale_all_dim)
        return self.magnitude(self.factor, 1.0)


@dataclass(frozen=True)
class DeepseekConfig:
    """The numbers of one DeepSeek-V3 or -V3.2 model, by the names of its config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    fp8: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def sparse(self) -> bool:
        """Whether layers carry a lightning indexer."""
        return self.model_type == "deepseek_v32"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.yarn and self.yarn.mscale_all_dim:
            scale *= Yarn.magnitude(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace


def _yarn(raw: dict[str, Any], positions: int) -> Yarn | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"rope type {kind!r} is not supported; this family uses 'default' or 'yarn'.")
    if not raw.get("factor"):
        raise ConfigError("rope type 'yarn' needs a factor.")
    return Yarn(
        factor=float(raw["factor"]),
        original_positions=int(raw.get("original_max_position_embeddings") or positions),
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        mscale=float(raw.get("mscale") or 0),
        mscale_all_dim=float(raw.get("mscale_all_dim") or 0),
    )


def parse_config(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> DeepseekConfig:
    """Reads a decoded config.json (and generation_config.json); old (`rope_theta`, `rope_scaling`) and new
    (`rope_parameters`) rope keys. Raises `ConfigError`."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; this build runs: {', '.join(FAMILIES)}.")
    needed = list(NEEDED)
    if model_type == "deepseek_v32":
        needed += ["q_lora_rank", "index_topk", "index_n_heads", "index_head_dim"]
    missing = [name for name in needed if raw.get(name) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}.")
    wrong = [name for name in needed if type(raw[name]) is not int or raw[name] < 1]
    if wrong:
        texts = (f"{name} is {raw[name]!r}" for name in wrong)
        raise ConfigError(f"config.json needs whole numbers of at least 1, but {', '.join(texts)}.")
    if raw.get("attention_bias"):
        raise ConfigError("attention_bias is not supported: no released model of this family has it.")
    for name, expected in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu")):
        if raw.get(name, expected) != expected:
            raise ConfigError(f"{name} {raw[name]!r} is not supported; expected {expected!r}.")
    if not raw.get("rope_interleave", True):
        raise ConfigError("rope_interleave false is not supported: this family's MLA rotates interleaved pairs.")
    quant = raw.get("quantization_config") or {}
    if quant and (quant.get("quant_method") != "fp8" or quant.get("weight_block_size", [128, 128]) != [128, 128]):
        raise ConfigError(
            f"quantization {quant.get('quant_method')!r} with block size {quant.get('weight_block_size')} is not "
            "supported; expected 'fp8' with [128, 128]."
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    positions = int(raw.get("max_position_embeddings") or 4096)
    eos = (generation or {}).get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    experts, chosen, groups = raw["n_routed_experts"], raw["num_experts_per_tok"], int(raw.get("n_group") or 1)
    kept_groups = min(int(raw.get("topk_group") or groups), groups)
    if experts % groups:
        raise ConfigError(f"n_routed_experts ({experts}) must be a multiple of n_group ({groups}).")
    if 1 < groups == experts:
        raise ConfigError(f"n_group ({groups}) leaves one expert per group; a group is ranked by its best two.")
    if chosen > kept_groups * experts // groups:
        raise ConfigError(
            f"num_experts_per_tok ({chosen}) is more than the {kept_groups * experts // groups} experts that "
            f"topk_group ({kept_groups}) of n_group ({groups}) leaves to choose from."
        )
    if raw["qk_rope_head_dim"] % 2:
        raise ConfigError(f"qk_rope_head_dim ({raw['qk_rope_head_dim']}) must be even: it is rotated in pairs.")
    if model_type == "deepseek_v32" and raw["index_head_dim"] < raw["qk_rope_head_dim"]:
        raise ConfigError(
            f"index_head_dim ({raw['index_head_dim']}) must be at least qk_rope_head_dim ({raw['qk_rope_head_dim']})."
        )
    return DeepseekConfig(
        model_type=model_type,
        **{name: raw[name] for name in needed if name != "q_lora_rank" and not name.startswith("index_")},
        q_lora_rank=int(raw["q_lora_rank"]) if raw.get("q_lora_rank") else None,
        n_shared_experts=int(raw.get("n_shared_experts") or 0),
        n_group=groups,
        topk_group=kept_groups,
        norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
        routed_scaling_factor=float(raw.get("routed_scaling_factor") or 1.0),
        first_k_dense_replace=int(raw.get("first_k_dense_replace") or 0),
        rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
        max_position_embeddings=positions,
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        yarn=_yarn(rope, positions),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        num_nextn_predict_layers=int(raw.get("num_nextn_predict_layers") or 0),
        index_topk=int(raw.get("index_topk") or 0),
        index_n_heads=int(raw.get("index_n_heads") or 0),
        index_head_dim=int(raw.get("index_head_dim") or 0),
        fp8=bool(quant),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=raw.get("bos_token_id"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} if there is no such file. Raises `ConfigError` for anything else in it."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return value


def read_config(folder: Path) -> DeepseekConfig:
    """config.json and generation_config.json of a checkpoint folder. Raises `ConfigError`."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: it is not a Hugging Face checkpoint folder.")
    return parse_config(read_json(folder / "config.json"), read_json(folder / "generation_config.json"))


BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
DEFAULT_MODEL = "tilery-books-26m"


def resolve_model(name_or_path: str) -> Path:
    """The checkpoint folder of a bundled model's name or a path. Raises `ConfigError` that says what was looked for."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    bundled = sorted(p.name for p in BUNDLED.iterdir() if (p / "config.json").is_file()) if BUNDLED.is_dir() else []
    if name_or_path in bundled:
        return BUNDLED / name_or_path
    raise ConfigError(
        f"no model folder {name_or_path!r}. Give a folder with config.json and *.safetensors, or a bundled model: "
        f"{', '.join(bundled) or 'none is installed'}."
    )
