"""Commands on the way out: the card."""

from __future__ import annotations

from qwench import display
from qwench.cli.app import ReleaseArgument, app


@app.command()
def card(release: ReleaseArgument) -> None:
    """Write the release's README.md and plots from what was measured.

    Example: `qwench card ./Qwen3.5-9B-NVFP4A16`
    """
    from qwench.steps.card import write_card

    display.out.print(f"wrote {write_card(release)}")
