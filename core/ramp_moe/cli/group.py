"""The command group `ramp-moe`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import RampMoEError
from ..terminal import printable
from ..version import __version__
from . import INTERRUPTED, build, check, choose, compare, drift, env, listing, profile
from .output import notes_on_stderr, written_out


class _Failure(click.ClickException):
    exit_code = 2

    def __init__(self, error: RampMoEError) -> None:
        super().__init__(str(error))
        self.remedy = error.remedy

    def format_message(self) -> str:
        """One line, and a second one for the remedy if the error has one apart."""
        lines = self.message.removesuffix(self.remedy), self.remedy
        return "\n".join(printable(" ".join(line.split())) for line in lines if line)


class _Group(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        with written_out():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with notes_on_stderr():
                return super().invoke(ctx)
        except RampMoEError as e:
            raise _Failure(e) from e
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ramp-moe")
def main() -> None:
    """Pick the fastest MoE kernel for every batch from its expert histogram."""


listing.kernels.add_command(build.build_command)
for _command in (
    listing.plugins,
    listing.kernels,
    listing.models,
    listing.profiles,
    check.check_kernel,
    drift.check,
    choose.regions,
    choose.fit,
    choose.explain,
    compare.compare,
    profile.profile_command,
    env.env,
):
    main.add_command(_command)
