"""Pipeline stages: which layers each one holds, and where tensors go that belong to no layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.layout_rules import LayoutRules
from dcp_resume.planning.parameters import ParameterNames

__all__ = ["assign_stages", "parameters_of", "split_layers"]

Stages = tuple[tuple[int, ...], ...]


def parameters_of(tensors: Sequence[TensorEntry]) -> dict[str, TensorEntry]:
    """Optimizer tensor → the parameter whose name its own name contains, the longest one.

    ``optim.state.layers.0.wq.weight.exp_avg`` belongs to ``model.layers.0.wq.weight``.
    """
    names = ParameterNames(entry.fqn for entry in tensors)
    by_fqn = {entry.fqn: entry for entry in tensors}
    owners = {entry.fqn: names.owner(entry.fqn) for entry in tensors if entry.codec == "raw"}
    return {fqn: by_fqn[owner.fqn] for fqn, owner in owners.items() if owner is not None}


def split_layers(
    tensors: Sequence[TensorEntry], num_stages: int, declared: Stages | None
) -> Stages:
    """Per stage its layers: as declared, else evenly, the first stages taking what is left over.

    Raises:
        ConfigurationError: Fewer layers than stages, or a declaration that does not hold each layer
            once.
    """
    layers = sorted({entry.layer for entry in tensors if entry.layer is not None})
    if num_stages == 1:
        return (tuple(layers),)
    if declared is not None:
        if len(declared) != num_stages or sorted(sum(declared, ())) != layers:
            raise ConfigurationError(
                f"the layout's stages do not fit: expected {num_stages} stages that hold each of "
                f"the layers {layers} once, found {[list(stage) for stage in declared]}",
                option="layout",
            )
        return declared
    if len(layers) < num_stages:
        raise ConfigurationError(
            f"cannot split {len(layers)} layer(s) into {num_stages} pipeline stages; layers are "
            "recognised by names such as layers.3 or h.3. Choose a smaller pp",
            option="to",
        )
    size, rest = divmod(len(layers), num_stages)
    stages: list[tuple[int, ...]] = []
    for stage in range(num_stages):
        first = sum(map(len, stages))
        stages.append(tuple(layers[first : first + size + (stage < rest)]))
    return tuple(stages)


def assign_stages(
    tensors: Sequence[TensorEntry],
    parameters: Mapping[str, TensorEntry],
    stages: Stages,
    rules: LayoutRules,
) -> list[int]:
    """Per tensor its stage.

    A rule's ``stage`` counts first, then the layer, then the tensor's parameter. What is left goes
    to the first stage where it comes before the layers of its part in the order of the state dict
    (embeddings), or where its part has no layers; else to the last (final norm, output head).

    Raises:
        ConfigurationError: A rule names a stage that the mesh does not have.
    """
    stage_of_layer = {layer: number for number, layers in enumerate(stages) for layer in layers}
    first_layered: dict[str, int] = {}
    for position, entry in enumerate(tensors):
        if entry.layer is not None:
            first_layered.setdefault(entry.part, position)
    found: dict[str, int] = {}
    for position, entry in enumerate(tensors):
        stage = _declared_stage(entry, len(stages), rules)
        if stage is None and entry.layer is not None:
            stage = stage_of_layer[entry.layer]
        if stage is None and entry.fqn not in parameters:
            is_first = position < first_layered.get(entry.part, len(tensors))
            stage = 0 if is_first else len(stages) - 1
        if stage is not None:
            found[entry.fqn] = stage
    for fqn, parameter in parameters.items():
        found.setdefault(fqn, found[parameter.fqn])
    return [found[entry.fqn] for entry in tensors]


def _declared_stage(entry: TensorEntry, num_stages: int, rules: LayoutRules) -> int | None:
    rule = rules.find(entry.fqn)
    if rule is None or rule.stage is None or num_stages == 1:
        return None
    if rule.stage >= num_stages:
        raise ConfigurationError(
            f"the rule for {rule.match!r} names stage {rule.stage}; the mesh has {num_stages}",
            option="layout",
        )
    return rule.stage
