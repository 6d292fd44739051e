"""The command `ramp-moe`. Every command has --json; an error is one line that names the remedy, exit code 2."""

from __future__ import annotations

from typing import Any

import click

from ..errors import RampMoEError
from . import build, check, choose, compare, drift, listing, profile


class _Failure(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RampMoEError as e:
            raise _Failure(str(e)) from e


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ramp-moe")
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
):
    main.add_command(_command)
