"""Writes the missing shards of a conversion, then the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amp.data.captions.base import Skip
from amp.data.conversion.folder import clear_stale, lock_folder, surplus_of_splits, surplus_shards
from amp.data.conversion.plan import PLANS, ShardPlan
from amp.data.conversion.skipped import by_kind, check_skipped
from amp.data.conversion.write import Write, write_all, write_shard
from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.errors import AmpError, public_command
from amp.parts import part_of
from amp.terminal import PlainConsole
from amp.version import __version__


@dataclass(frozen=True, slots=True)
class Form:
    """What a conversion writes into its folder.

    Attributes:
        notes: Name of the folder of the sidecars.
        write: Writes one plan.
        surplus: Names of what an earlier run wrote and no plan needs.
        clear: Removes it, and temporary files.
        adds: Whether the splits in the folder that aren't converted are kept.
    """

    notes: str
    write: Write
    surplus: Callable[[Path, Sequence[ShardPlan], Sequence[str]], list[str]]
    clear: Callable[[Path, list[str]], None]
    adds: bool = False


WHOLE_FOLDER = Form(PLANS, write_shard, surplus_shards, clear_stale)
ONE_SPLIT = Form(PLANS, write_shard, surplus_of_splits, clear_stale, adds=True)


@dataclass(slots=True)
class Conversion:
    """A planned conversion.

    Attributes:
        out: Folder of the manifest.
        plans: Plans of each split.
        source: What the images come from, for messages.
        lost: Images that are already known to be unusable.
        skipped: What else was left out; not counted again.
        excluded: Number of images left out on request, by split.
        max_skipped: Maximum fraction of images, and of captions, that may be skipped.
        provenance: The manifest's entry about sources and options.
        form: What is written.
    """

    out: Path
    plans: dict[str, list[ShardPlan]]
    source: str
    max_skipped: float
    lost: list[Skip] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    excluded: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    form: Form = WHOLE_FOLDER

    def run(
        self, part: str | None, workers: int | None, command: list[str] | None, console: PlainConsole
    ) -> ShardManifest | None:
        """Writes what is missing; returns the manifest, or None for a part.

        Args:
            part: `I/N` writes only every Nth plan, starting with plan I, and no manifest.
            workers: Number of processes; None for one per usable CPU.
            command: Command line, recorded in the manifest.
            console: Console for progress output.

        Raises:
            AmpError: The folder can't be used, too much was skipped, or a shard can't be written.
        """
        index, parts = part_of(part) if part is not None else (0, 1)
        plans = [plan for split_plans in self.plans.values() for plan in split_plans]
        mine = plans[index::parts]
        with lock_folder(self.out, shared=part is not None, notes=self.form.notes):
            self._write_missing(plans, mine, workers, console, whole=part is None)
            unreadable = [skip for plan in mine for skip in plan.unreadable()]
            lost = self.lost + unreadable
            gone = {skip.file for skip in unreadable}
            # The limit is a fraction of the images of all parts; a part must not fail where the whole would pass.
            kept = [image for plan in plans for _, image in plan.samples if plan.name_of(image) not in gone]
            if part is not None:
                check_skipped(lost, kept, self.max_skipped, f"{self.source} (part {part})")
                done = sum(not plan.must_be_written() for plan in mine)
                console.print(
                    f"part {part}: {done} of its {len(mine)} shards are complete, {len(unreadable)} images are "
                    "unreadable; run the same command without --part to write missing shards and the manifest"
                )
                return None
            infos, without_knowledge = self._collect()
            check_skipped(lost, kept, self.max_skipped, self.source)
            manifest = ShardManifest(
                root=self.out,
                splits=infos,
                captions_without_knowledge=without_knowledge,
                skipped=by_kind(self.skipped + lost),
                excluded=self.excluded,
                provenance={
                    **self.provenance,
                    **self._tars(),
                    "command": public_command(command) if command is not None else None,
                },
                created_by=f"open-clip-amp {__version__}",
            )
            if self.form.adds:
                _add_splits(manifest, self._others())
            manifest.save()
        return manifest

    def _write_missing(
        self,
        plans: list[ShardPlan],
        mine: list[ShardPlan],
        workers: int | None,
        console: PlainConsole,
        whole: bool,
    ) -> None:
        """Writes the shards of `mine` that don't exist as planned; `whole` means that `mine` is all of `plans`."""
        surplus = self.form.surplus(self.out, plans, list(self.plans))
        to_write = [plan for plan in mine if plan.must_be_written()]
        others = sum(plan.exists() for plan in to_write) + (len(surplus) if whole else 0)
        if others:
            console.print(
                f"{self.out}: existing shards to be replaced, because they differ from what these options give: "
                f"{others}"
            )
        if to_write or surplus:
            # The old manifest describes files that are about to change.
            old = self._others() if self.form.adds else None
            if old is not None and old.splits:
                old.save()
            else:
                (self.out / MANIFEST_NAME).unlink(missing_ok=True)
        if whole:
            self.form.clear(self.out, surplus)
        done = len(mine) - len(to_write)
        if done:
            console.print(f"keeping {done} of {len(mine)} shards that are already complete")
        write_all(to_write, self.form.write, workers, console, accept_gaps=whole)

    def _collect(self) -> tuple[dict[str, list[ShardInfo]], dict[str, int]]:
        """The shards of each split, and its number of captions without knowledge, from the sidecars."""
        infos: dict[str, list[ShardInfo]] = {split: [] for split in self.plans}
        without_knowledge = dict.fromkeys(self.plans, 0)
        for split, plans in self.plans.items():
            for plan in plans:
                sidecar = plan.finished()
                if sidecar is None:
                    raise AmpError(
                        f"{plan.path}: changed while the shards were being written; run the same command again"
                    )
                without_knowledge[split] += sidecar["captions_without_knowledge"]
                if sidecar["samples"]:
                    infos[split].append(plan.info(sidecar))
            if not infos[split]:
                raise AmpError(f"{self.source}: no image of split {split!r} can be read; expected at least one")
        return infos, without_knowledge

    def _tars(self) -> dict[str, Any]:
        """The provenance's entry of the tar files that were converted, if any."""
        sidecars = [plan.noted() for plans in self.plans.values() for plan in plans if plan.from_tar]
        return {"tars": [sidecar["tar"] for sidecar in sidecars if sidecar]} if sidecars else {}

    def _others(self) -> ShardManifest | None:
        """The manifest in the folder without the splits that are converted; None if there is no manifest."""
        if not (self.out / MANIFEST_NAME).exists():
            return None
        old = ShardManifest.load(self.out)
        # Keep where each split came from, as the entries of the last one are at the top.
        top = {key: value for key, value in old.provenance.items() if key != "splits"}
        sources = {split: top for split in old.splits} | old.provenance.get("splits", {})
        old.splits = {split: infos for split, infos in old.splits.items() if split not in self.plans}
        old.captions_without_knowledge = {split: old.captions_without_knowledge[split] for split in old.splits}
        old.excluded = {split: count for split, count in old.excluded.items() if split in old.splits}
        old.skipped = {
            kind: [entry for entry in entries if entry["split"] in old.splits] for kind, entries in old.skipped.items()
        }
        old.provenance = {**top, "splits": {split: sources[split] for split in old.splits}}
        return old


def _add_splits(manifest: ShardManifest, old: ShardManifest | None) -> None:
    """Adds the splits of an earlier conversion to a manifest."""
    own = dict(manifest.provenance)
    manifest.provenance["splits"] = {split: own for split in manifest.splits}
    if old is None:
        return
    manifest.splits = {**old.splits, **manifest.splits}
    manifest.captions_without_knowledge |= old.captions_without_knowledge
    manifest.excluded |= old.excluded
    manifest.skipped = {kind: old.skipped.get(kind, []) + entries for kind, entries in manifest.skipped.items()}
    manifest.provenance["splits"] = {**old.provenance["splits"], **manifest.provenance["splits"]}
