"""The MTP head on its way through a run: measured before the work where it was grafted, and on the finished bytes whatever happened to it.

What was measured outlives a stopped run, so that one that goes on, or is finished with `--accept-any`, does not measure again.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwench.checkpoint.source import TensorSource
from qwench.models import map_of
from qwench.models.place import CPU, Place
from qwench.recipe import AcceptanceGate
from qwench.result import Acceptance, AcceptanceCheck, GraftFacts
from qwench.steps.heads.gate import Memory, Tell, acceptance_of, check_gate, gate_rows, measured_check, remembered
from qwench.steps.materials.fit import donor_acceptance, graft_facts
from qwench.steps.materials.material import Material
from qwench.stream.rows import Rows


@dataclass(frozen=True)
class HeadWatch:
    """What looks after a head.

    Attributes:
        material: what the run reads.
        gate: the recipe's floor; None where it says `off`.
        rows: what is measured on; or why nothing is; None where there is nothing to look after.
        accept_any: finish a release whatever its head is worth.
        place: where heads are run.
    """

    material: Material
    gate: AcceptanceGate | None
    rows: Rows | str | None
    accept_any: bool = False
    place: Place = CPU

    @property
    def notes(self) -> list[str]:
        """What a person should know before the run."""
        return [f"acceptance of the MTP head is not measured: {self.rows}"] if isinstance(self.rows, str) else []

    def graft(self, memory: Memory, tell: Tell | None = None) -> GraftFacts | None:
        """What was grafted and how it fits, where the recipe grafts.

        Raises:
            VerificationError: the grafted head is accepted too rarely by its new trunk, held against its own.
        """
        material = self.material
        settings, donor, located = material.recipe.graft, material.donor, material.donor_located
        if settings is None or donor is None or located is None:
            return None
        facts = graft_facts(material.origin, donor, located, settings)
        if "mtp" not in settings.components:
            return facts
        if self.gate is None or not isinstance(self.rows, Rows):
            facts.notes.append(f"acceptance was not measured: {self.rows or 'the recipe says off'}")
            return facts
        rows = self.rows
        facts.acceptance_donor = donor_acceptance(
            donor,
            facts,
            lambda: remembered(memory, f"donor {rows.ids_sha256}", lambda: acceptance_of(donor, rows, tell, self.place)),
        )
        facts.acceptance_source = self._of_source(memory, rows, tell)
        check = measured_check(self.gate.floor, rows, facts.acceptance_donor, facts.acceptance_source)
        check_gate(check, self.accept_any, ("its own trunk, the donor's,", "the trunk that it was grafted on"))
        return facts

    def release(
        self, memory: Memory, release: TensorSource, key: str = "release", tell: Tell | None = None
    ) -> AcceptanceCheck | None:
        """The finished bytes held against what they were made from; None where there is nothing to look after.

        Args:
            release: the finished bytes.
            key: tells several files of one release apart.

        Raises:
            VerificationError: the release is under the floor, and `accept_any` does not say that it may be.
            CheckpointError: it cannot be read, or its hidden states are not finite.
        """
        if self.gate is None or self.rows is None:
            return None
        if isinstance(self.rows, str):
            return AcceptanceCheck(floor=self.gate.floor, not_measured=self.rows)
        rows = self.rows
        after = remembered(memory, f"{key} {rows.ids_sha256}", lambda: acceptance_of(release, rows, tell, self.place))
        check = measured_check(self.gate.floor, rows, self._of_source(memory, rows, tell), after)
        return check_gate(check, self.accept_any)

    def _of_source(self, memory: Memory, rows: Rows, tell: Tell | None) -> Acceptance | None:
        return remembered(
            memory, f"source {rows.ids_sha256}", lambda: acceptance_of(self.material.source, rows, tell, self.place)
        )


def watch_head(material: Material, changed: bool, accept_any: bool = False, place: Place = CPU) -> HeadWatch:
    """Get ready to look after the head of a release.

    Args:
        changed: whether the release differs from its source in any number; if not, its head cannot have died.
    """
    stated, map = material.recipe.acceptance, map_of(material.source)
    gate = stated if isinstance(stated, AcceptanceGate) else None
    watched = gate is not None and map.has_mtp and (changed or material.recipe.graft is not None)
    rows = gate_rows(gate, material.source.folder, map) if gate and watched else None
    return HeadWatch(material, gate, rows, accept_any, place)
