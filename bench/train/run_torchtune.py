"""torchtune's single-device recipes, for models of Llama's shape. packed: a step's rows as one pack with its
block-causal mask."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchtune
from job import Job, Row, StepLog, read_job, use_threads
from omegaconf import OmegaConf


class Rows:
    """The job's rows in torchtune's form; its collators pad them, or mask them within a pack."""

    def __init__(self, tokenizer: Any, packed: bool = False) -> None:
        job = read_job()
        self.items = [_pack(rows) for rows in job.steps] if packed else [_single(row) for row in job.rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def _single(row: Row) -> dict[str, list[int]]:
    return {"tokens": row["input_ids"], "labels": row["labels"]}


def _pack(rows: list[Row]) -> dict[str, torch.Tensor]:
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "tokens": torch.tensor([token for row in rows for token in row["input_ids"]]),
        "labels": torch.tensor([label for row in rows for label in row["labels"]]),
        "input_pos": torch.cat([torch.arange(length) for length in lengths]),
        "seq_lens": torch.tensor(lengths),
    }


class Padding:
    """All that the recipes need of a tokenizer."""

    pad_id = 0


class Metrics:
    """torchtune's metric logger, writing to the runner's log."""

    def __init__(self) -> None:
        self.log = StepLog(read_job(), "torchtune", "torchao")

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.log.step(float(payload["loss"]))

    def close(self) -> None:
        pass


def model_config(job: Job) -> dict[str, Any]:
    given = json.loads((Path(job.model) / "config.json").read_text())
    if given["model_type"] != "llama":
        raise SystemExit(f"torchtune: a {given['model_type']} model has no builder here")
    rope = given.get("rope_parameters") or given
    shape = {
        "vocab_size": given["vocab_size"],
        "num_layers": given["num_hidden_layers"],
        "num_heads": given["num_attention_heads"],
        "num_kv_heads": given["num_key_value_heads"],
        "embed_dim": given["hidden_size"],
        "intermediate_dim": given["intermediate_size"],
        "max_seq_len": given["max_position_embeddings"],
        "norm_eps": given["rms_norm_eps"],
        "rope_base": int(rope["rope_theta"]),
        "scale_factor": 1,
        "tie_word_embeddings": given["tie_word_embeddings"],
    }
    builders = "torchtune.models.llama3_2._component_builders"
    if job.method == "full":
        return {"_component_": f"{builders}.llama3_2"} | shape
    lora = {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
    }
    return {"_component_": f"{builders}.lora_llama3_2"} | lora | shape


def config(job: Job) -> Any:
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": job.model,
        "checkpoint_files": sorted(path.name for path in Path(job.model).glob("*.safetensors")),
        "output_dir": f"{job.folder}/out",
        "model_type": "LLAMA3_2",
    }
    constant = {"_component_": "run_torchtune.constant"}
    return OmegaConf.create(
        {
            "output_dir": f"{job.folder}/out",
            "model": model_config(job),
            "tokenizer": {"_component_": "run_torchtune.Padding"},
            "checkpointer": checkpointer,
            "resume_from_checkpoint": False,
            "dataset": {"_component_": "run_torchtune.Rows", "packed": job.packed},
            "seed": job.seed,
            "shuffle": False,
            "batch_size": 1 if job.packed else job.rows_per_step,
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "lr": job.lr,
                "weight_decay": 0.0,
                "fused": True,
            },
            "optimizer_in_bwd": False,
            **({"lr_scheduler": constant} if job.method == "lora" else {}),
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "epochs": 1,
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "clip_grad_norm": 1.0,
            "compile": False,
            "metric_logger": {"_component_": "run_torchtune.Metrics"},
            "device": job.device,
            "dtype": job.precision,
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
        }
    )


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def recipe_module(job: Job) -> ModuleType:
    """torchtune's recipes lie beside the package and refuse to be imported as one."""
    name = f"{job.method}_finetune_single_device"
    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    job = read_job()
    use_threads(job)
    module, settings = recipe_module(job), config(job)
    kind = "FullFinetune" if job.method == "full" else "LoRAFinetune"
    recipe = getattr(module, f"{kind}RecipeSingleDevice")(cfg=settings)
    recipe.save_checkpoint = lambda epoch: None  # only the training is measured
    recipe.setup(cfg=settings)
    recipe.train()


if __name__ == "__main__":
    main()
