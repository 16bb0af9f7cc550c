"""LoRA: small trainable adapters beside linear layers that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

__all__ = ["TARGETS", "LoRALinear", "adapters", "add_adapters", "is_adapter"]

TARGETS = {
    "gpt2": ("c_attn", "attn.c_proj"),
    "llama3": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Which linear layers get adapters if nothing else is asked: the ends of their names."""


class LoRALinear(nn.Linear):
    """A frozen linear layer, plus the product of two narrow matrices.

    It takes the place of the ``nn.Linear`` under the same name, so that the weights of a model with
    and without adapters have the same names. Tensor parallelism splits ``weight`` as before; how
    the adapters follow from that is DTensor's affair.

    Args:
        linear: The layer that it replaces.
        rank: Width of the adapter.
        alpha: The adapter counts ``alpha / rank`` times.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
        )
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its adapter."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_adapters(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> None:
    """Freeze a model, and put an adapter beside each linear layer whose name ends as asked.

    Raises:
        ValueError: No layer of the model has such a name.
    """
    model.requires_grad_(False)
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(fnmatchcase(f".{name}", f"*.{target}") for target in targets)
    ]
    if not chosen:
        raise ValueError(f"no linear layer's name ends in one of {list(targets)}")
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha))


def adapters(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Name → tensor of every adapter: what an adapter-only checkpoint holds."""
    return {
        name: parameter.detach()
        for model in models
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))
