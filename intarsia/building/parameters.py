"""A layer's tensors as they stand in files, and as parameters of its module in memory.

In most families they are the same. A mixture's module has one parameter for a matrix of all experts, where files have
one tensor for each; and some families call things otherwise in memory. Which is which stands in the family's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from intarsia.architecture.families import Stacked
from intarsia.architecture.spec import Architecture


def parameter_name(local: str, architecture: Architecture) -> str:
    """The parameter in which a tensor of the files is in memory, both by names inside the layer."""
    for stacked in architecture.family.stacked:
        if local in _members(stacked, architecture):
            return stacked.parameter
    return _exchanged(local, architecture.family.renamed.items())


def tensor_names(parameter: str, architecture: Architecture) -> tuple[str, ...]:
    """The tensors of the files that a parameter holds."""
    for stacked in architecture.family.stacked:
        if stacked.parameter == parameter:
            return tuple(_members(stacked, architecture))
    return (_exchanged(parameter, ((memory, file) for file, memory in architecture.family.renamed.items())),)


def parameter_names(architecture: Architecture) -> tuple[str, ...]:
    """Every parameter of a layer in memory, in the order of the files' tensors."""
    return tuple(dict.fromkeys(parameter_name(local, architecture) for local in _stems(architecture)))


def to_parameters(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A layer's parameters in memory from its tensors in files; what is not stacked is the same tensor."""
    found = dict(tensors)
    for stacked in architecture.family.stacked if architecture.n_experts else ():
        experts = [
            torch.cat([found.pop(name.format(expert=expert)) for name in stacked.tensors])
            for expert in range(architecture.n_experts)
        ]
        found[stacked.parameter] = torch.stack(experts)
    return {_exchanged(name, architecture.family.renamed.items()): tensor for name, tensor in found.items()}


def to_tensors(parameters: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The way back: a layer's tensors as in files, from all of its parameters or some."""
    shapes = architecture.layer_shapes()
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        stacked = next((entry for entry in architecture.family.stacked if entry.parameter == name), None)
        if stacked is None:
            found[tensor_names(name, architecture)[0]] = parameter
            continue
        for expert in range(architecture.n_experts):
            names = [part.format(expert=expert) for part in stacked.tensors]
            sizes = [shapes[part][0] for part in names]
            found |= zip(names, parameter[expert].split(sizes), strict=True)
    return found


def _members(stacked: Stacked, architecture: Architecture) -> list[str]:
    return [name.format(expert=expert) for expert in range(architecture.n_experts) for name in stacked.tensors]


def _stems(architecture: Architecture) -> Iterable[str]:
    """Names of tensors, of the experts only the first one's: all of them are in the same parameters."""
    others = {module for linear in architecture.linears for module in architecture.modules(linear)[1:]}
    return (name for name in architecture.layer_shapes() if name.rpartition(".")[0] not in others)


def _exchanged(name: str, beginnings: Iterable[tuple[str, str]]) -> str:
    for begin, other in beginnings:
        if name == begin or name.startswith(f"{begin}."):
            return other + name[len(begin) :]
    return name
