"""A model spread over the ranks by torch's own means: data, tensor, sequence and pipeline parallel.

Every rank holds *stages* of the model: all of it without pipeline parallelism, one piece with it,
several pieces with virtual stages, where rank ``r`` of ``p`` holds the pieces ``r, r + p, …``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

__all__ = ["Config", "Layout", "ParallelModel", "Stage", "Weights"]

Weights = Callable[[str, torch.Size], Tensor]
"""Name and whole shape of a parameter → its initial value, whole, on the CPU."""


class Stage(Protocol):
    """What ``gpt2.py`` and ``llama3.py`` have in common."""

    input_embedding: str
    output_head: str
    is_tied: bool
    is_first: bool
    is_last: bool
    blocks: list[nn.Module]

    def tie(self) -> None: ...  # noqa: D102
    def tensor_parallel_plan(  # noqa: D102
        self, *, is_sequence_parallel: bool
    ) -> dict[str, ParallelStyle]: ...


class Config(Protocol):
    """Sizes of a model."""

    n_layer: int
    n_embd: int
    vocab_size: int

    def facts(self) -> dict[str, object]: ...  # noqa: D102
    def build(self, layers: range) -> nn.Module: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share the work in which way.

    Data-parallel ranks are replicas (``ddp``) or shard parameters, gradients and moments among
    them (``fsdp``). Both are FSDP2: replicas are shards over an axis of one rank. The class
    ``DistributedDataParallel`` would not do: it cannot broadcast tensor-parallel parameters.
    """

    data_parallel: str = "ddp"
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1

    def num_data_ranks(self, world_size: int) -> int:
        """Ranks that get batches of their own; the others share one with them."""
        return world_size // (self.tensor_parallel * self.pipeline_parallel)

    def make_mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks of the world on four axes, neighbours in ``tp``."""
        num_data = self.num_data_ranks(dist.get_world_size())
        data = (num_data, 1) if self.data_parallel == "ddp" else (1, num_data)
        sizes = (self.pipeline_parallel, *data, self.tensor_parallel)
        names = ("pp", "dp_replicate", "dp_shard", "tp")
        return init_device_mesh(device.type, sizes, mesh_dim_names=names)


class ParallelModel:
    """This rank's stages, on the mesh, and how a batch goes through all of them.

    Args:
        config: Sizes of the model.
        layout: How the ranks share it.
        adapt: Changes a stage before it is split, such as by adding adapters.
        dtype: Of the computation. Parameters and moments stay float32.
        device: Where this rank computes.

    Attributes:
        stages: The pieces of the model that this rank holds.
        mesh: All ranks, on the axes ``pp``, ``dp_replicate``, ``dp_shard`` and ``tp``.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        *,
        adapt: Callable[[nn.Module], object] = lambda stage: None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.config, self.layout, self.dtype = config, layout, dtype
        self.mesh = layout.make_mesh(self.device)
        pipe = self.mesh["pp"]
        self.num_stages = pipe.size() * layout.virtual_pipeline_parallel
        self.numbers = range(pipe.get_local_rank(), self.num_stages, pipe.size())
        with torch.device("meta"):  # no rank ever holds more than its shard, and one whole tensor
            self.stages = [config.build(self._layers(config, number)) for number in self.numbers]
            for stage in self.stages:
                adapt(stage)
        for stage in self.stages:
            self._split(stage, dtype)
        self._ends = self._group_of_ends()

    @property
    def data_rank(self) -> int:
        """Which of the data-parallel ranks this one is."""
        replicate, shard = self.mesh["dp_replicate"], self.mesh["dp_shard"]
        return replicate.get_local_rank() * shard.size() + shard.get_local_rank()

    @property
    def num_data_ranks(self) -> int:
        """Ranks that get batches of their own."""
        return self.mesh["dp_replicate"].size() * self.mesh["dp_shard"].size()

    @property
    def ties(self) -> dict[str, str]:
        """Name of a parameter → name of the one that it is, also where two stages hold one each."""
        stage = self.stages[0]
        return {stage.output_head: stage.input_embedding} if stage.is_tied else {}

    def random_stream(self) -> tuple[int, int]:
        """Which stream of random numbers this rank draws dropout from, and of how many.

        Tensor-parallel ranks hold the same hidden state, so they must draw the same; if that is cut
        along the sequence, each draws for itself.
        """
        axes = ("pp", "dp_replicate", "dp_shard", "tp")
        if not self.layout.sequence_parallel:
            axes = axes[:-1]
        stream, num_streams = 0, 1
        for axis in axes:
            size = self.mesh[axis].size()
            stream = stream * size + self.mesh[axis].get_local_rank()
            num_streams *= size
        return stream, num_streams

    def fill(self, weights: Weights) -> None:
        """Give each parameter its initial value, the same for every layout."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                put(parameter, weights(name, parameter.shape))

    def _layers(self, config: Config, number: int) -> range:
        first, stop = (config.n_layer * n // self.num_stages for n in (number, number + 1))
        return range(first, stop)

    def _split(self, stage: nn.Module, dtype: torch.dtype) -> None:
        if self.mesh["tp"].size() > 1:
            plan = stage.tensor_parallel_plan(is_sequence_parallel=self.layout.sequence_parallel)
            frozen = {n for n, parameter in stage.named_parameters() if not parameter.requires_grad}
            parallelize_module(stage, self.mesh["tp"], plan)
            for name, parameter in stage.named_parameters():  # SequenceParallel thaws its norms
                parameter.requires_grad_(name not in frozen)
            stage.tie()  # it made two parameters of one
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        data = self.mesh["dp_replicate", "dp_shard"]
        for module in (*stage.blocks, stage):
            fully_shard(module, mesh=data, mp_policy=policy)
        stage.to_empty(device=self.device)
        stage.tie()  # likewise

    # A step.

    def make_forward_backward(
        self, accumulation: int, micro_batch: int, sequence_length: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that fills the gradients, and returns the loss.

        It takes inputs and targets ``[accumulation * micro_batch, sequence_length]`` of this rank,
        and returns the mean over these on ranks of the last stage, 0 on the others.
        """
        if self.mesh["pp"].size() == 1:
            return partial(self._whole_forward_backward, accumulation)
        boundaries = self._boundaries(micro_batch, sequence_length)
        stages = [
            PipelineStage(
                stage,
                number,
                self.num_stages,
                self.device,
                # Shapes given, torch need not run the stage to learn them: that would draw dropout.
                input_args=boundaries[number],
                output_args=boundaries[number + 1],
                group=self.mesh["pp"].get_group(),
            )
            for number, stage in zip(self.numbers, self.stages, strict=True)
        ]
        schedule: Schedule1F1B | ScheduleInterleaved1F1B
        if len(stages) == 1:
            schedule = Schedule1F1B(stages[0], accumulation, loss_fn=token_loss)
        else:
            schedule = ScheduleInterleaved1F1B(stages, accumulation, loss_fn=token_loss)
        return partial(self._staged_forward_backward, schedule)

    def _whole_forward_backward(self, accumulation: int, inputs: Tensor, targets: Tensor) -> Tensor:
        (model,) = self.stages
        losses = []
        for number, (x, y) in enumerate(
            zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True)
        ):
            model.set_requires_gradient_sync(number == accumulation - 1)
            loss = token_loss(model(x), y)
            (loss / accumulation).backward()
            losses.append(loss.detach())
        return mean(losses)

    def _staged_forward_backward(
        self,
        schedule: Schedule1F1B | ScheduleInterleaved1F1B,
        inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        losses: list[Tensor] = []
        given = (inputs,) if self.stages[0].is_first else ()
        if self.stages[-1].is_last:
            schedule.step(*given, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*given, return_outputs=False)
        self._sum_tied_gradients()
        return mean(losses)

    def _boundaries(self, micro_batch: int, sequence_length: int) -> list[Tensor]:
        """What lies before, between and after all stages, without its data."""
        length = sequence_length
        if self.layout.sequence_parallel:
            length //= self.mesh["tp"].size()
        tokens = torch.empty(micro_batch, sequence_length, dtype=torch.long, device="meta")
        hidden = torch.empty(
            (micro_batch, length, self.config.n_embd),
            dtype=self.dtype,
            device="meta",
            requires_grad=True,
        )
        logits = hidden.new_empty(
            (micro_batch, sequence_length, self.config.vocab_size), requires_grad=True
        )
        return [tokens, *[hidden] * (self.num_stages - 1), logits]

    def global_loss(self, loss: Tensor) -> float:
        """The mean of what the data-parallel ranks found, on every rank."""
        counts = self.stages[-1].is_last and self.mesh["tp"].get_local_rank() == 0
        total = loss if counts else torch.zeros_like(loss)
        dist.all_reduce(total)
        return float(total) / self.num_data_ranks

    # Tied weights on two stages.

    def _group_of_ends(self) -> dist.ProcessGroup | None:
        """The first and the last rank of this rank's pipeline, if it is one of the two."""
        if self.mesh["pp"].size() == 1:
            return None
        pipelines = self.mesh.mesh.flatten(1).T.tolist()
        group, _ = dist.new_subgroups_by_enumeration([[ranks[0], ranks[-1]] for ranks in pipelines])
        return group

    def _sum_tied_gradients(self) -> None:
        """Add the gradients of the embedding and the head where they are one on two stages.

        Both ranks then have the same gradient, so that weights and moments stay equal.
        """
        for stage in self.stages:
            if self._ends is None or not stage.is_tied:
                return
            for holds, name in (
                (stage.is_first, stage.input_embedding),
                (stage.is_last, stage.output_head),
            ):
                if holds and (parameter := stage.get_parameter(name)).grad is not None:
                    dist.all_reduce(local(parameter.grad), group=self._ends)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def mean(losses: Sequence[Tensor]) -> Tensor:
    """In float64, so that it hardly matters how many ranks take part."""
    return (
        torch.stack(list(losses)).detach().double().mean()
        if losses
        else torch.zeros((), dtype=torch.float64)
    )


def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(
                whole.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            ).to_local()
        local(parameter).copy_(whole)


def local(tensor: Tensor) -> Tensor:
    """The memory of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
