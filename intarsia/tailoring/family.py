"""The models of a family, opened and checked against each other.

Everything outside the layers (embeddings, final norm, head, config, tokenizer) comes from the base, for the output of a
layer of any member must mean to the head what the base's does. So a member with more rows in its vocabulary is used
without them, which is said; one with fewer, or with other tokens for the same rows, is not of the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.adapter import open_variant
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import Problem, UserError
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Variant
from intarsia.tailoring.config_only import read_config_only
from intarsia.tailoring.family_file import MemberSpec
from intarsia.tailoring.kinship import Member, compare


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """`members[0]` is the base. `notes` are what a user should know though it stops nothing."""

    members: tuple[Member, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, the base's first."""
        return tuple(member.name for member in self.members)

    @property
    def architecture(self) -> Architecture:
        """The base's, which is everyone's."""
        return self.members[0].architecture

    def checkpoints(self) -> dict[str, Checkpoint]:
        """The opened checkpoints, by name."""
        found = {member.name: member.checkpoint for member in self.members}
        assert all(checkpoint is not None for checkpoint in found.values()), "opened with weights"
        return {name: checkpoint for name, checkpoint in found.items() if checkpoint is not None}

    def variants(self, progress: Progress | None = None) -> tuple[Variant, ...]:
        """The members as a recipe names them, with the hashes of their weights, all of which are finite.

        Raises:
            UserError: naming tensors that hold NaN or infinity.
        """
        found = []
        for member in self.members:
            # A recipe outlives the folder that the search ran in, so a local path is made absolute.
            local = Path(member.model).is_dir() and member.model != "demo"
            model = str(Path(member.model).resolve()) if local else member.model
            sha256 = None if member.checkpoint is None else scan(member.checkpoint, progress)
            found.append(Variant(name=member.name, model=model, revision=member.revision, sha256=sha256))
        return tuple(found)


def open_family(
    base: MemberSpec,
    variants: Sequence[MemberSpec],
    *,
    weights: bool = True,
    configs: Path | None = None,
    progress: Progress | None = None,
) -> Family:
    """Open the members of a family and check that they are one.

    Args:
        weights: False reads config files alone, for a look before anything is downloaded; shapes are then those that
            the configs promise.
        configs: where config files of models on the hub are, if not there (see `read_config_only`).

    Raises:
        UserError: naming everything in which members cannot be found or read, or differ from the base.
    """
    progress = progress or Silent()
    first = _member(base, None, weights, configs, progress)
    members = [first]
    problems: list[Problem] = []
    notes: list[str] = [] if weights else ["Only config files were read: weights and tokenizers are not checked."]
    for spec in variants:
        try:
            member = _member(spec, first, weights, configs, progress)
        except UserError as error:
            problems += error.problems
            continue
        members.append(member)
        wrong, said = compare(first, member)
        problems += wrong
        notes += said
    if problems:
        raise UserError(problems)
    return Family(members=tuple(members), notes=tuple(notes))


def _member(spec: MemberSpec, base: Member | None, weights: bool, configs: Path | None, progress: Progress) -> Member:
    if not weights:
        config, architecture = read_config_only(spec.model, spec.revision, base, progress, configs=configs)
        return Member(
            name=spec.name, model=spec.model, revision=spec.revision, config=config, architecture=architecture
        )
    over = None if base is None else base.checkpoint
    checkpoint = open_variant(spec.model, revision=spec.revision, base=over, progress=progress)
    return Member(
        name=spec.name,
        model=spec.model,
        revision=spec.revision,
        config=checkpoint.config,
        architecture=checkpoint.architecture,
        checkpoint=checkpoint,
    )
