"""What layerwise distillation works on: the teacher's hidden states as deep as they are needed, and tasks for layers.

A depth is dropped when no layer needs it any more, so that one by one two depths are stored at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from intarsia.building.parameters import parameter_names
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import PREFIX, Room
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.disk import require_room
from intarsia.healing.layer_map import Correspondence
from intarsia.healing.layer_task import LayerTask, trained_names
from intarsia.healing.settings import LayerwiseSettings
from intarsia.healing.states import States, StudentStates, plain_batches
from intarsia.healing.teacher import TeacherStates
from intarsia.healing.training import Text, schedule_of
from intarsia.progress import Task
from intarsia.recipe.recipe import Recipe


class LayerWork:
    """The teacher's states, and tasks made from them.

    Attributes:
        student: the states that the trained layers give, where those are what a layer is fed.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        resident: Resident,
        teacher: Resident,
        corpus: Corpus,
        held_out: Corpus,
        settings: LayerwiseSettings,
        folder: Path | None,
        memory_bytes: int | None,
    ) -> None:
        """Nothing is run yet.

        Args:
            folder: where state and states are kept, if anywhere.

        Raises:
            UserError: there is too little text, or too little room.
        """
        self.recipe, self.resident, self.settings, self.folder = recipe, resident, settings, folder
        text = self.text = Text.of(corpus, held_out)
        self.schedule = schedule_of(settings, sequences=len(corpus), seq_len=corpus.seq_len)
        self.names = trained_names(parameter_names(resident.architecture), settings.only)
        shape = (len(self.text.ids_NT), corpus.seq_len, resident.architecture.width)
        room = Room(memory_bytes, folder)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{PREFIX}*"):  # a killed run's
                shutil.rmtree(stale, ignore_errors=True)
            # A layer's masters, optimiser state and best tensors, as finished and as they are on the way.
            most = 20 * resident.architecture.layer_parameters
            require_room(folder, most, "the state of one layer's training", option="--run")
        self.original = TeacherStates(teacher, plain_batches(teacher, text.ids_NT), room=room)
        self.store, self.stream = self.original.store, LayerStream(teacher.model, teacher.architecture)
        self.student: StudentStates | None = None
        if settings.inputs == "student":
            store = HiddenStore(shape, resident.model.dtype, room=room)
            self.student = StudentStates(recipe, resident, text.ids_NT, store)

    def close(self) -> None:
        """Free the hidden states."""
        self.original.close()
        if self.student is not None:
            self.student.store.close()

    def task(self, layer: Correspondence) -> LayerTask:
        """What is needed to train a layer between whose depths the teacher has been."""
        op = self.recipe.layers[layer.index]
        donor = op.sources[0].layer
        # Always a module of its own: a plain `Select` is the original's module itself.
        with self.resident.awake(self.resident.module(op, self.recipe.fitted.get(layer.index))) as whole:
            module = self.resident.fresh(donor, dict(whole.named_parameters()))
        if next(module.parameters()).dtype == torch.float16:
            module = module.to(torch.bfloat16)  # gradients overflow in float16
        sizes = {
            self.schedule.batch,
            self.text.held_out % self.schedule.batch,
            min(self.schedule.batch, self.text.held_out),
        }
        return LayerTask(
            index=layer.index,
            module=module,
            inputs=States(store=self.store, depth=layer.start)
            if self.student is None
            else States(store=self.student.store, depth=0),
            targets=States(store=self.store, depth=layer.stop),
            sequences=len(self.text.ids_NT),
            held_out=self.text.held_out,
            seq_len=self.text.seq_len,
            mask=self.text.mask_NT,
            calls={size: self._call(donor, size) for size in sizes if size},
            names=self.names,
            settings=self.settings,
            folder=self.folder,
            device=str(self.resident.device),
        )

    @torch.no_grad()
    def _call(self, layer: int, sequences: int) -> LayerCall:
        """The arguments of an original layer for a batch of so many sequences."""
        return self.stream.calls(self.text.ids_NT[:sequences], None)[layer]

    def reach(self, depth: int, task: Task) -> None:
        """Run the teacher as far as that."""
        task.note(f"the original's hidden states behind layer {depth}")
        self.original.learn([depth])

    def drop_before(self, depth: int) -> None:
        """Let go of the teacher's states that no layer from there on needs."""
        for stored in self.store.depths():
            if stored < depth:
                self.store.drop(stored)

    def units(self) -> int:
        """Tokens that one layer is trained on, if it is not stopped early."""
        return self.schedule.steps * self.schedule.batch * self.text.seq_len
