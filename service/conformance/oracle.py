"""The oracle: PEFT itself, one adapter at a time, in fp32, over the same NF4 weights.

Slow and obvious. A float model is loaded, each decoder linear is quantised and dequantised by
bitsandbytes, and PEFT applies one adapter to it: what any faster path must equal.

    base = make_base(tmp_path / "base", "qwen3")
    adapter = make_adapter(tmp_path / "a", base, "dora", rank=4)
    oracle = PeftOracle(base, adapter)
    oracle.logits([1, 2, 3])            # [3, vocabulary]
    oracle.greedy([1, 2, 3], 16).tokens
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from adapters.checks.saved_tables import TABLE_LEAVES
from base.architecture import another
from base.dense import RoundedEmbedding, RoundedLinear
from base.scales import double_quant_of

VIRTUAL_KINDS = (
    "prompt_tuning",
    "multitask_prompt_tuning",
    "p_tuning",
    "cpt",
    "prefix_tuning",
    "cartridge",
)


class Greedy(NamedTuple):
    """Greedy tokens, and at each step how far the best logit stood above the second.

    Where `gaps[i]` is tiny (say below 1e-4) the choice is a tie, and a rounding may decide it.
    """

    tokens: list[int]
    gaps: list[float]


class PeftOracle:
    """One adapter, or none, over one base.

    base     directory of a transformers checkpoint, or a `Base`: its tensors are read back
    adapter  directory that PEFT saved (adapter_config.json, adapter_model.safetensors), or None
    merged   None: PEFT's unmerged forward. "float32", "bfloat16", "nf4": PEFT merges into the
             dequantised weights, and the merged linears are rounded to that dtype: the oracle of
             placement `merged`.
    double_quant  of a directory's weights; None as `load_base` resolves it
    """

    def __init__(
        self,
        base: str | Path | Any,
        adapter: str | Path | None = None,
        *,
        merged: str | None = None,
        double_quant: bool | None = None,
    ) -> None:
        if isinstance(base, str | Path):
            double = double_quant_of(Path(base), double_quant)
            model = copy.deepcopy(dequantised_model(str(base), double))
        else:
            model = _model_of(base)
        if adapter is not None:
            _resize_as(model, Path(adapter))
            model = _with_adapter(model, Path(adapter), merged)
        self.model: Any = model.eval()
        method = getattr(getattr(model, "active_peft_config", None), "peft_type", "").lower()
        self._virtual = method in VIRTUAL_KINDS
        multitask = method in ("multitask_prompt_tuning", "poly")
        self._task: dict[str, Any] = {"task_ids": torch.tensor([0])} if multitask else {}

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [T, vocabulary] of one sequence, each position seeing itself and those before."""
        own = {} if self._virtual else {"use_cache": False}
        output = self.model(input_ids=torch.tensor([list(token_ids)]), **own, **self._task)
        # Rows of virtual tokens come before those of real ones.
        logits: torch.Tensor = output.logits[0, -len(token_ids) :].float().clone()
        return logits

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], n: int, *, stop: Collection[int] = ()) -> Greedy:
        """At most n tokens after `prompt`; ends early after a token of `stop` (which is kept)."""
        if self._virtual:
            return self._generate(prompt, n, stop)
        tokens: list[int] = []
        gaps: list[float] = []
        cache, fresh = None, list(prompt)
        while len(tokens) < n and not (tokens and tokens[-1] in stop):
            output = self.model(
                input_ids=torch.tensor([fresh]), past_key_values=cache, use_cache=True
            )
            best, second = output.logits[0, -1].float().topk(2).values.tolist()
            fresh = [int(output.logits[0, -1].argmax())]
            cache = output.past_key_values
            tokens += fresh
            gaps.append(best - second)
        return Greedy(tokens, gaps)

    def _generate(self, prompt: Sequence[int], n: int, stop: Collection[int]) -> Greedy:
        """`greedy` by PEFT's own loop: its forward pass puts the virtual tokens before each call's
        tokens, so that a loop outside must not call it once for each."""
        ids = torch.tensor([list(prompt)])
        self.model.generation_config.eos_token_id = list(stop) or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it makes position ids itself
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **self._task,
            )
        best = torch.stack(output.logits)[:, 0].float().topk(2).values
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        return Greedy(tokens, (best[:, 0] - best[:, 1]).tolist())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| over the largest |want|."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def nf4_round(weight: torch.Tensor, double_quant: bool = False) -> torch.Tensor:
    """A weight as NF4 in blocks of 64 keeps it, in fp32; by bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.detach().float().contiguous(),
        blocksize=64,
        quant_type="nf4",
        compress_statistics=double_quant,
    )
    rounded: torch.Tensor = dequantize_4bit(packed, state).float()
    return rounded


@lru_cache(maxsize=8)
def dequantised_model(directory: str, double_quant: bool) -> Any:
    """The checkpoint in fp32, its decoder linears rounded to NF4. Copy before changing it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = nf4_round(module.weight, double_quant)
    return model


def _model_of(base: Any) -> Any:
    """A float model with the very tensors that a `Base` holds."""
    with torch.random.fork_rng():
        model = another(base.model).float().eval()
    model.set_attn_implementation("sdpa")
    kept = {
        name.replace(".inner.", ".").removesuffix(".inner"): tensor
        for name, tensor in base.model.state_dict().items()
    }
    for path, shape in base.spec.linears.items():
        if shape.quantized:
            linear = base.linear(path)
            linear = getattr(linear, "inner", linear)
            kept[f"{path}.weight"] = linear.weight.dequantize(torch.float32)
    for path in (*base.spec.embeddings, *base.spec.linears):
        module = base.embedding(path) if path in base.spec.embeddings else base.linear(path)
        if isinstance(module, RoundedEmbedding | RoundedLinear):
            kept[f"{path}.weight"] = module.weight.dequantize(torch.float32)
    names = set(model.state_dict())
    model.load_state_dict({k: v.float() for k, v in kept.items() if k in names}, strict=True)
    return model


def _resize_as(model: Any, adapter: Path) -> None:
    """`resize_token_embeddings` where the adapter's tables have other rows: whoever loads such an
    adapter with PEFT has to."""
    from safetensors import safe_open

    own = model.get_input_embeddings().weight.shape
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [name for name, module in model.named_modules() if module in tables]
    names = {f"base_model.model.{path}.{leaf}" for path in paths for leaf in TABLE_LEAVES}
    opened: Any = safe_open
    with opened(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        found = [file.get_slice(name).get_shape()[0] for name in names.intersection(file.keys())]
    if found and found[0] != own[0]:
        with torch.random.fork_rng():
            model.resize_token_embeddings(found[0], mean_resizing=False)


def _with_adapter(model: nn.Module, adapter: Path, merged: str | None) -> Any:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    ready_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter))
        if merged is None:
            return peft_model
        touched = [
            name.removeprefix("base_model.model.")
            for name, module in peft_model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        plain = peft_model.merge_and_unload(safe_merge=True)
    head = plain.get_output_embeddings()
    for name in touched:
        layer = plain.get_submodule(name)
        quantised = isinstance(layer, nn.Linear) and layer is not head
        if merged == "nf4" and quantised:
            layer.weight.data = nf4_round(layer.weight)
        elif merged in ("bfloat16", "nf4"):
            layer.weight.data = layer.weight.data.bfloat16().float()
    return plain


class _BlocksInTorch:
    """PEFT's CUDA extension for BOFT, in torch: without it PEFT has one butterfly factor alone."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        """[N, D, H, H] -> [N, D H, D H]."""
        make: Any = torch.block_diag  # has no types
        return [torch.stack([make(*own) for own in blocks])]


def ready_peft() -> None:
    """Let BOFT have as many factors as its config says, and SHiRA be silent about its tensors."""
    from peft.tuners.boft import layer

    layer._FBD_CUDA = _BlocksInTorch
    invariants: Any = torch.sparse.check_sparse_tensor_invariants
    invariants.enable()
