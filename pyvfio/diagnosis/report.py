"""All findings of an examination: a frozen snapshot, as text for people and as a script for a shell."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pyvfio.findings import Finding, Status, wrapped

_WORST: tuple[Status, ...] = ("wrong", "note")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings of an examination, in the order in which to fix them; iterates over them.

    `bdf` is the device, None where the machine alone was examined. `host` and `kernel` are the machine's name and its
    kernel's release.
    """

    bdf: str | None
    host: str
    kernel: str
    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def ok(self) -> bool:
        """Whether there is no obstacle."""
        return self.status != "wrong"

    @property
    def status(self) -> Status:
        """The worst status of all findings."""
        found = {finding.status for finding in self.findings}
        for status in _WORST:
            if status in found:
                return status
        return "ok"

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The obstacles, the first to remove first."""
        return tuple(finding for finding in self.findings if finding.status == "wrong")

    def text(self, *, everything: bool = False, width: int = 80, verdict: bool = True) -> str:
        """Return the diagnosis for people.

        `everything`: include the findings that are in order. `verdict`: end with the sentence of `verdict`.
        """
        shown = [finding for finding in self.findings if everything or finding.status != "ok"]
        # One reboot serves all findings that need one.
        last = max((at for at, finding in enumerate(shown) if finding.reboot), default=-1)
        once = [replace(finding, reboot=at == last) for at, finding in enumerate(shown)]
        lines = [line for finding in once for line in finding.lines(width)]
        return "\n".join([*lines, *(wrapped(self.verdict, width) if verdict else ())])

    @property
    def verdict(self) -> str:
        """The number of obstacles, and the next step."""
        subject = self.bdf or "this machine"
        if not (wrong := self.wrong):
            return f"Nothing stands between {subject} and pyvfio.open_device."
        again = f"pyvfio doctor{f' {self.bdf}' if self.bdf else ''}"
        if len(wrong) == 1:
            return f"1 obstacle on {subject}. Remove the obstacle, then run {again} again."
        return f"{len(wrong)} obstacles on {subject}, in the order in which to remove them. Then run {again} again."

    def __str__(self) -> str:
        return self.text()

    def script(self, *, run_pyvfio: Sequence[str] = ()) -> str:
        """Return a script for sh that removes the obstacles.

        The script ends at the first command that fails. Steps that no command can do, risky commands, and a reboot are
        comments. `run_pyvfio`: the lines of shell that define the command `pyvfio`.
        """
        lines = ["#!/bin/sh", f"# {self._title()}"]
        wrong = self.wrong
        if not wrong:
            return "\n".join([*lines, "# There is no obstacle.", ""])
        lines += ["# Run it as root.", "set -eu"]
        if any(command.text.startswith("pyvfio ") for finding in wrong for command in finding.commands):
            lines += run_pyvfio
        for finding in wrong:
            lines += ["", *_comment(f"{finding.check}: {finding.summary}"), *_script_lines(finding)]
        if any(finding.reboot for finding in wrong):
            lines += [
                "",
                "# Reboot, then run pyvfio doctor again: other checks wait for the reboot.",
                "# reboot",
            ]
        return "\n".join([*lines, ""])

    def _title(self) -> str:
        return " ".join(word for word in ("pyvfio doctor", self.bdf, self.host and f"on {self.host}") if word)


def _script_lines(finding: Finding) -> Iterator[str]:
    if finding.by_hand:
        yield from _comment(finding.by_hand)
    for command in finding.commands:
        if command.comment:
            yield from _comment(command.comment)
        yield f"# {command.text}" if command.risky else command.text


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False)]
